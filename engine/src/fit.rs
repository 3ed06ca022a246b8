//! Least squares while the samples come: recent ones count more, no coefficient is negative, and what was never
//! seen keeps its first guess.

/// `y = Σ cᵢ xᵢ` for `N` features that all cost something.
#[derive(Debug, Clone)]
pub struct Fit<const N: usize> {
    /// Σ w x xᵀ and Σ w y x, with w = 1/y²: errors count relative to what they are errors of.
    squares: [[f64; N]; N],
    products: [f64; N],
    guess: [f64; N],
    coefficients: [f64; N],
    samples: u64,
}

/// What a sample still counts after the next one: about the last 400 decide.
const KEEP: f64 = 0.9975;
/// What a guess counts beside the samples of its feature: settles what they leave open.
const TRUST: f64 = 1e-3;
/// The same for a feature that no sample has.
const UNSEEN: f64 = 1e-6;
/// From this many samples on a fit is worth something.
const ENOUGH: u64 = 16;
/// A sample further off than this, once fitted, counts as if it were just this far off: the process stood still.
const OUTLIER: f64 = 4.0;

impl<const N: usize> Fit<N> {
    /// Starts with guesses, each positive: they hold for what is not seen.
    pub fn new(guess: [f64; N]) -> Self {
        Self { squares: [[0.0; N]; N], products: [0.0; N], guess, coefficients: guess, samples: 0 }
    }

    /// One more observation; those that are not positive numbers are none.
    pub fn add(&mut self, x: [f64; N], y: f64) {
        if !y.is_finite() || y <= 0.0 || x.iter().any(|x| !x.is_finite() || *x < 0.0) {
            return;
        }
        let predicted = self.predict(x);
        let y = if self.is_fitted() && predicted > 0.0 { y.min(predicted * OUTLIER) } else { y };
        let weight = 1.0 / (y * y);
        for i in 0..N {
            for j in 0..N {
                self.squares[i][j] = self.squares[i][j] * KEEP + weight * x[i] * x[j];
            }
            self.products[i] = self.products[i] * KEEP + weight * x[i] * y;
        }
        self.samples += 1;
        self.solve();
    }

    /// What it would be for these features.
    pub fn predict(&self, x: [f64; N]) -> f64 {
        self.coefficients.iter().zip(x).map(|(c, x)| c * x).sum()
    }

    /// The coefficients now.
    pub fn coefficients(&self) -> [f64; N] {
        self.coefficients
    }

    /// Whether enough was seen to believe it.
    pub fn is_fitted(&self) -> bool {
        self.samples >= ENOUGH
    }

    /// Solves for the coefficients; one that would be negative is 0, and the others are solved again.
    fn solve(&mut self) {
        let mut active = [true; N];
        for _ in 0..N {
            let solved = self.solve_for(&active);
            let worst = (0..N).filter(|i| active[*i]).min_by(|a, b| solved[*a].total_cmp(&solved[*b]));
            match worst {
                Some(worst) if solved[worst] < 0.0 => active[worst] = false,
                _ => {
                    self.coefficients = solved;
                    return;
                }
            }
        }
        self.coefficients = [0.0; N];
    }

    /// Gaussian elimination; the guesses keep the matrix regular, so no pivoting is needed.
    fn solve_for(&self, active: &[bool; N]) -> [f64; N] {
        let (mut a, mut b) = (self.squares, self.products);
        for i in 0..N {
            let strength = self.squares[i][i] * TRUST + UNSEEN / (self.guess[i] * self.guess[i]);
            a[i][i] += strength;
            b[i] += strength * self.guess[i];
            if !active[i] {
                (0..N).for_each(|j| (a[i][j], a[j][i]) = (0.0, 0.0));
                (a[i][i], b[i]) = (1.0, 0.0);
            }
        }
        for pivot in 0..N {
            for row in pivot + 1..N {
                let factor = a[row][pivot] / a[pivot][pivot];
                let above = a[pivot];
                a[row].iter_mut().zip(above).skip(pivot).for_each(|(cell, above)| *cell -= factor * above);
                b[row] -= factor * b[pivot];
            }
        }
        let mut solved = [0.0; N];
        for row in (0..N).rev() {
            let known: f64 = (row + 1..N).map(|column| a[row][column] * solved[column]).sum();
            solved[row] = (b[row] - known) / a[row][row];
        }
        solved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_was_never_seen_keeps_its_guess() {
        let mut fit = Fit::new([1.0, 3.0]);
        (0..100).for_each(|_| fit.add([1.0, 0.0], 10.0));
        let [fixed, slope] = fit.coefficients();
        assert!((fixed - 10.0).abs() < 0.1 && (slope - 3.0).abs() < 1e-9, "{fixed} {slope}");
    }

    #[test]
    fn follows_a_change_and_shrugs_at_nonsense() {
        let mut fit = Fit::new([1.0, 1.0]);
        for i in 0..500 {
            fit.add([1.0, f64::from(i % 10)], 5.0 + 2.0 * f64::from(i % 10));
        }
        let before = fit.predict([1.0, 4.0]);
        fit.add([1.0, 4.0], f64::NAN);
        fit.add([1.0, 4.0], -3.0);
        assert_eq!(fit.predict([1.0, 4.0]), before);
        for i in 0..2000 {
            fit.add([1.0, f64::from(i % 10)], 10.0 + 4.0 * f64::from(i % 10));
        }
        assert!((fit.predict([1.0, 4.0]) - 26.0).abs() < 0.5);
    }

    proptest! {
        /// Noise of 5 % either way: predictions within 5 % after 300 samples.
        #[test]
        fn finds_the_line(
            fixed in 1.0f64..50.0, slope in 0.01f64..5.0, noise in proptest::collection::vec((-0.05f64..0.05, 0.0f64..100.0), 300),
        ) {
            let mut fit = Fit::new([10.0, 1.0]);
            for (error, x) in noise {
                fit.add([1.0, x], (fixed + slope * x) * (1.0 + error));
            }
            let truth = fixed + slope * 50.0;
            prop_assert!((fit.predict([1.0, 50.0]) - truth).abs() < truth * 0.05);
            prop_assert!(fit.coefficients().iter().all(|c| *c >= 0.0));
        }
    }
}
