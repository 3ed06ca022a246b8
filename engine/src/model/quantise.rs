//! Weights of eight bits: the one place that says what they mean, for every backend.
//!
//! A matrix `[outputs, inputs]` holds one eight-bit number per weight and one f32 scale per output; activations get one
//! scale per token, in every step ("W8A8, per channel and per token, symmetric, dynamic"), or what CPU cores take instead (below):
//!
//! ```text
//! scale = max |x| of the row or group / 127 (INT8) or / 448 (FP8, e4m3)     number = round(x / scale), nearest, ties to even
//! ```
//!
//! What CPU cores round by themselves (not a checkpoint that is INT8 already) lies closer to bf16: activations get a scale per
//! 128 inputs of a token, and both sides are first turned ([`turn`]), which spreads an outlier over sixteen numbers; QuaRot (Ashkboos
//! et al. 2024) does so over whole rows. Turned, the head can be in eight bits too.
//!
//! INT8 as in LLM.int8() (Dettmers et al. 2022, section 2, without outliers apart) and SmoothQuant (Xiao et al. 2022, its O1
//! granularity, without smoothing), FP8 as in Micikevicius et al. 2022; compressed-tensors calls them `int-quantized` and
//! `float-quantized`. Quantised are the products of the layers. Embedding and head else stay bf16: a head's rounding shows
//! in every token's logits, an embedding is read a row a token; compressed-tensors leaves both alone too. Norms and biases
//! are vectors: nothing to gain.

use std::borrow::Cow;

use half::bf16;

use super::weights::{Matrix, WeightSource};
use crate::EngineError;

/// Kinds of eight-bit numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quantisation {
    /// Signed integers.
    Int8,
    /// e4m3 floats.
    Fp8,
}

impl Quantisation {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }
}

/// A matrix as it is stored.
pub enum Stored {
    /// bf16, or what was rounded to it.
    Brain(Matrix),
    /// Eight bits.
    Eight(Eight),
}

/// A matrix of eight-bit numbers with a scale per row.
pub struct Eight {
    /// What the bytes are.
    pub kind: Quantisation,
    /// Row-major.
    pub bytes: Bytes,
    /// One per row.
    pub scales: Vec<f32>,
}

/// Bytes of a mapped file, or owned.
pub struct Bytes(pub(super) super::weights::ByteStorage);

