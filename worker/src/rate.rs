//! How fast an engine works: tokens per second, forgetting slowly.

use std::time::Duration;

/// Weight of the newest step per second of work.
const FORGET_PER_SECOND: f64 = 0.3;

/// Tokens per second of busy time, exponentially weighted.
#[derive(Debug, Default, Clone)]
pub struct Rate {
    tokens: f64,
    seconds: f64,
}

impl Rate {
    /// One step took `busy` for `tokens` tokens.
    pub fn add(&mut self, tokens: usize, busy: Duration) {
        let keep = (-FORGET_PER_SECOND * busy.as_secs_f64()).exp();
        self.tokens = self.tokens * keep + tokens as f64;
        self.seconds = self.seconds * keep + busy.as_secs_f64();
    }

    /// 0 before the first step.
    pub fn tokens_per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens / self.seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_a_change_of_speed() {
        let mut rate = Rate::default();
        assert_eq!(rate.tokens_per_second(), 0.0);
        for _ in 0..100 {
            rate.add(100, Duration::from_millis(100));
        }
        assert!((rate.tokens_per_second() - 1000.0).abs() < 1.0);
        for _ in 0..200 {
            rate.add(50, Duration::from_millis(100));
        }
        assert!((rate.tokens_per_second() - 500.0).abs() < 10.0);
    }
}
