//! What a landing's owner and all connections share about it: the state, and what its transitions demand.

use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use crate::Identity;
use crate::error::{LandingError, Refusal};
use crate::fence::Fence;
use crate::landing_state::{LandingEnd, LandingPhase, LandingState, Settled};
use crate::receiver::ReceiverShared;
use crate::ticket::Secret;
use crate::transport::{Side, Transport, Used};

/// What a connection that serves a landing is told from elsewhere.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Notice {
    pub(crate) transfer: u128,
    /// Why it is over; nothing when keys are to be taken back, or a commit can be answered.
    pub(crate) refusal: Option<Refusal>,
}

/// What shall become of a key that was given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    /// The transfer goes on.
    Keep,
    /// All is verified and committed.
    TakeBack,
    /// The landing is over while writes may be under way.
    Revoke,
}

/// What an owner that looks at its landing finds.
pub(crate) enum Poll {
    Pending(Instant),
    Failed(LandingError),
    Done(Parts),
}

/// What a committed landing yields.
pub(crate) struct Parts {
    pub(crate) hold: Box<dyn Any + Send>,
    pub(crate) payload: Bytes,
    pub(crate) refetched: u64,
    pub(crate) checksums: Vec<u32>,
    pub(crate) on_device: Vec<bool>,
}

/// A cell whose bytes are all there.
pub(crate) struct Checked {
    /// Its place in the frame, below 64.
    pub(crate) at: usize,
    pub(crate) cell: usize,
    /// What the producer says.
    pub(crate) checksum: u32,
    /// Whether what is in memory agrees.
    pub(crate) good: bool,
}

pub(crate) struct LandingShared {
    pub(crate) facts: LandingFacts,
    receiver: Weak<ReceiverShared>,
    /// The ways its cells came.
    pub(crate) used: Used,
    inner: Mutex<Inner>,
    changed: Notify,
}

impl std::ops::Deref for LandingShared {
    type Target = LandingFacts;

    fn deref(&self) -> &LandingFacts {
        &self.facts
    }
}

impl std::fmt::Debug for LandingShared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Landing")
            .field("transfer", &self.transfer)
            .field("cells", &self.cells)
            .finish_non_exhaustive()
    }
}

struct Inner {
    state: LandingState,
    hold: Option<Box<dyn Any + Send>>,
    released: bool,
    payload: Option<Bytes>,
    reason: String,
    sender: Option<Identity>,
    progress: Instant,
    /// By cell, once it is verified.
    checksums: Vec<u32>,
    /// By cell, whether it was verified on the device.
    on_device: Vec<bool>,
    connections: Vec<mpsc::Sender<Notice>>,
}

/// The fixed facts of a landing.
pub(crate) struct LandingFacts {
    pub(crate) transfer: u128,
    pub(crate) secret: Secret,
    pub(crate) generation: u64,
    pub(crate) attempt: u32,
    /// The only worker that may write, if it is known.
    pub(crate) meant_for: Option<String>,
    pub(crate) slots: Vec<u32>,
    pub(crate) cells: usize,
    pub(crate) cell_bytes: usize,
    pub(crate) deadline: Instant,
    pub(crate) progress_timeout: Duration,
}

impl LandingFacts {
    /// What a writer must show, in this life of the receiver.
    pub(crate) fn fence(&self, incarnation: u64) -> Fence {
        Fence { incarnation, generation: self.generation, attempt: self.attempt }
    }
}

impl LandingShared {
    pub(crate) fn new(
        facts: LandingFacts,
        hold: Box<dyn Any + Send>,
        receiver: Weak<ReceiverShared>,
    ) -> Self {
        let inner = Inner {
            state: LandingState::new(facts.cells),
            hold: Some(hold),
            released: false,
            payload: None,
            reason: String::new(),
            sender: None,
            progress: Instant::now(),
            checksums: vec![0; facts.cells],
            on_device: vec![false; facts.cells],
            connections: Vec::new(),
        };
        Self { facts, receiver, used: Used::default(), inner: Mutex::new(inner), changed: Notify::new() }
    }

