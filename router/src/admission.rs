//! Who may run now: a bounded number of requests, a bounded queue behind them, and a hint to the rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// What a shed request is told to wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The router's door.
#[derive(Clone)]
pub struct Admission {
    running: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    max_running: usize,
    max_waiting: usize,
}

/// Why a request was shed at the door.
#[derive(Debug)]
pub enum Turned {
    /// The queue was full.
    QueueFull,
    /// No place became free in time.
    Timeout,
    /// The router stops.
    Stopping,
}

impl Turned {
    /// For the client.
    pub fn status(&self) -> Status {
        match self {
            Self::QueueFull => shed("the router's queue is full"),
            Self::Timeout => shed("no place became free in time"),
            Self::Stopping => Status::unavailable("the router is stopping"),
        }
    }
}

impl Admission {
    /// At most `max_running` requests at once and `max_waiting` behind them.
    pub fn new(max_running: usize, max_waiting: usize) -> Self {
        Self {
            running: Arc::new(Semaphore::new(max_running)),
            waiting: Arc::default(),
            max_running,
            max_waiting,
        }
    }

    /// Waits for a place, first come first served. Sheds at once when the queue is full, and after `patience`.
    pub async fn enter(&self, patience: Duration) -> Result<OwnedSemaphorePermit, Turned> {
        if let Ok(permit) = Arc::clone(&self.running).try_acquire_owned() {
            return Ok(permit);
        }
        let queued = Queued::join(&self.waiting);
        if queued.position > self.max_waiting {
            return Err(Turned::QueueFull);
        }
        match tokio::time::timeout(patience, Arc::clone(&self.running).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(Turned::Stopping),
            Err(_) => Err(Turned::Timeout),
        }
    }

    /// Requests in a place.
    pub fn running(&self) -> usize {
        self.max_running - self.running.available_permits()
    }

    /// Requests waiting for one.
    pub fn queued(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// RESOURCE_EXHAUSTED with a hint when to try again.
pub fn shed(why: &str) -> Status {
    let retry = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
    Status::with_error_details(Code::ResourceExhausted, why, retry)
}

struct Queued<'a> {
    waiting: &'a AtomicUsize,
    position: usize,
}

impl<'a> Queued<'a> {
    fn join(waiting: &'a AtomicUsize) -> Self {
        Self { waiting, position: waiting.fetch_add(1, Ordering::Relaxed) + 1 }
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bounded_running_bounded_waiting() {
        let door = Admission::new(1, 1);
        let first = door.enter(Duration::from_secs(1)).await.unwrap();
        let second = tokio::spawn({
            let door = door.clone();
            async move { door.enter(Duration::from_secs(60)).await.map(drop) }
        });
        tokio::task::yield_now().await;
        let third = door.enter(Duration::from_secs(60)).await.unwrap_err().status();
        assert_eq!(third.code(), Code::ResourceExhausted);
        assert!(third.get_details_retry_info().is_some());
        drop(first);
        second.await.unwrap().unwrap();
        let _again = door.enter(Duration::from_secs(1)).await.unwrap();
        let late = door.enter(Duration::from_secs(1)).await.unwrap_err().status();
        assert!(late.message().contains("in time"), "{late}");
    }
}
