//! Who may run now: a bounded number of requests, a bounded and fair queue behind them, and a hint to the rest.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::fair_queue::FairQueue;

/// What a shed request is told to wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The router's door. Clones share.
#[derive(Clone)]
pub struct Admission {
    door: Arc<Mutex<Door>>,
    max_running: usize,
}

struct Door {
    running: usize,
    max_running: usize,
    max_waiting: usize,
    queue: FairQueue<Waiting>,
    next: u64,
}

struct Waiting {
    number: u64,
    /// Sent when a place is free; dropped when another client's request needs the room more.
    enter: oneshot::Sender<()>,
}

/// Whose request it is and how much work, for the queue.
#[derive(Debug, Clone, Copy)]
pub struct Claim {
    key: u64,
    tokens: usize,
}

impl Claim {
    /// Of the client that names itself so; prompt and output tokens together, at most.
    pub fn new(client_key: &str, tokens: usize) -> Self {
        let mut hasher = DefaultHasher::new();
        client_key.hash(&mut hasher);
        Self { key: hasher.finish(), tokens }
    }
}

/// Why a request was shed at the door.
#[derive(Debug, PartialEq, Eq)]
pub enum Turned {
    /// The queue was full.
    QueueFull,
    /// No place became free in time.
    Timeout,
}

impl Turned {
    /// For the client.
    pub fn status(&self) -> Status {
        match self {
            Self::QueueFull => shed("the router's queue is full"),
            Self::Timeout => shed("no place became free in time"),
        }
    }
}

impl Admission {
    /// At most `max_running` requests at once and `max_waiting` behind them.
    pub fn new(max_running: usize, max_waiting: usize) -> Self {
        let max_running = max_running.max(1);
        let door = Door { running: 0, max_running, max_waiting, queue: FairQueue::default(), next: 0 };
        Self { door: Arc::new(Mutex::new(door)), max_running }
    }

    /// Waits for a place, clients taking turns. Sheds at once when the queue is full, and after `patience`.
    pub async fn enter(&self, claim: Claim, patience: Duration) -> Result<Place, Turned> {
        let (enter, entered) = oneshot::channel();
        let number = {
            let mut door = self.door.lock();
            if door.running < door.max_running && door.queue.is_empty() {
                door.running += 1;
                return Ok(Place { door: Arc::clone(&self.door) });
            }
            door.make_room(claim)?;
            door.next += 1;
            let number = door.next;
            door.queue.push(claim.key, claim.tokens, Waiting { number, enter });
            number
        };
        let mut turn = Turn { door: &self.door, claim, number, entered: Some(entered) };
        let Some(entered) = turn.entered.as_mut() else { return Err(Turned::QueueFull) };
        let outcome = tokio::time::timeout(patience, entered).await;
        match outcome {
            Ok(Ok(())) => {
                turn.entered = None;
                Ok(Place { door: Arc::clone(&self.door) })
            }
            Ok(Err(_)) => Err(Turned::QueueFull),
            Err(_) => Err(Turned::Timeout),
        }
    }

    /// Requests in a place.
    pub fn running(&self) -> usize {
        self.door.lock().running.min(self.max_running)
    }

    /// Requests waiting for one.
    pub fn queued(&self) -> usize {
        self.door.lock().queue.len()
    }
}

impl Door {
    /// In a full queue the newest of the longest one gives way to a client that has fewer.
    fn make_room(&mut self, claim: Claim) -> Result<(), Turned> {
        if self.queue.len() < self.max_waiting {
            return Ok(());
        }
        if self.queue.len_of(claim.key) + 1 >= self.queue.longest() {
            return Err(Turned::QueueFull);
        }
        drop(self.queue.pop_longest());
        Ok(())
    }

    /// A place became free: the next in turn gets it. One that has gone meanwhile does not take it.
    fn leave(&mut self) {
        while let Some(next) = self.queue.pop() {
            if next.enter.send(()).is_ok() {
                return;
            }
        }
        self.running -= 1;
    }
}

/// The right to run. Dropping it lets the next one in.
pub struct Place {
    door: Arc<Mutex<Door>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.door.lock().leave();
    }
}

/// One that waits; leaves the queue when dropped, and gives back a place that it was given too late.
struct Turn<'a> {
    door: &'a Mutex<Door>,
    claim: Claim,
    number: u64,
    entered: Option<oneshot::Receiver<()>>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let Some(mut entered) = self.entered.take() else { return };
        let mut door = self.door.lock();
        let waited = door.queue.remove(self.claim.key, |waiting| waiting.number == self.number);
        if waited.is_none() && entered.try_recv().is_ok() {
            door.leave();
        }
    }
}

/// RESOURCE_EXHAUSTED with a hint when to try again.
pub fn shed(why: &str) -> Status {
    let retry = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
    Status::with_error_details(Code::ResourceExhausted, why, retry)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn claim(key: &str) -> Claim {
        Claim::new(key, 100)
    }

    fn wait(door: &Admission, key: &'static str) -> tokio::task::JoinHandle<Result<Place, Turned>> {
        let door = door.clone();
        tokio::spawn(async move { door.enter(claim(key), LONG).await })
    }

    #[tokio::test(start_paused = true)]
    async fn bounded_running_bounded_waiting() {
        let door = Admission::new(1, 1);
        let first = door.enter(claim("a"), LONG).await.ok().unwrap();
        let second = wait(&door, "a");
        tokio::task::yield_now().await;
        let third = door.enter(claim("a"), LONG).await.err().unwrap().status();
        assert_eq!(third.code(), Code::ResourceExhausted);
        assert!(third.get_details_retry_info().is_some());
        drop(first);
        let second = second.await.unwrap().ok().unwrap();
        assert_eq!((door.running(), door.queued()), (1, 0));
        assert_eq!(door.enter(claim("a"), Duration::from_secs(1)).await.err(), Some(Turned::Timeout));
        assert_eq!((door.running(), door.queued()), (1, 0));
        drop(second);
        assert_eq!(door.running(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_one_client_gives_way_to_another() {
        let door = Admission::new(1, 4);
        let place = door.enter(claim("flood"), LONG).await.ok().unwrap();
        let flood: Vec<_> = (0..4).map(|_| wait(&door, "flood")).collect();
        tokio::task::yield_now().await;
        assert_eq!(door.enter(claim("flood"), LONG).await.err(), Some(Turned::QueueFull));
        let other = wait(&door, "other");
        tokio::task::yield_now().await;
        assert_eq!(door.queued(), 4);
        drop(place);
        tokio::task::yield_now().await;
        let mut turned = 0;
        for request in flood {
            match request.await.unwrap() {
                Ok(place) => drop(place),
                Err(why) => turned += u32::from(why == Turned::QueueFull),
            }
        }
        assert_eq!(turned, 1);
        drop(other.await.unwrap().ok().unwrap());
        assert_eq!((door.running(), door.queued()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_the_queue_takes_nothing_along() {
        let door = Admission::new(1, 8);
        let place = door.enter(claim("a"), LONG).await.ok().unwrap();
        let gone: Vec<_> = (0..3).map(|_| wait(&door, "a")).collect();
        tokio::task::yield_now().await;
        // One is given the place and dropped before it can look.
        drop(place);
        gone.iter().for_each(tokio::task::JoinHandle::abort);
        for one in gone {
            let _ = one.await;
        }
        assert_eq!((door.running(), door.queued()), (0, 0));
    }
}
