//! Weights from a seed: for measuring shapes whose files are not at hand.

use half::bf16;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::weights::{Matrix, WeightSource};
use crate::EngineError;

/// Matrices near N(0, 0.02) (a sum of four uniform numbers), norms at 1, biases at 0.
#[derive(Debug, Clone, Copy)]
pub struct RandomWeights {
    /// Equal seeds give equal weights.
    pub seed: u64,
}

impl RandomWeights {
    /// Standard deviation of matrices, as networks are usually initialised.
    pub(crate) const DEVIATION: f32 = 0.02;

    /// Where the sequence of a tensor's numbers starts.
    pub(crate) fn state(&self, name: &str) -> u64 {
        xxh3_64_with_seed(name.as_bytes(), self.seed)
    }
}

impl WeightSource for RandomWeights {
    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Matrix, EngineError> {
        let mut state = self.state(name);
        let numbers: Vec<bf16> = (0..rows * columns).map(|_| normal(&mut state)).collect();
        Ok(Matrix::from(numbers))
    }

    fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, EngineError> {
        Ok(vec![if name.ends_with(".bias") { 0.0 } else { 1.0 }; length])
    }

    fn has(&self, _name: &str) -> bool {
        true
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014); the sum of its four 16-bit parts has mean 131070 and a deviation of
/// 65536 · √(4 / 12).
fn normal(state: &mut u64) -> bf16 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let sum = (z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48);
    bf16::from_f32((sum as f32 - 131_070.0) * (RandomWeights::DEVIATION / 37_837.227))
}
