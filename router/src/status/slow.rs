//! The requests that waited longest for their first token, lately.

use std::time::Instant;

use proto::v1;

use super::SPAN;

/// Requests kept.
const KEPT: usize = 32;

/// Longest first.
#[derive(Default)]
pub struct Slow {
    kept: Vec<(Instant, v1::Passed)>,
}

impl Slow {
    /// A request ended well.
    pub fn add(&mut self, now: Instant, complete: &v1::Complete) {
        self.forget(now);
        let ttft = |passed: &v1::Passed| passed.timeline.as_ref().map_or(0.0, |timeline| timeline.ttft_ms);
        let new = v1::Passed {
            request_id: complete.request_id.clone(),
            age_seconds: 0.0,
            usage: complete.usage,
            timeline: complete.timeline.clone(),
            kv: complete.kv.clone(),
        };
        let at = self.kept.partition_point(|(_, passed)| ttft(passed) >= ttft(&new));
        if at < KEPT {
            self.kept.insert(at, (now, new));
            self.kept.truncate(KEPT);
        }
    }

    /// Those that are not too old.
    pub fn list(&mut self, now: Instant) -> Vec<v1::Passed> {
        self.forget(now);
        let aged = |(at, passed): &(Instant, v1::Passed)| v1::Passed {
            age_seconds: (now - *at).as_secs_f64(),
            ..passed.clone()
        };
        self.kept.iter().map(aged).collect()
    }

    fn forget(&mut self, now: Instant) {
        self.kept.retain(|(at, _)| now - *at <= SPAN);
    }
}
