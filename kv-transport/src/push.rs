//! A push: cells on their way to a landing.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::timeout_at;

use crate::error::PushError;
use crate::job::Job;
use crate::link::Link;
use crate::packing::Packing;
use crate::push_state::{LAST_SEQ, Next, PushPhase, PushState, QueuedCell};
use crate::ticket::Ticket;
use crate::transport::Used;
use crate::wire::{MAX_COMMIT_BYTES, MAX_REASON_BYTES};
use crate::{Grid, Region};

/// Bits of a frame's number within its push.
const SEQ_BITS: u32 = 20;
/// Rounds of numbers before they are used again.
pub(crate) const ROUNDS: u32 = 0xFFE;
/// Numbers of the frames that carry no cells.
pub(crate) const SEQ_ATTACH: u32 = 0;
pub(crate) const SEQ_COMMIT: u32 = LAST_SEQ + 1;

/// A cell to push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// Index into the ticket's slots.
    pub index: u32,
    /// Where it lies: slot in the sender's own grid.
    pub src_slot: u32,
    /// CRC-32C made by the producer.
    pub checksum: u32,
}

/// What a committed push did.
#[derive(Debug, Clone, Copy)]
pub struct PushReport {
    /// Bytes of all cells, repetitions not counted.
    pub bytes: u64,
    /// Number of cells.
    pub cells: u64,
    /// How they went: `tcp`, `rdma`, `shm`, or several joined by `+` when the transfer moved.
    pub transport: &'static str,
    /// Bytes that packed cells were on their way, repetitions included; 0 when none went packed.
    pub packed_bytes: u64,
    /// Cells that had to be sent again.
    pub refetched: u64,
    /// When the receiver's acknowledgement of the commit arrived.
    pub commit_ack: Instant,
}

/// An open push. Dropping it without a commit aborts it: the receiver is told at once, the source memory is kept
/// until nothing reads it.
#[derive(Debug)]
pub struct Push {
    shared: Arc<PushShared>,
}

/// Queues cells from any thread, without waiting. Bounded by the transfer itself: each cell may be queued once.
#[derive(Debug, Clone)]
pub struct CellQueue {
    shared: Arc<PushShared>,
}

impl CellQueue {
    /// Queues cells of a plane. Their bytes must be final; they are read from now until the push is over.
    pub fn send(&self, plane: u32, cells: Vec<Cell>) -> Result<(), PushError> {
        self.shared.queue(plane, &cells)
    }
}

impl Push {
    pub(crate) fn new(shared: Arc<PushShared>) -> Self {
        Self { shared }
    }

    /// The receiving caller's words, from the ticket.
    pub fn meta(&self) -> &Bytes {
        &self.shared.ticket.meta
    }

    /// Number of slots in the ticket: cells are named by their index below this.
    pub fn slots(&self) -> usize {
        self.shared.ticket.slots.len()
    }

    /// The caller's count of attempts, from the ticket.
    pub fn attempt(&self) -> u32 {
        self.shared.ticket.attempt
    }

    /// Waits until the receiver has accepted the ticket, or refused it.
    pub async fn accepted(&self) -> Result<(), PushError> {
        self.shared.wait(|state| (state.phase() != PushPhase::Opening).then_some(())).await
    }

