//! Where a step's time goes on the device.

use super::driver::{Event, Stream};
use crate::EngineError;

/// The parts of a step, each one kernel or product (attention: up to three kernels).
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
    /// Until the next part begins: gaps between kernels count.
    pub ms: f64,
}

/// Time stamps of a step under way.
#[derive(Default)]
pub(super) struct Profile {
    marks: Vec<(Part, Event)>,
}

impl Profile {
    pub(super) fn mark(&mut self, stream: &Stream, part: Part) -> Result<(), EngineError> {
        let event = Event::new(true)?;
        event.record(stream)?;
        self.marks.push((part, event));
        Ok(())
    }

    /// The spans, once the stream has passed the step.
    pub(super) fn spans(&self) -> Result<Vec<Span>, EngineError> {
        let Some((_, first)) = self.marks.first() else { return Ok(Vec::new()) };
        let span = |pair: &[(Part, Event)]| {
            let (start, end) = (pair[0].1.since(first)?, pair[1].1.since(first)?);
            Ok(Span { part: pair[0].0, start_ms: start.into(), ms: (end - start).into() })
        };
        self.marks.windows(2).map(span).collect()
    }
}
