//! Rotary position embedding: frequencies and their scalings.
//!
//! Su et al. 2021 (RoFormer); linear interpolation: Chen et al. 2023; YaRN: Peng et al. 2023; `llama3`: the
//! rule published with Llama 3.1. Formulas as in Hugging Face transformers, whose outputs are our reference.

/// How the base frequencies are stretched for contexts longer than the training's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by the factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, a linear blend between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / this` are divided by the factor.
        low_freq_factor: f64,
        /// Wavelengths below `original / this` are kept.
        high_freq_factor: f64,
        /// Context of the training, in tokens.
        original: f64,
    },
    /// As Llama3 with the blend over dimensions, and the attention sharpened.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Rotations over the original context above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is divided.
        beta_slow: f64,
        /// Context of the training, in tokens.
        original: f64,
        /// Multiplies cos and sin.
        attention_factor: f64,
        /// Round the blend's ends to whole dimensions.
        truncate: bool,
    },
}

/// Base and scaling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// The base θ.
    pub theta: f64,
    /// The scaling.
    pub scaling: RopeScaling,
}

impl Rope {
    /// Angle per position for each pair of dimensions, `[head_dim / 2]`.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let half = head_dim / 2;
        (0..half)
            .map(|pair| {
                let base = self.theta.powf(-2.0 * pair as f64 / head_dim as f64);
                self.scaled(pair as f64, base, head_dim as f64) as f32
            })
            .collect()
    }

    /// What cos and sin are multiplied with.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    fn scaled(&self, pair: f64, base: f64, head_dim: f64) -> f64 {
        match self.scaling {
            RopeScaling::None => base,
            RopeScaling::Linear { factor } => base / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let wavelength = 2.0 * std::f64::consts::PI / base;
                let kept = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                blend(base, factor, kept)
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original, truncate, .. } => {
                // The dimension that makes `rotations` turns over the original context.
                let dimension = |rotations: f64| {
                    head_dim * (original / (rotations * 2.0 * std::f64::consts::PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(head_dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                blend(base, factor, 1.0 - (pair - low) / (high - low))
            }
        }
    }
}

/// `kept` of the frequency as it is, the rest divided.
fn blend(base: f64, factor: f64, kept: f64) -> f64 {
    let kept = kept.clamp(0.0, 1.0);
    base * kept + base / factor * (1.0 - kept)
}