impl Bytes {
    /// Row-major.
    pub fn as_slice(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// What a network is wanted in, and what its checkpoint is: the kind that it will have.
pub fn kind_of(
    wanted: Option<Quantisation>,
    stored: Option<Quantisation>,
) -> Result<Option<Quantisation>, EngineError> {
    match (wanted, stored) {
        (Some(wanted), Some(stored)) if wanted != stored => Err(EngineError::Unsupported(format!(
            "--quantize {}: the checkpoint is {} already; leave --quantize away or take the bf16 checkpoint",
            wanted.name(),
            stored.name()
        ))),
        (wanted, stored) => Ok(stored.or(wanted)),
    }
}

/// A matrix of a layer, in what config.json says: a file that is otherwise is a mistake of whoever wrote it.
pub fn layer_matrix(
    source: &dyn WeightSource,
    declared: Option<Quantisation>,
    name: &str,
    rows: usize,
    columns: usize,
) -> Result<Stored, EngineError> {
    let stored = source.stored(name, rows, columns)?;
    let found = match &stored {
        Stored::Brain(_) => None,
        Stored::Eight(eight) => Some(eight.kind),
    };
    let words = |kind: Option<Quantisation>| kind.map_or("bf16", Quantisation::name);
    if found != declared {
        let reason = format!("{name} is {}, config.json declares {}", words(found), words(declared));
        return Err(EngineError::Unsupported(reason));
    }
    Ok(stored)
}

/// Numbers of a matrix in INT8, and its rows' scales.
pub type Rows8<'a> = (Cow<'a, [i8]>, Cow<'a, [f32]>);

/// A matrix in INT8: as it is stored, or rounded now. FP8 is not rounded here but on the device that multiplies it.
pub fn to_int8(stored: &Stored, columns: usize) -> Result<Rows8<'_>, EngineError> {
    match stored {
        Stored::Brain(matrix) => {
            let (numbers, scales) = int8_rows(matrix.numbers(), columns);
            Ok((Cow::Owned(numbers), Cow::Owned(scales)))
        }
        Stored::Eight(Eight { kind: Quantisation::Int8, bytes, scales }) => {
            Ok((Cow::Borrowed(bytemuck::cast_slice(bytes.as_slice())), Cow::Borrowed(scales)))
        }
        Stored::Eight(other) => {
            Err(EngineError::Unsupported(format!("{} weights where int8 is wanted", other.kind.name())))
        }
    }
}

/// Rows of `columns` numbers in INT8, with their scales.
pub fn int8_rows(numbers: &[bf16], columns: usize) -> (Vec<i8>, Vec<f32>) {
    rows_of(numbers, columns, |row, out| int8_row(row, out).0)
}

/// The same turned: products with turned activations are those of the numbers themselves.
pub fn turned_rows(numbers: &[bf16], columns: usize) -> (Vec<i8>, Vec<f32>) {
    rows_of(numbers, columns, |row, out| {
        turn(row);
        int8_row(row, out).0 / GAIN
    })
}

fn rows_of(
    numbers: &[bf16],
    columns: usize,
    round: impl Fn(&mut [f32], &mut [i8]) -> f32,
) -> (Vec<i8>, Vec<f32>) {
    let mut out = vec![0i8; numbers.len()];
    let mut row = vec![0f32; columns];
    let scales = numbers.chunks_exact(columns).zip(out.chunks_exact_mut(columns)).map(|(from, to)| {
        row.iter_mut().zip(from).for_each(|(x, b)| *x = b.to_f32());
        round(&mut row, to)
    });
    let scales = scales.collect();
    (out, scales)
}

/// Numbers that are turned together.
const TURNED: usize = 64;
/// What a product of two turned rows is larger by: a power of two, so that taking it out rounds nothing.
const GAIN: f32 = 16.0;

/// Multiplies each 64 numbers by a Hadamard matrix of order 16 over every fourth of them, four times its inverse: sums and differences
/// only, whole vectors at a time. Dots of two turned rows are [`GAIN`] times those of the rows.
#[inline(always)]
pub fn turn(x: &mut [f32]) {
    let mut blocks = x.chunks_exact_mut(TURNED);
    for block in &mut blocks {
        for half in [4, 8, 16, 32] {
            for pair in block.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
        }
    }
    // What is left over stays as it is, but for its share of the gain.
    blocks.into_remainder().iter_mut().for_each(|x| *x *= 4.0);
}

/// Below this a row is zero: its inverse scale would not be a number.
const TINY: u32 = 0x0da2_4260; // 1e-30
const INFINITE: u32 = 0x7f80_0000;

/// One row in INT8: its scale, and the sum of its numbers. A row with a number that is not finite gets NaN as scale, so that it
/// shows. The same bits on every device: exact maxima, one rounding per operation.
#[inline(always)]
pub fn int8_row(x: &[f32], out: &mut [i8]) -> (f32, i32) {
    // Compared as integers: no order of NaNs to get wrong, and exact in any order.
    let top = x.iter().map(|x| x.to_bits() & 0x7fff_ffff).fold(0, u32::max);
    let (scale, inverse) = match top {
        INFINITE.. => (f32::NAN, 0.0),
        0..TINY => (1.0, 0.0),
        top => (f32::from_bits(top) / 127.0, 127.0 / f32::from_bits(top)),
    };
    let mut sum = 0i32;
    for (&x, out) in x.iter().zip(&mut *out) {
        // Adding 1.5 · 2²³ rounds to a whole number, ties to even, and leaves it in the low bits.
        let number = (x * inverse + 12_582_912.0).to_bits() as i8;
        *out = number;
        sum += i32::from(number);
    }
    (scale, sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against the definition in f64: no number further off than half a step, the largest at 127.
        #[test]
        fn rounds_to_nearest(x in proptest::collection::vec(-1e4f32..1e4, 1..300)) {
            let mut out = vec![0; x.len()];
            let (scale, sum) = int8_row(&x, &mut out);
            prop_assert_eq!(sum, out.iter().map(|&q| i32::from(q)).sum::<i32>());
            for (&x, &q) in x.iter().zip(&out) {
                let off = (f64::from(x) / f64::from(scale) - f64::from(q)).abs();
                prop_assert!(off < 0.5 + 1e-4, "{} {} {}", x, q, scale);
            }
            let top = x.iter().copied().fold(0f32, |a, b| a.max(b.abs()));
            prop_assert!(top == 0.0 || out.iter().any(|q| q.unsigned_abs() == 127));
        }
    }

    proptest! {
        #[test]
        fn turning_keeps_dots(x in proptest::collection::vec((-10i16..10, -10i16..10), 1..300)) {
            let (mut a, mut b): (Vec<f32>, Vec<f32>) = x.into_iter().map(|(a, b)| (f32::from(a), f32::from(b))).unzip();
            // Whole numbers this small are exact in f32.
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            let before = dot(&a, &b);
            turn(&mut a);
            turn(&mut b);
            prop_assert_eq!(dot(&a, &b), GAIN * before);
        }
    }

    #[test]
    fn an_outlier_is_spread() {
        let mut x = [0.0; 64];
        x[37] = 1.0;
        turn(&mut x);
        let spread: Vec<usize> = (0..64).filter(|&i| x[i].abs() == 1.0).collect();
        assert_eq!(spread, (1..64).step_by(4).collect::<Vec<_>>());
    }

    #[test]
    fn odd_rows() {
        let mut out = [7i8; 3];
        assert_eq!((int8_row(&[0.0, -0.0, 1e-38], &mut out), out), ((1.0, 0), [0; 3]));
        assert_eq!(int8_row(&[0.5, 1.5, -127.0], &mut out), (1.0, -125));
        assert_eq!(out, [0, 2, -127], "ties to even");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (scale, sum) = int8_row(&[1.0, bad, 2.0], &mut out);
            assert!(scale.is_nan() && sum == 0 && out == [0; 3]);
        }
    }

    #[test]
    fn the_checkpoint_decides() {
        use Quantisation::{Fp8, Int8};
        assert_eq!(kind_of(None, None).ok(), Some(None));
        assert_eq!(kind_of(Some(Int8), None).ok(), Some(Some(Int8)));
        assert_eq!(kind_of(None, Some(Fp8)).ok(), Some(Some(Fp8)));
        assert_eq!(kind_of(Some(Fp8), Some(Fp8)).ok(), Some(Some(Fp8)));
        let refused = kind_of(Some(Fp8), Some(Int8)).map_err(|e| e.to_string());
        assert!(refused.is_err_and(|why| why.contains("the checkpoint is int8 already")));
    }
}
