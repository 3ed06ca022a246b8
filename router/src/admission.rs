//! Who may run now: a bounded number of requests, a bounded and fair queue behind them, and a hint to the rest.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::fair_queue::FairQueue;

/// What a shed request is told to wait before anything was measured, and the bounds of what it is told then.
const FIRST_GUESS: Duration = Duration::from_secs(1);
const SHORTEST_HINT: Duration = Duration::from_millis(50);
const LONGEST_HINT: Duration = Duration::from_secs(30);
/// Weight of the newest time between two ends.
const LEARN: f64 = 0.1;

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
    pace: Pace,
}

/// How quickly requests end while there is something to do.
#[derive(Default)]
struct Pace {
    last_end: Option<Instant>,
    between_ends: Option<Duration>,
}

impl Pace {
    fn end(&mut self, is_busy: bool) {
        let now = Instant::now();
        if let Some(last) = self.last_end {
            let new = now - last;
            self.between_ends =
                Some(self.between_ends.map_or(new, |old| old.mul_f64(1.0 - LEARN) + new.mul_f64(LEARN)));
        }
        // Nothing to do: what comes next says nothing about how quick we are.
        self.last_end = is_busy.then_some(now);
    }
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
    /// Of the client that names itself so; prompt and output tokens together, at most. A weight of two is worth two turns.
    pub fn new(client_key: &str, tokens: usize, weight: u32) -> Self {
        let tokens = tokens / weight.max(1) as usize;
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
    pub fn why(&self) -> &'static str {
        match self {
            Self::QueueFull => "the router's queue is full",
            Self::Timeout => "no place became free in time",
        }
    }
}

impl Admission {
    /// At most `max_running` requests at once and `max_waiting` behind them.
    pub fn new(max_running: usize, max_waiting: usize) -> Self {
        let max_running = max_running.max(1);
        let door = Door {
            running: 0,
            max_running,
            max_waiting,
            queue: FairQueue::default(),
            next: 0,
            pace: Pace::default(),
        };
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

    /// RESOURCE_EXHAUSTED with a hint when to try again: the time in which as many requests end as wait now, at the pace
    /// of the last ones. Spread by a quarter, so that those shed together do not come back together.
    pub fn shed(&self, why: &str) -> Status {
        let spread = rand::random_range(0.75..1.25);
        let hint = self.until_room().mul_f64(spread);
        Status::with_error_details(Code::ResourceExhausted, why, ErrorDetails::with_retry_info(Some(hint)))
    }

    fn until_room(&self) -> Duration {
        let door = self.door.lock();
        let ends = u32::try_from(door.queue.len()).unwrap_or(u32::MAX).max(1);
        let hint = door.pace.between_ends.map_or(FIRST_GUESS, |between| between.saturating_mul(ends));
        hint.clamp(SHORTEST_HINT, LONGEST_HINT)
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
        self.pace.end(self.running > 1 || !self.queue.is_empty());
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

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn claim(key: &str) -> Claim {
        Claim::new(key, 100, 1)
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
        assert_eq!(door.enter(claim("a"), LONG).await.err(), Some(Turned::QueueFull));
        drop(first);
        let second = second.await.unwrap().ok().unwrap();
        assert_eq!((door.running(), door.queued()), (1, 0));
        assert_eq!(door.enter(claim("a"), Duration::from_secs(1)).await.err(), Some(Turned::Timeout));
        assert_eq!((door.running(), door.queued()), (1, 0));
        drop(second);
        assert_eq!(door.running(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_hint_follows_the_pace_and_the_queue() {
        let door = Admission::new(2, 100);
        let hint = |door: &Admission| {
            let status = door.shed("full");
            assert_eq!(status.code(), Code::ResourceExhausted);
            status.get_details_retry_info().unwrap().retry_delay.unwrap()
        };
        let about = |expected: Duration| expected.mul_f64(0.75)..expected.mul_f64(1.25);
        assert!(about(FIRST_GUESS).contains(&hint(&door)));
        let mut places = Vec::new();
        for _ in 0..2 {
            places.push(door.enter(claim("a"), LONG).await.ok().unwrap());
        }
        let mut waiting: std::collections::VecDeque<_> = (0..100).map(|_| wait(&door, "a")).collect();
        tokio::task::yield_now().await;
        // One ends every 200 ms; after 20 of them 80 still wait, who need 16 s.
        for _ in 0..20 {
            tokio::time::advance(Duration::from_millis(200)).await;
            drop(places.remove(0));
            places.push(waiting.pop_front().unwrap().await.unwrap().ok().unwrap());
        }
        assert_eq!(door.queued(), 80);
        assert!(about(Duration::from_secs(16)).contains(&hint(&door)), "{:?}", hint(&door));
        // They become ten times as quick.
        for _ in 0..70 {
            tokio::time::advance(Duration::from_millis(20)).await;
            drop(places.remove(0));
            places.push(waiting.pop_front().unwrap().await.unwrap().ok().unwrap());
        }
        assert!(about(Duration::from_millis(200)).contains(&hint(&door)), "{:?}", hint(&door));
        // An idle hour is not taken for slowness.
        drop(places);
        for one in waiting {
            drop(one.await.unwrap().ok().unwrap());
        }
        tokio::time::advance(Duration::from_secs(3600)).await;
        drop(door.enter(claim("a"), LONG).await.ok().unwrap());
        assert!(hint(&door) < Duration::from_millis(100));
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
