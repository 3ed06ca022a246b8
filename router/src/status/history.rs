//! The last minutes, a few seconds at a time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proto::v1;

use super::SPAN;

/// Length of one moment.
const LENGTH: Duration = Duration::from_secs(5);

/// Moments, oldest first, without gaps up to the newest.
#[derive(Default)]
pub struct History {
    moments: VecDeque<(Instant, Sums)>,
}

/// What ended within a moment.
#[derive(Default)]
pub struct Sums {
    ended: u32,
    pub failed: u32,
    met: u32,
    prompt_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
    kv_bytes: u64,
    local: u32,
    ttft_sum_ms: f64,
    ttft_max_ms: f64,
    itl_sum_ms: f64,
    itl_max_ms: f64,
}

impl Sums {
    /// A request ended well.
    pub fn add(&mut self, complete: &v1::Complete, met: bool) {
        let usage = complete.usage.unwrap_or_default();
        let timeline = complete.timeline.clone().unwrap_or_default();
        self.ended += 1;
        self.met += u32::from(met);
        self.prompt_tokens += u64::from(usage.prompt_tokens);
        self.cached_tokens += u64::from(usage.cached_tokens);
        self.output_tokens += u64::from(usage.output_tokens);
        self.kv_bytes += complete.kv.as_ref().map_or(0, |kv| kv.bytes);
        self.local += u32::from(timeline.prefill_worker == timeline.decode_worker);
        self.ttft_sum_ms += timeline.ttft_ms;
        self.ttft_max_ms = self.ttft_max_ms.max(timeline.ttft_ms);
        self.itl_sum_ms += timeline.itl_mean_ms;
        self.itl_max_ms = self.itl_max_ms.max(timeline.itl_max_ms);
    }

    fn moment(&self, began: Instant, now: Instant) -> v1::Moment {
        let mean = |sum: f64| if self.ended == 0 { 0.0 } else { sum / f64::from(self.ended) };
        let length = (now - began).min(LENGTH);
        v1::Moment {
            age_seconds: (now - began - length).as_secs_f64(),
            length_seconds: length.as_secs_f64(),
            ended: self.ended,
            failed: self.failed,
            met: self.met,
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            output_tokens: self.output_tokens,
            kv_bytes: self.kv_bytes,
            local: self.local,
            ttft_max_ms: self.ttft_max_ms,
            ttft_mean_ms: mean(self.ttft_sum_ms),
            itl_mean_ms: mean(self.itl_sum_ms),
            itl_max_ms: self.itl_max_ms,
        }
    }
}

impl History {
    /// The moment that is now.
    pub fn now(&mut self, now: Instant) -> &mut Sums {
        self.advance(now);
        let newest = self.moments.len() - 1;
        &mut self.moments[newest].1
    }

    /// All moments.
    pub fn moments(&mut self, now: Instant) -> Vec<v1::Moment> {
        self.advance(now);
        self.moments.iter().map(|(began, sums)| sums.moment(*began, now)).collect()
    }

    /// Adds the moments that passed since, and forgets those that are too old. A quiet hour is not walked through.
    fn advance(&mut self, now: Instant) {
        let newest = match self.moments.back() {
            Some((began, _)) if now - *began < SPAN => *began,
            _ => {
                self.moments.clear();
                self.moments.push_back((now, Sums::default()));
                now
            }
        };
        let mut next = newest + LENGTH;
        while next <= now {
            self.moments.push_back((next, Sums::default()));
            next += LENGTH;
        }
        while self.moments.front().is_some_and(|(began, _)| now - *began > SPAN) {
            self.moments.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_have_no_gaps_and_end_in_time() {
        let mut history = History::default();
        let start = Instant::now();
        for second in (0..2000).step_by(7) {
            let now = start + Duration::from_secs(second);
            history.now(now).failed += 1;
            let moments = history.moments(now);
            assert!(moments.len() <= 121, "{}", moments.len());
            for pair in moments.windows(2) {
                let end = pair[0].age_seconds - pair[1].age_seconds - pair[1].length_seconds;
                assert!(end.abs() < 1e-6, "{pair:?}");
            }
        }
        let later = start + Duration::from_secs(100_000);
        let moments = history.moments(later);
        assert_eq!((moments.len(), moments[0].failed), (1, 0));
    }
}
