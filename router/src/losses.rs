//! May a request try again? A pure value: what was lost, since when, and how often.
//!
//! Attempts that brought tokens are not held against a long answer: the bound is on attempts in a row that
//! brought nothing, and a wide one on all of them.

use std::time::Duration;

use tonic::Code;

/// Attempts in a row that may be lost without a new token.
const MAX_IN_VAIN: u32 = 6;
/// Attempts that may be lost altogether.
const MAX_LOST: u32 = 256;
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// What a request has lost so far.
#[derive(Debug, Default)]
pub struct Losses {
    workers: Vec<String>,
    in_vain: u32,
    total: u32,
    sent: usize,
}

impl Losses {
    /// Workers that failed this request since it last moved on; others are tried first.
    pub fn workers(&self) -> &[String] {
        &self.workers
    }

    /// Whether anything was lost yet.
    pub fn any(&self) -> bool {
        self.total > 0
    }

    /// An attempt on `worker` was lost with `sent` tokens at the client. The pause before the next try; None
    /// when there must be none.
    pub fn lose(&mut self, worker: Option<String>, sent: usize) -> Option<Duration> {
        if sent > self.sent {
            self.sent = sent;
            self.in_vain = 0;
            self.workers.clear();
        }
        self.in_vain += 1;
        self.total += 1;
        self.workers.extend(worker);
        if self.in_vain >= MAX_IN_VAIN || self.total >= MAX_LOST {
            return None;
        }
        // The first try elsewhere is at once; then workers get a moment to come back.
        Some(FIRST_PAUSE * ((1 << self.in_vain) / 2 - 1))
    }
}

/// Whether another attempt can help where one ended like this.
pub fn is_worth_retrying(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::Aborted
            | Code::DataLoss
            | Code::FailedPrecondition
            | Code::Internal
            | Code::Unknown
            | Code::Unimplemented
            | Code::Cancelled
            | Code::DeadlineExceeded
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_in_vain_are_bounded() {
        let mut losses = Losses::default();
        let pauses: Vec<_> = (0..6).map(|_| losses.lose(Some("a".into()), 0)).collect();
        assert_eq!(pauses[0], Some(Duration::ZERO));
        assert_eq!(pauses[4], Some(Duration::from_millis(300)));
        assert_eq!(pauses[5], None);
        assert_eq!(losses.workers().len(), 6);
    }

    #[test]
    fn progress_forgives_but_not_for_ever() {
        let mut losses = Losses::default();
        for sent in 1..256 {
            assert_eq!(losses.lose(Some("a".into()), sent), Some(Duration::ZERO));
            assert_eq!(losses.workers(), ["a"]);
        }
        assert_eq!(losses.lose(None, 256), None);
    }
}
