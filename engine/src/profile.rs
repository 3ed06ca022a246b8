//! Where a step's time goes.

/// The parts of a step. On a GPU each is one kernel or product (attention: up to three kernels).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Rows of the embedding.
    Embed,
    /// RMSNorm.
    Norm,
    /// Query, key and value products.
    Qkv,
    /// Rotation, and the KV write.
    Rotate,
    /// Attention.
    Attention,
    /// Its output product, with the residual.
    Output,
    /// Gate and up products.
    GateUp,
    /// SiLU of the gate, times up.
    Swiglu,
    /// Down product, with the residual.
    Down,
    /// Logits.
    Head,
    /// Drawing.
    Draw,
    /// Nothing: where the last part ends.
    End,
}

impl Part {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Norm => "norm",
            Self::Qkv => "qkv",
            Self::Rotate => "rotate + KV write",
            Self::Attention => "attention",
            Self::Output => "attention output",
            Self::GateUp => "gate and up",
            Self::Swiglu => "swiglu",
            Self::Down => "down",
            Self::Head => "head",
            Self::Draw => "draw",
            Self::End => "end",
        }
    }
}

/// One part of one layer.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Which.
    pub part: Part,
    /// From the step's begin.
    pub start_ms: f64,
    /// Until the next part begins: gaps between kernels and loops count.
    pub ms: f64,
}