    /// Applies an event to the state and does what its transition demands, outside the lock.
    fn update<R>(&self, event: impl FnOnce(&mut Inner) -> R) -> R {
        let mut inner = self.inner.lock();
        let before = inner.state.phase();
        let result = event(&mut inner);
        let after = inner.state.phase();
        if before == after {
            return result;
        }
        let over =
            inner.state.end().filter(|_| matches!(before, LandingPhase::Reserved | LandingPhase::Receiving));
        let told = if over.is_some() { std::mem::take(&mut inner.connections) } else { Vec::new() };
        let hold = if after == LandingPhase::Void { inner.hold.take() } else { None };
        let end = inner.state.end();
        if after == LandingPhase::Committed && inner.connections.len() > 1 {
            // The commit may wait on another connection than the one that brought the last cell.
            self.wake(&inner);
        }
        drop(inner);
        for connection in told {
            if let Some(end) = over {
                // A full or closed queue: the sender learns at its next frame.
                let _ = connection.try_send(Notice { transfer: self.transfer, refusal: Some(end.refusal()) });
            }
        }
        if let Some(receiver) = self.receiver.upgrade()
            && matches!(after, LandingPhase::Void | LandingPhase::Committed)
        {
            receiver.finished(self.transfer, end);
        }
        if after == LandingPhase::Void {
            self.release(hold);
        }
        self.changed.notify_one();
        result
    }

    fn release(&self, hold: Option<Box<dyn Any + Send>>) {
        drop(hold);
        self.inner.lock().released = true;
        self.changed.notify_one();
    }

    /// Waits until something changed. For one waiter, the owner.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Waits until the hold was yielded or dropped.
    pub(crate) async fn released(&self) {
        while !self.inner.lock().released {
            self.changed.notified().await;
        }
    }

    /// Drops what landed but was never taken.
    pub(crate) fn discard(&self) {
        let mut inner = self.inner.lock();
        if inner.state.phase() == LandingPhase::Committed && !inner.released {
            let hold = inner.hold.take();
            drop(inner);
            self.release(hold);
        }
    }

    pub(crate) fn poll(&self, now: Instant) -> Poll {
        self.check_time(now);
        let mut inner = self.inner.lock();
        match inner.state.phase() {
            LandingPhase::Reserved => Poll::Pending(self.deadline),
            LandingPhase::Receiving => {
                Poll::Pending(self.deadline.min(inner.progress + self.progress_timeout))
            }
            LandingPhase::Committed => match inner.hold.take() {
                Some(hold) => {
                    let payload = inner.payload.take().unwrap_or_default();
                    let checksums = std::mem::take(&mut inner.checksums);
                    let on_device = std::mem::take(&mut inner.on_device);
                    let refetched = inner.state.refetched();
                    Poll::Done(Parts { hold, payload, refetched, checksums, on_device })
                }
                None => Poll::Failed(LandingError::Revoked),
            },
            LandingPhase::Revoking | LandingPhase::Void => {
                Poll::Failed(inner.state.end().map_or(LandingError::Revoked, |end| end.error(&inner.reason)))
            }
        }
    }

    /// Ends the landing when its deadline passed or no byte arrived for too long.
    pub(crate) fn check_time(&self, now: Instant) {
        self.update(|inner| {
            if now >= self.deadline {
                inner.state.revoke(LandingEnd::Expired);
            } else if inner.state.phase() == LandingPhase::Receiving
                && now >= inner.progress + self.progress_timeout
            {
                inner.state.revoke(LandingEnd::Stalled);
            }
        });
    }

    pub(crate) fn phase(&self) -> LandingPhase {
        self.inner.lock().state.phase()
    }