    /// Waits until the push may queue further cells under its window, and queues them. Their bytes must be
    /// final; they are read from now until the push is over.
    pub async fn cells(&self, plane: u32, cells: &[Cell]) -> Result<(), PushError> {
        let mut rest = cells;
        while !rest.is_empty() {
            let room = self.shared.wait(|state| (state.room() > 0).then(|| state.room())).await?;
            let (now, later) = rest.split_at(room.min(rest.len()));
            self.shared.queue(plane, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Waits until every cell queued so far is acknowledged.
    pub async fn settled(&self) -> Result<(), PushError> {
        self.shared.wait(|state| (state.outstanding_bytes() == 0).then_some(())).await
    }

    /// A handle that queues without waiting, for threads outside the runtime.
    pub fn queue(&self) -> CellQueue {
        CellQueue { shared: self.shared.clone() }
    }

    /// Waits until the push has failed, or the ticket's time ran out: then computing further is in vain.
    pub async fn failed(&self) -> PushError {
        match self.shared.wait(|_| None::<std::convert::Infallible>).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    /// Commits with the caller's words behind the last cells, and waits until the landing is committed, which says that every cell was
    /// verified. Every cell must have been queued before.
    pub async fn commit(self, payload: Bytes) -> Result<PushReport, PushError> {
        let shared = &self.shared;
        if payload.len() > MAX_COMMIT_BYTES {
            return Err(PushError::PayloadTooLarge { bytes: payload.len() });
        }
        shared.inner.lock().payload = payload;
        shared.update(|inner| inner.state.commit())?;
        let committed = |state: &mut PushState| state.was_committed().then(|| state.refetched());
        let refetched = shared.wait(committed).await?;
        let cells = u64::from(shared.grid.planes) * self.slots() as u64;
        let bytes = cells * u64::from(shared.grid.cell_bytes);
        let commit_ack = shared.inner.lock().commit_ack.unwrap_or_else(Instant::now);
        let packed_bytes = shared.packed_bytes.load(Ordering::Relaxed);
        Ok(PushReport { bytes, cells, transport: shared.used.name(), packed_bytes, refetched, commit_ack })
    }

    /// Gives up and tells the receiver why.
    pub fn abort(self, reason: &str) {
        let end = reason.floor_char_boundary(MAX_REASON_BYTES);
        reason.get(..end).unwrap_or_default().clone_into(&mut self.shared.inner.lock().reason);
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        self.shared.fail(PushError::Closed);
        self.shared.link.remove(&self.shared);
    }
}

pub(crate) struct PushShared {
    pub(crate) ticket: Ticket,
    pub(crate) grid: Grid,
    pub(crate) region: Region,
    pub(crate) link: Arc<Link>,
    /// Whether it is in the link's list of pushes that have something to send.
    pub(crate) listed: AtomicBool,
    /// The ways its cells went.
    pub(crate) used: Used,
    /// How cells are packed that go over TCP.
    pub(crate) packing: Option<Packing>,
    pub(crate) packed_bytes: AtomicU64,
    /// Which of the link's pushes it is; see [`PushShared::number`].
    pub(crate) round: u32,
    deadline: tokio::time::Instant,
    inner: Mutex<Inner>,
    changed: Notify,
}

impl std::fmt::Debug for PushShared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Push").field("transfer", &self.ticket.transfer).finish_non_exhaustive()
    }
}

pub(crate) struct Inner {
    pub(crate) state: PushState,
    hold: Option<Arc<dyn Any + Send + Sync>>,
    payload: Bytes,
    reason: String,
    commit_ack: Option<Instant>,
}

impl PushShared {
    pub(crate) fn new(
        ticket: Ticket,
        deadline: tokio::time::Instant,
        state: PushState,
        (region, grid, packing): (Region, Grid, Option<Packing>),
        link: Arc<Link>,
        hold: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let reason = "the sender dropped the push".to_owned();
        let inner = Inner { state, hold: Some(hold), payload: Bytes::new(), reason, commit_ack: None };
        let (inner, changed) = (Mutex::new(inner), Notify::new());
        let (listed, used, packed_bytes) = (AtomicBool::new(false), Used::default(), AtomicU64::new(0));
        let round = link.next_round();
        Self {
            ticket,
            grid,
            region,
            link,
            listed,
            used,
            packing,
            packed_bytes,
            round,
            deadline,
            inner,
            changed,
        }
    }

    /// The number of a frame on the wire. A ticket that was refused may be shown again while answers to the first try are still on
    /// their way; they bear another push's numbers.
    pub(crate) fn number(&self, seq: u32) -> u32 {
        self.round << SEQ_BITS | seq
    }

    /// The frame of this push that a reply is about; nothing when it is another push's. 0 is about no frame.
    pub(crate) fn seq_of(&self, number: u32) -> Option<u32> {
        (number == 0 || number >> SEQ_BITS == self.round).then_some(number & ((1 << SEQ_BITS) - 1))
    }

    /// Applies an event to the state and does what follows from it, outside the lock.
    pub(crate) fn update<R>(self: &Arc<Self>, event: impl FnOnce(&mut Inner) -> R) -> R {
        let mut inner = self.inner.lock();
        let (before, was_open) = (inner.state.phase(), inner.state.is_open());
        let result = event(&mut inner);
        let after = inner.state.phase();
        if was_open && inner.state.end().is_some() {
            self.link.counters.failed.add(1);
        }
        let more = inner.state.has_next();
        if before != after && after == PushPhase::Committed {
            inner.commit_ack = Some(Instant::now());
            self.link.counters.committed.add(1);
        }
        let hold = if after == PushPhase::Closed { inner.hold.take() } else { None };
        drop(inner);
        drop(hold);
        if more {
            self.link.list(self);
        }
        self.changed.notify_waiters();
        result
    }

    pub(crate) fn fail(self: &Arc<Self>, why: PushError) {
        self.update(|inner| inner.state.close(why));
    }

    fn queue(self: &Arc<Self>, plane: u32, cells: &[Cell]) -> Result<(), PushError> {
        let queued = |cell: &Cell| {
            self.place(plane, cell.src_slot).ok_or(PushError::BadCell { plane, index: cell.index })?;
            let Cell { index, src_slot, checksum } = *cell;
            Ok(QueuedCell { plane, index, src_slot, checksum })
        };
        let cells = cells.iter().map(queued).collect::<Result<Vec<_>, PushError>>()?;
        self.update(|inner| inner.state.queue(&cells))
    }

    /// Where a cell lies in the source.
    pub(crate) fn place(&self, plane: u32, slot: u32) -> Option<Range<usize>> {
        self.grid.cell(plane, slot).filter(|place| place.end <= self.region.len())
    }

    /// Waits until `look` finds what it wants, the push is over, or the ticket's time is.
    pub(crate) async fn wait<R>(
        self: &Arc<Self>,
        mut look: impl FnMut(&mut PushState) -> Option<R>,
    ) -> Result<R, PushError> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = &mut self.inner.lock().state;
                if let Some(end) = state.end() {
                    return Err(end.clone());
                }
                if let Some(found) = look(state) {
                    return Ok(found);
                }
                if matches!(state.phase(), PushPhase::Closing | PushPhase::Closed) {
                    return Err(PushError::Closed);
                }
            }
            if timeout_at(self.deadline, changed).await.is_err() {
                self.fail(PushError::Expired);
            }
        }
    }

    /// The next thing to send; true when there is more after it. A commit that comes next goes along with the last cells where that is
    /// asked for: no other connection need be woken for it.
    pub(crate) fn next(&self, along: bool) -> (Option<Job>, bool) {
        let mut inner = self.inner.lock();
        let job = match inner.state.next() {
            Next::Nothing => None,
            Next::Attach => Some(Job::Attach),
            Next::Write { seq, cells } => {
                let commits = along && inner.state.commits_next() && inner.state.next() == Next::Commit;
                let commit = commits.then(|| inner.payload.clone());
                Some(Job::Write { seq, cells, commit })
            }
            Next::Commit => Some(Job::Commit(inner.payload.clone())),
            Next::Abort => Some(Job::Abort(inner.reason.clone())),
        };
        (job, inner.state.has_next())
    }

    /// Runs `read` on the source unless the push is over. The source cannot be released while it runs.
    pub(crate) fn reading<R>(self: &Arc<Self>, read: impl FnOnce() -> R) -> Option<R> {
        if !self.begin_read() {
            return None;
        }
        let result = read();
        self.end_read();
        Some(result)
    }

    /// A read of the source begins, unless the push is over; [`PushShared::end_read`] must follow.
    #[must_use]
    pub(crate) fn begin_read(&self) -> bool {
        self.inner.lock().state.read_begins()
    }

    /// Whether it goes on, was committed, or neither.
    pub(crate) fn phase(&self) -> PushPhase {
        self.inner.lock().state.phase()
    }

    /// A read that was let begin is over.
    pub(crate) fn end_read(&self) {
        let mut inner = self.inner.lock();
        inner.state.read_ends();
        if inner.state.phase() == PushPhase::Closed {
            let hold = inner.hold.take();
            drop(inner);
            drop(hold);
            self.changed.notify_waiters();
        }
    }
}
