//! Where a step's time goes on the device.

use super::driver::{Event, Stream};
use crate::EngineError;
use crate::profile::{Part, Span};

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
