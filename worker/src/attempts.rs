//! One running attempt per request id: duplicates are refused, a newer attempt supersedes the older.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// The attempts that run on this worker.
#[derive(Clone, Default)]
pub struct Attempts {
    running: Arc<Mutex<HashMap<String, (u32, CancellationToken)>>>,
    ended: Arc<Notify>,
}

/// The right to run one attempt. Dropping it ends the entry.
pub struct Running {
    attempts: Attempts,
    id: String,
    attempt: u32,
    superseded: CancellationToken,
}

impl Attempts {
    /// Starts an attempt. An equal or newer running one refuses it; an older one is cancelled.
    pub fn start(&self, id: &str, attempt: u32) -> Result<Running, Status> {
        let mut running = self.running.lock();
        if let Some((other, cancel)) = running.get(id) {
            if *other == attempt {
                return Err(Status::already_exists(format!("request {id} already runs here")));
            }
            if *other > attempt {
                return Err(Status::aborted(format!(
                    "request {id}: attempt {attempt} is superseded by attempt {other}"
                )));
            }
            cancel.cancel();
        }
        let superseded = CancellationToken::new();
        running.insert(id.to_owned(), (attempt, superseded.clone()));
        Ok(Running { attempts: self.clone(), id: id.to_owned(), attempt, superseded })
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
    /// Resolves when a newer attempt took over.
    pub async fn superseded(&self) {
        self.superseded.cancelled().await;
    }

    /// Whether a newer attempt took over.
    pub fn is_superseded(&self) -> bool {
        self.superseded.is_cancelled()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut running = self.attempts.running.lock();
        if running.get(&self.id).is_some_and(|(attempt, _)| *attempt == self.attempt) {
            running.remove(&self.id);
        }
        drop(running);
        self.attempts.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn newer_supersedes_and_older_is_refused() {
        let attempts = Attempts::default();
        let first = attempts.start("a", 1).unwrap();
        assert_eq!(attempts.start("a", 1).err().unwrap().code(), tonic::Code::AlreadyExists);
        let second = attempts.start("a", 2).unwrap();
        first.superseded().await;
        drop(first);
        assert_eq!(attempts.start("a", 1).err().unwrap().code(), tonic::Code::Aborted);
        drop(second);
        assert!(attempts.is_empty());
        attempts.start("a", 1).unwrap();
    }
}
