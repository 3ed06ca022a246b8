//! A few threads that share the loops of one forward pass.
//!
//! A pass is hundreds of parallel loops of microseconds, so helpers spin briefly between them and park when
//! nothing comes. A helper that is late (parked, or its core taken) is not waited for: the caller works
//! through the whole loop itself and waits only for helpers that are inside it.
//!
//! ```text
//! state: epoch << 32 | OPEN | helpers inside      caller: open → work → close → wait until nobody is inside
//! ```

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;
/// Spins of a helper before it parks: some tens of microseconds.
const SPINS_BEFORE_PARK: u32 = 4_000;
/// Spins of the caller before it gives its core away while it waits.
const SPINS_BEFORE_YIELD: u32 = 2_000;

/// One parallel loop: `body(i)` for every `i` below `count`.
#[derive(Clone, Copy)]
struct Job {
    body: *const (dyn Fn(usize) + Sync),
    count: usize,
}

struct Shared {
    state: AtomicU64,
    next: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    parked: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written only by the caller while the loop is closed and nobody is inside, and read only by
// helpers that entered after it was opened (acquire on `state`); the body behind the pointer is `Sync`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// The caller's thread and its helpers.
pub(crate) struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

impl Team {
    /// A team of `threads`, the caller included.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            parked: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut team = Self { shared, helpers: Vec::new() };
        for index in 1..threads {
            let shared = Arc::clone(&team.shared);
            let builder = std::thread::Builder::new().name(format!("engine-{index}"));
            team.helpers.push(builder.spawn(move || shared.help())?);
        }
        Ok(team)
    }

    /// Threads, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `body(i)` once for every `i` in `0..count`, in any order, on any of the threads. Takes `&mut`
    /// so that loops cannot nest.
    pub(crate) fn run(&mut self, count: usize, body: &(dyn Fn(usize) + Sync)) {
        if self.helpers.is_empty() || count <= 1 {
            (0..count).for_each(body);
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. `run` does not return, nor unwind, before the loop is closed
        // and no helper is inside, so no helper uses `body` after this borrow.
        let body =
            unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(body) };
        // SAFETY: the loop is closed and nobody is inside (see `close`), so nobody reads the job now.
        unsafe { *shared.job.get() = Some(Job { body, count }) };
        shared.next.store(0, Ordering::Relaxed);
        let epoch = (shared.state.load(Ordering::Relaxed) >> 32) + 1;
        // SeqCst pairs with the helpers' announcement of parking: one of the two sees the other.
        shared.state.store(epoch << 32 | OPEN, Ordering::SeqCst);
        if shared.parked.load(Ordering::SeqCst) > 0 {
            let _guard = shared.lock.lock();
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.work(Job { body, count })));
        shared.close();
        if let Err(panic) = own {
            std::panic::resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a helper thread panicked");
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _guard = self.shared.lock.lock();
            self.shared.wake.notify_all();
        }
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

impl Shared {
    fn work(&self, job: Job) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= job.count {
                return;
            }
            // SAFETY: the caller's borrow lives until nobody is inside the loop, and we are.
            unsafe { (*job.body)(index) };
        }
    }

    /// No more helpers in; wait for those inside.
    fn close(&self) {
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while self.state.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }

    fn help(&self) {
        let mut seen = 0;
        loop {
            let Some(state) = self.await_open(seen) else {
                return;
            };
            seen = state >> 32;
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                // Another helper came in, or the loop closed: look again, it may still be open.
                seen -= 1;
                continue;
            }
            // SAFETY: we are inside an open loop: the job was written before it opened and stays until we
            // leave.
            if let Some(job) = unsafe { *self.job.get() }
                && catch_unwind(AssertUnwindSafe(|| self.work(job))).is_err()
            {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// The state of an open loop later than `seen`; `None` to stop.
    fn await_open(&self, seen: u64) -> Option<u64> {
        let fresh = |state: u64| state & OPEN != 0 && state >> 32 > seen;
        for _ in 0..SPINS_BEFORE_PARK {
            let state = self.state.load(Ordering::Acquire);
            if fresh(state) {
                return Some(state);
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.lock.lock();
        self.parked.fetch_add(1, Ordering::SeqCst);
        let found = loop {
            let state = self.state.load(Ordering::SeqCst);
            if fresh(state) {
                break Some(state);
            }
            if self.stop.load(Ordering::SeqCst) {
                break None;
            }
            self.wake.wait(&mut guard);
        };
        self.parked.fetch_sub(1, Ordering::SeqCst);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_runs_once() {
        let mut team = Team::new(4).unwrap();
        for round in 0..2000 {
            let count = round % 37;
            let hits: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            team.run(count, &|i| {
                hits[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
            if round % 500 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(20)); // let them park
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let mut team = Team::new(2).unwrap();
        let broken = catch_unwind(AssertUnwindSafe(|| team.run(100, &|i| assert_ne!(i, 57))));
        assert!(broken.is_err());
        let sum = AtomicUsize::new(0);
        team.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
