//! Moves workers between the pools, one at a time: pure, but for its caller.

use std::time::{Duration, Instant};

use planner::{Pool, Staff, switch};
use proto::v1::WorkerStatus;

/// A worker that drains and loads its model again may be away for so long; then another may be told.
const MOST_WAIT: Duration = Duration::from_secs(600);

/// What was told last.
#[derive(Default)]
pub struct Switching {
    under_way: Option<(String, Pool, Instant)>,
}

impl Switching {
    /// The worker that should change its pool now, and where to.
    pub fn next(
        &mut self,
        sizes: [usize; 2],
        workers: &[WorkerStatus],
        now: Instant,
    ) -> Option<(String, Pool)> {
        if let Some((name, to, since)) = &self.under_way {
            let arrived = workers.iter().any(|w| w.worker == *name && w.state == "ready" && is_of(w, *to));
            if !arrived && now.duration_since(*since) < MOST_WAIT {
                return None;
            }
            self.under_way = None;
        }
        let to = switch(sizes, staff(workers))?;
        // The one with the least to move.
        let able = workers.iter().filter(|w| w.auto_role && w.state == "ready" && !is_of(w, to));
        let worker = able.min_by_key(|w| w.running + w.waiting)?;
        Some((worker.worker.clone(), to))
    }

    /// It was told.
    pub fn told(&mut self, worker: String, to: Pool, now: Instant) {
        self.under_way = Some((worker, to, now));
    }
}

fn is_of(worker: &WorkerStatus, pool: Pool) -> bool {
    worker.role == pool.name()
}

fn staff(workers: &[WorkerStatus]) -> Staff {
    let mut staff = Staff::default();
    for worker in workers.iter().filter(|w| w.state == "ready") {
        let pool = if is_of(worker, Pool::Prefill) { Pool::Prefill } else { Pool::Decode } as usize;
        staff.ready[pool] += 1;
        staff.movable[pool] += usize::from(worker.auto_role);
    }
    staff
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(name: &str, role: &str, running: u32, auto_role: bool) -> WorkerStatus {
        let (worker, role, state) = (name.into(), role.into(), "ready".into());
        WorkerStatus { worker, role, state, running, auto_role, ..WorkerStatus::default() }
    }

    #[test]
    fn one_at_a_time_and_the_idlest() {
        let (mut switching, start) = (Switching::default(), Instant::now());
        let mut workers = vec![
            worker("p", "prefill", 0, false),
            worker("d0", "decode", 0, false),
            worker("d1", "decode", 9, true),
            worker("d2", "decode", 3, true),
            worker("d3", "decode", 5, true),
        ];
        let next = switching.next([3, 2], &workers, start);
        assert_eq!(next, Some(("d2".to_owned(), Pool::Prefill)));
        switching.told("d2".into(), Pool::Prefill, start);
        let left = workers.remove(3);
        assert_eq!(switching.next([3, 2], &workers, start), None, "it is on its way");
        let late = switching.next([3, 1], &workers, start + MOST_WAIT);
        assert_eq!(late, Some(("d3".to_owned(), Pool::Prefill)));
        switching.told("d2".into(), Pool::Prefill, start);
        workers.push(WorkerStatus { role: "prefill".into(), ..left });
        assert_eq!(switching.next([3, 2], &workers, start), Some(("d3".to_owned(), Pool::Prefill)));
        assert_eq!(switching.next([2, 2], &workers, start), None);
    }
}
