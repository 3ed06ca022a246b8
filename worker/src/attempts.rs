//! One running attempt per request: duplicates are refused, a newer attempt supersedes the older.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::request::Key;

/// The attempts that run on this worker.
#[derive(Clone, Default)]
pub struct Attempts {
    running: Arc<Mutex<Table>>,
    ended: Arc<Notify>,
}

/// Running attempts by request.
type Table = HashMap<Key, (u32, Arc<Ending>)>;

/// The right to run one attempt. Dropping it ends the entry.
pub struct Running {
    attempts: Attempts,
    key: Key,
    attempt: u32,
    ending: Arc<Ending>,
}

/// How an attempt ends before its time.
#[derive(Default)]
struct Ending {
    ended: CancellationToken,
    why: OnceLock<Status>,
}

impl Ending {
    fn end(&self, why: Status) {
        let _ = self.why.set(why);
        self.ended.cancel();
    }
}

/// Watches an attempt without keeping it running.
pub struct Observer(Arc<Ending>);

impl Observer {
    /// Why the attempt was ended from outside; None when it ended by itself.
    pub async fn ended(self) -> Option<Status> {
        self.0.ended.cancelled().await;
        self.0.why.get().cloned()
    }
}

impl Attempts {
    /// Starts an attempt. An equal or newer running one refuses it; an older one is cancelled.
    pub fn start(&self, key: &Key, attempt: u32) -> Result<Running, Status> {
        let mut running = self.running.lock();
        if let Some((other, ending)) = running.get(key) {
            if *other == attempt {
                return Err(Status::already_exists(format!("request {key} already runs here")));
            }
            if *other > attempt {
                return Err(Status::aborted(format!(
                    "request {key}: attempt {attempt} is superseded by attempt {other}"
                )));
            }
            ending.end(Status::aborted("a newer attempt took over"));
        }
        let ending = Arc::<Ending>::default();
        running.insert(key.clone(), (attempt, Arc::clone(&ending)));
        Ok(Running { attempts: self.clone(), key: key.clone(), attempt, ending })
    }

    /// Ends all that run: UNAVAILABLE, so that they go on elsewhere.
    pub fn fail_all(&self, why: &str) {
        for (_, ending) in self.running.lock().values() {
            ending.end(Status::unavailable(why));
        }
    }

    /// How many run.
    pub fn len(&self) -> usize {
        self.running.lock().len()
    }

    /// Resolves when none runs.
    pub async fn all_ended(&self) {
        loop {
            let ended = self.ended.notified();
            if self.is_empty() {
                return;
            }
            ended.await;
        }
    }

    /// Whether none runs.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Running {
    /// Resolves when the attempt must end: a newer one took over, or this worker cannot go on.
    pub async fn ended(&self) -> Status {
        self.ending.ended.cancelled().await;
        self.must_end().unwrap_or_else(|| Status::aborted("ended"))
    }

    /// Why the attempt must end, if it must.
    pub fn must_end(&self) -> Option<Status> {
        self.ending.why.get().cloned()
    }

    /// For those who wait for its end without keeping it running.
    pub fn observer(&self) -> Observer {
        Observer(Arc::clone(&self.ending))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut running = self.attempts.running.lock();
        if running.get(&self.key).is_some_and(|(attempt, _)| *attempt == self.attempt) {
            running.remove(&self.key);
        }
        drop(running);
        self.ending.ended.cancel();
        self.attempts.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str) -> Key {
        Key::new("router", id)
    }

    #[tokio::test]
    async fn newer_supersedes_and_older_is_refused() {
        let attempts = Attempts::default();
        let first = attempts.start(&key("a"), 1).unwrap();
        assert_eq!(attempts.start(&key("a"), 1).err().unwrap().code(), tonic::Code::AlreadyExists);
        let second = attempts.start(&key("a"), 2).unwrap();
        assert_eq!(first.ended().await.code(), tonic::Code::Aborted);
        drop(first);
        assert_eq!(attempts.start(&key("a"), 1).err().unwrap().code(), tonic::Code::Aborted);
        drop(second);
        assert!(attempts.is_empty());
        // Another router's request of the same id is another request.
        let other = attempts.start(&Key::new("other", "a"), 1).unwrap();
        let again = attempts.start(&key("a"), 1).unwrap();
        let observer = again.observer();
        attempts.fail_all("stuck");
        assert_eq!(observer.ended().await.unwrap().message(), "stuck");
        assert_eq!(other.ended().await.message(), "stuck");
        let by_itself = attempts.start(&key("b"), 1).unwrap();
        let observer = by_itself.observer();
        drop(by_itself);
        assert!(observer.ended().await.is_none());
    }
}
