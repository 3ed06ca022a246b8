//! How much a key may use, and how much of that is left: two buckets that fill with time, and a count. Pure.

use std::time::{Duration, Instant};

/// What a key may use; nothing said is no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may begin.
    pub requests_per_minute: Option<u32>,
    /// Prompt and output tokens.
    pub tokens_per_minute: Option<u32>,
    /// Requests at once.
    pub concurrent: Option<u32>,
}

/// What a request ran into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Over {
    /// Which limit.
    pub limit: &'static str,
    /// When to come back.
    pub after: Duration,
}

/// A minute's worth, refilled all the time. Below zero while what was used is more than what there was.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    level: f64,
    at: Instant,
}

impl Bucket {
    fn refill(&mut self, per_minute: f64, now: Instant) {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * per_minute / 60.0;
        self.level = (self.level + gained).min(per_minute);
        self.at = now;
    }

    /// Until it holds that much.
    fn wait(&self, much: f64, per_minute: f64) -> Duration {
        Duration::from_secs_f64(((much - self.level) * 60.0 / per_minute).clamp(0.0, 3600.0))
    }
}

/// What a client has used.
#[derive(Debug, Default)]
pub struct Usage {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    running: u32,
}

/// How long a client that runs as many requests as it may is told to wait.
const A_MOMENT: Duration = Duration::from_secs(1);

impl Usage {
    /// Counts one request in, or says what it ran into and counts nothing.
    pub fn begin(&mut self, limits: &Limits, now: Instant) -> Result<(), Over> {
        if limits.concurrent.is_some_and(|most| self.running >= most) {
            return Err(Over { limit: "concurrent", after: A_MOMENT });
        }
        // Tokens are paid after they were used, so a request may begin while anything is left.
        if let Some(per_minute) = limits.tokens_per_minute.map(f64::from) {
            let bucket = Self::full(&mut self.tokens, per_minute, now);
            if bucket.level <= 0.0 {
                let after = bucket.wait(1.0, per_minute);
                return Err(Over { limit: "tokens_per_minute", after });
            }
        }
        if let Some(per_minute) = limits.requests_per_minute.map(f64::from) {
            let bucket = Self::full(&mut self.requests, per_minute, now);
            if bucket.level < 1.0 {
                let after = bucket.wait(1.0, per_minute);
                return Err(Over { limit: "requests_per_minute", after });
            }
            bucket.level -= 1.0;
        }
        self.running += 1;
        Ok(())
    }

    /// So many tokens were used.
    pub fn spend(&mut self, limits: &Limits, tokens: usize, now: Instant) {
        if let Some(per_minute) = limits.tokens_per_minute.map(f64::from) {
            Self::full(&mut self.tokens, per_minute, now).level -= tokens as f64;
        }
    }

    /// A request ended.
    pub fn end(&mut self) {
        self.running = self.running.saturating_sub(1);
    }

    fn full(bucket: &mut Option<Bucket>, per_minute: f64, now: Instant) -> &mut Bucket {
        let bucket = bucket.get_or_insert(Bucket { level: per_minute, at: now });
        bucket.refill(per_minute, now);
        bucket
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_come_back_with_time() {
        let limits = Limits { requests_per_minute: Some(2), ..Limits::default() };
        let (mut usage, start) = (Usage::default(), Instant::now());
        assert!(usage.begin(&limits, start).is_ok() && usage.begin(&limits, start).is_ok());
        let over = usage.begin(&limits, start).unwrap_err();
        assert_eq!((over.limit, over.after.as_secs()), ("requests_per_minute", 30));
        assert!(usage.begin(&limits, start + Duration::from_secs(29)).is_err());
        assert!(usage.begin(&limits, start + Duration::from_secs(31)).is_ok());
    }

    #[test]
    fn tokens_are_paid_after_and_a_debt_is_waited_for() {
        let limits = Limits { tokens_per_minute: Some(600), ..Limits::default() };
        let (mut usage, start) = (Usage::default(), Instant::now());
        usage.begin(&limits, start).unwrap();
        usage.spend(&limits, 900, start);
        let over = usage.begin(&limits, start).unwrap_err();
        assert_eq!((over.limit, over.after.as_secs()), ("tokens_per_minute", 30));
        assert!(usage.begin(&limits, start + Duration::from_secs(31)).is_ok());
    }

    #[test]
    fn as_many_at_once_as_may_be() {
        let limits = Limits { concurrent: Some(1), ..Limits::default() };
        let (mut usage, now) = (Usage::default(), Instant::now());
        usage.begin(&limits, now).unwrap();
        assert_eq!(usage.begin(&limits, now).unwrap_err().limit, "concurrent");
        usage.end();
        assert!(usage.begin(&limits, now).is_ok());
    }

    proptest! {
        /// Over any minute no more requests begin than a full bucket and a minute's refill allow.
        #[test]
        fn never_more_than_allowed(per_minute in 1u32..100, gaps in prop::collection::vec(0u64..2000, 1..300)) {
            let limits = Limits { requests_per_minute: Some(per_minute), ..Limits::default() };
            let (mut usage, mut now, mut begun) = (Usage::default(), Instant::now(), Vec::new());
            for gap in gaps {
                now += Duration::from_millis(gap);
                match usage.begin(&limits, now) {
                    Ok(()) => begun.push(now),
                    Err(over) => prop_assert!(over.after <= Duration::from_secs(61)),
                }
            }
            for (at, first) in begun.iter().enumerate() {
                let inside = begun[at..].iter().filter(|t| **t - *first < Duration::from_secs(60)).count();
                prop_assert!(inside <= 2 * per_minute as usize + 1, "{inside} in a minute, {per_minute} allowed");
            }
        }
    }
}