    /// Why frames of the transfer are refused now, if they are.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.inner.lock().state.end().map(LandingEnd::refusal)
    }

    pub(crate) fn revoke(&self, end: LandingEnd, reason: &str) {
        self.update(|inner| {
            if inner.state.is_open() {
                inner.reason = reason.to_owned();
                inner.state.revoke(end);
            }
        });
    }

    /// A connection showed the right secret.
    pub(crate) fn attach(&self, sender: &Identity, connection: mpsc::Sender<Notice>) -> Result<(), Refusal> {
        self.check_time(Instant::now());
        let mut inner = self.inner.lock();
        if let Some(end) = inner.state.end() {
            return Err(end.refusal());
        }
        if inner.sender.get_or_insert_with(|| sender.clone()) != sender {
            return Err(Refusal::Taken);
        }
        inner.connections.push(connection);
        Ok(())
    }

    /// The sender's commit; true when the landing is committed now or was before.
    pub(crate) fn commit(&self, payload: Bytes) -> bool {
        self.update(|inner| {
            if inner.state.is_open() {
                inner.payload.get_or_insert(payload);
            }
            inner.state.commit_arrives();
            self.wake_for_keys(inner);
            inner.state.phase() == LandingPhase::Committed
        })
    }

    /// All is there, and the connections that gave keys out shall take them back.
    fn wake_for_keys(&self, inner: &Inner) {
        if inner.state.awaits_grants() {
            self.wake(inner);
        }
    }

    fn wake(&self, inner: &Inner) {
        for connection in &inner.connections {
            // Full or closed: the connection looks at its keys and commits now and then anyway.
            let _ = connection.try_send(Notice { transfer: self.transfer, refusal: None });
        }
    }

    /// A peer is about to get a key; nothing when the landing is over.
    pub(crate) fn grant(self: &Arc<Self>) -> Option<Granted> {
        // Not `then_some`: a guard made in vain would end a grant that never began.
        let may = self.inner.lock().state.grant_begins();
        may.then(|| Granted { landing: self.clone() })
    }

    /// Runs `claim` on the state: which cells of a frame may be written.
    pub(crate) fn claim<R>(&self, claim: impl FnOnce(&mut LandingState) -> R) -> R {
        self.update(|inner| {
            if inner.state.phase() == LandingPhase::Reserved {
                inner.progress = Instant::now();
            }
            claim(&mut inner.state)
        })
    }

    /// Starts a write into claimed cells; nothing when the landing is over.
    pub(crate) fn begin(&self) -> Option<Write<'_>> {
        // Not `then_some`: a guard made in vain would end a write that never began.
        let may = self.inner.lock().state.write_begins();
        may.then(|| Write { landing: self })
    }

    /// Place of a cell, from the receiver's grid.
    pub(crate) fn place(
        &self,
        receiver: &ReceiverShared,
        plane: u32,
        index: u32,
    ) -> Option<(usize, Range<usize>)> {
        let slot = *self.slots.get(index as usize)?;
        let place = receiver.grid.cell(plane, slot)?;
        Some((plane as usize * self.slots.len() + index as usize, place))
    }
}

/// A write in flight: while it lives, the memory stays with the landing.
pub(crate) struct Write<'a> {
    landing: &'a LandingShared,
}

impl Write<'_> {
    /// Ends the write after `bytes` bytes that came that way to that side; settles the cells they completed. Bit `at` of what it
    /// yields is set for a cell that is bad.
    pub(crate) fn finish(self, (bytes, way, side): (usize, Transport, Side), checked: &[Checked]) -> u64 {
        let landing = self.landing;
        std::mem::forget(self);
        landing.used.add(way);
        landing.update(|inner| {
            let mut bad = 0;
            if bytes > 0 {
                inner.progress = Instant::now();
            }
            for Checked { at, cell, checksum, good } in checked {
                let outcome = inner.state.settle(*cell, *good);
                if outcome == Settled::Verified
                    && let Some(kept) = inner.checksums.get_mut(*cell)
                    && let Some(on_device) = inner.on_device.get_mut(*cell)
                {
                    (*kept, *on_device) = (*checksum, side == Side::Device);
                }
                bad |= u64::from(matches!(outcome, Settled::Refetch | Settled::GaveUp)) << at;
            }
            inner.state.write_ends();
            landing.wake_for_keys(inner);
            bad
        })
    }
}

impl Drop for Write<'_> {
    fn drop(&mut self) {
        self.landing.update(|inner| inner.state.write_ends());
    }
}

/// A key in a peer's hands: while this lives, the memory stays with the landing. Dropped only once nothing can be
/// written with the key any more.
pub(crate) struct Granted {
    pub(crate) landing: Arc<LandingShared>,
}

impl Granted {
    /// What shall become of it.
    pub(crate) fn wish(&self) -> Key {
        let inner = self.landing.inner.lock();
        match inner.state.phase() {
            LandingPhase::Revoking | LandingPhase::Void => Key::Revoke,
            _ if inner.state.awaits_grants() => Key::TakeBack,
            _ => Key::Keep,
        }
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        self.landing.update(|inner| inner.state.grant_ends());
    }
}
