//! Is the engine making steps while there is work? Health is that, not an open port.
//!
//! The engine's loop says when it begins to work, when it has made a step and when it waits for work. A watchdog on
//! another thread looks from time to time; what it concludes is a pure value of what it saw.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cluster::Load;
use tokio::sync::watch;

use crate::attempts::Attempts;

/// Between two looks of the watchdog.
const LOOK: Duration = Duration::from_millis(100);
const IDLE: u64 = u64::MAX;

/// The loop's side. Clones share.
#[derive(Clone)]
pub struct Progress {
    born: Instant,
    /// Milliseconds from `born` to the last step, or [`IDLE`].
    last_step: Arc<AtomicU64>,
}

impl Default for Progress {
    fn default() -> Self {
        Self { born: Instant::now(), last_step: Arc::new(AtomicU64::new(IDLE)) }
    }
}

impl Progress {
    /// There is work from now on, or a step was made.
    pub fn step(&self) {
        let now = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(IDLE - 1);
        self.last_step.store(now, Ordering::Relaxed);
    }

    /// There is no work.
    pub fn idle(&self) {
        self.last_step.store(IDLE, Ordering::Relaxed);
    }

    /// How long there has been work without a step.
    fn stalled_for(&self) -> Duration {
        match self.last_step.load(Ordering::Relaxed) {
            IDLE => Duration::ZERO,
            at => self.born.elapsed().saturating_sub(Duration::from_millis(at)),
        }
    }
}

/// What a look of the watchdog means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Fine,
    /// Work, but no step for that long.
    Stuck(Duration),
    /// The whole process stood still for that long: others have given it up, and it must not go on as if not.
    Paused(Duration),
}

fn judge(since_look: Duration, stalled: Duration, patience: Duration, lease: Duration) -> Verdict {
    if since_look > lease {
        Verdict::Paused(since_look)
    } else if stalled > patience {
        Verdict::Stuck(stalled)
    } else {
        Verdict::Fine
    }
}

/// Watches a worker for as long as it lives: a stuck engine or a pause fails what runs, so that it goes on
/// elsewhere, and a stuck engine takes the worker out of placement until it makes steps again.
pub(crate) async fn watch(
    progress: Progress,
    patience: Duration,
    lease: Duration,
    load: Arc<watch::Sender<Load>>,
    attempts: Attempts,
) {
    let mut looked = Instant::now();
    loop {
        tokio::time::sleep(LOOK).await;
        let verdict = judge(looked.elapsed(), progress.stalled_for(), patience, lease);
        looked = Instant::now();
        match verdict {
            Verdict::Fine => {}
            Verdict::Stuck(stalled) if !load.borrow().stuck => {
                tracing::error!(?stalled, "the engine has work and makes no step; its requests go elsewhere");
                attempts.fail_all(&format!("engine: no step for {} ms", stalled.as_millis()));
            }
            Verdict::Stuck(_) => {}
            Verdict::Paused(pause) => {
                tracing::warn!(?pause, "the process stood still; what ran here goes elsewhere");
                attempts.fail_all(&format!("the worker stood still for {} ms", pause.as_millis()));
            }
        }
        let stuck = matches!(verdict, Verdict::Stuck(_));
        load.send_if_modified(|load| std::mem::replace(&mut load.stuck, stuck) != stuck);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_work_without_steps_is_stuck() {
        let s = Duration::from_secs;
        assert_eq!(judge(s(0), s(9), s(10), s(5)), Verdict::Fine);
        assert_eq!(judge(s(0), s(11), s(10), s(5)), Verdict::Stuck(s(11)));
        assert_eq!(judge(s(6), s(11), s(10), s(5)), Verdict::Paused(s(6)));
        let progress = Progress::default();
        assert_eq!(progress.stalled_for(), Duration::ZERO);
        progress.step();
        std::thread::sleep(Duration::from_millis(5));
        assert!(progress.stalled_for() > Duration::ZERO);
        progress.idle();
        assert_eq!(progress.stalled_for(), Duration::ZERO);
    }
}
