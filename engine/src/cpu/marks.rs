//! Time stamps of a step under way, for a profile.

use std::time::Instant;

use crate::profile::{Part, Span};

/// Where each part began.
#[derive(Default)]
pub(super) struct Marks(Vec<(Part, Instant)>);

impl Marks {
    pub(super) fn mark(&mut self, part: Part) {
        self.0.push((part, Instant::now()));
    }

    /// Each part up to the next one's begin.
    pub(super) fn spans(&self) -> Vec<Span> {
        let Some(&(_, first)) = self.0.first() else { return Vec::new() };
        let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
        let span = |pair: &[(Part, Instant)]| Span {
            part: pair[0].0,
            start_ms: ms(first, pair[0].1),
            ms: ms(pair[0].1, pair[1].1),
        };
        self.0.windows(2).map(span).collect()
    }
}
