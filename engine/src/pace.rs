//! What an engine step takes, learned from the steps that ran: fixed + per sequence + per KV token read + per
//! prompt token + what the prompt's attention adds. Schedulers ask it before they plan.

use crate::fit::Fit;

/// What a step consists of.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepShape {
    /// Sequences that compute one token.
    pub sequences: usize,
    /// KV tokens that those read.
    pub kv_tokens: usize,
    /// Tokens of prompts.
    pub prompt_tokens: usize,
    /// For each of those, the tokens before it: what its attention reads.
    pub prompt_reads: f64,
}

impl StepShape {
    /// With one sequence more, at that length.
    pub fn with_sequence(self, kv_tokens: usize) -> Self {
        Self { sequences: self.sequences + 1, kv_tokens: self.kv_tokens + kv_tokens, ..self }
    }

    /// With that many tokens more of a prompt of which `computed` are done.
    pub fn with_prompt(self, computed: usize, tokens: usize) -> Self {
        let reads = tokens as f64 * (computed as f64 + tokens as f64 / 2.0);
        Self { prompt_tokens: self.prompt_tokens + tokens, prompt_reads: self.prompt_reads + reads, ..self }
    }

    /// With what one sequence runs in a step: its one token, or some of its prompt.
    pub fn with_run(self, computed: usize, tokens: usize) -> Self {
        match tokens {
            1 => self.with_sequence(computed),
            _ => self.with_prompt(computed, tokens),
        }
    }

    fn features(&self) -> [f64; 5] {
        [1.0, self.sequences as f64, self.kv_tokens as f64, self.prompt_tokens as f64, self.prompt_reads]
    }
}

/// Predicts steps, in milliseconds.
#[derive(Debug, Clone)]
pub struct StepModel {
    fit: Fit<5>,
}

/// Before anything ran: slow, so that the first chunks are small.
const GUESS: [f64; 5] = [5.0, 0.5, 1e-4, 1.0, 1e-6];

impl Default for StepModel {
    fn default() -> Self {
        Self { fit: Fit::new(GUESS) }
    }
}

impl StepModel {
    /// A step of that shape took so long.
    pub fn add(&mut self, shape: &StepShape, ms: f64) {
        self.fit.add(shape.features(), ms);
    }

    /// How long a step will take, ms.
    pub fn predict_ms(&self, shape: &StepShape) -> f64 {
        self.fit.predict(shape.features())
    }

    /// Whether enough steps were seen to believe it.
    pub fn is_fitted(&self) -> bool {
        self.fit.is_fitted()
    }

    /// Prompt tokens from which on more in a step hardly help: the fixed part is then a twentieth of it.
    pub fn knee_tokens(&self) -> usize {
        let [fixed, _, _, per_token, _] = self.fit.coefficients();
        if per_token > 0.0 { (19.0 * fixed / per_token) as usize } else { usize::MAX }
    }

    /// How many sequences of `kv_tokens` each decode within `limit_ms` a step. Without bound where even one takes longer:
    /// such a limit cannot be kept by running fewer.
    pub fn most_sequences(&self, kv_tokens: f64, limit_ms: f64) -> usize {
        let [fixed, per_sequence, per_kv, _, _] = self.fit.coefficients();
        let each = per_sequence + per_kv * kv_tokens;
        let most = (limit_ms - fixed) / each;
        if most >= 1.0 && most.is_finite() { most as usize } else { usize::MAX }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truth(s: &StepShape) -> f64 {
        4.0 + 0.3 * s.sequences as f64
            + 5e-4 * s.kv_tokens as f64
            + 0.2 * s.prompt_tokens as f64
            + 1e-5 * s.prompt_reads
    }

    #[test]
    fn learns_a_clock_and_its_knee() {
        let mut model = StepModel::default();
        for i in 0..400usize {
            let mut shape = StepShape::default();
            (0..i % 7).for_each(|s| shape = shape.with_sequence(100 + 50 * s + i % 90));
            if i % 3 == 0 {
                shape = shape.with_prompt((i % 5) * 64, 16 * (1 + i % 8));
            }
            model.add(&shape, truth(&shape));
        }
        let shape = StepShape::default().with_sequence(300).with_prompt(128, 64);
        let (predicted, actual) = (model.predict_ms(&shape), truth(&shape));
        assert!((predicted - actual).abs() < actual * 0.05, "{predicted} against {actual}");
        let knee = model.knee_tokens();
        assert!((300..460).contains(&knee), "{knee}");
        assert_eq!(model.most_sequences(200.0, 3.0), usize::MAX);
        let most = model.most_sequences(200.0, 44.0);
        assert!((85..115).contains(&most), "{most}");
    }
}
