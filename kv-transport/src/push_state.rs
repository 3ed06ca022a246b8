//! The states of a push: what to send next, what is acknowledged, when the source memory is free again.
//!
//! ```text
//! Opening ──attached──► Pushing ──commit──► Committing ──commit acknowledged──► Committed
//!    │                     │                    │                                  │
//!    └──────── close ──────┴────────────────────┴──► Closing ◄──────── close ──────┘
//!                                                       └──no read in flight any more──► Closed (source released)
//! ```
//!
//! Nothing waits for an answer that need not: cells may go out behind the ticket, and the commit behind the last cells. A receiver
//! that refuses the ticket throws them away; one that misses a cell commits when that has come.
//!
//! Plain synchronous code: no clock, no sockets, no locks.

use std::collections::{BTreeMap, VecDeque};

use crate::bits::Bits;
use crate::error::{PushError, Refusal};
pub use crate::job::{FrameBounds, Next, QueuedCell};
use crate::landing_state::MAX_REFETCHES;

/// Frames of cells are numbered from 1 to this, round and round.
pub const LAST_SEQ: u32 = (1 << 20) - 2;

/// Where a push is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PushPhase {
    /// The ticket was not accepted yet. Cells may be queued all the same.
    Opening,
    /// Cells may be queued.
    Pushing,
    /// The caller committed: what is queued drains, then the commit goes out.
    Committing,
    /// The receiver committed.
    Committed,
    /// Over, but a read of the source is in flight.
    Closing,
    /// Over and quiet.
    Closed,
}

/// The state of one push.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PushState {
    phase: PushPhase,
    end: Option<PushError>,
    slots: usize,
    total: usize,
    cell_bytes: usize,
    bounds: FrameBounds,
    queued: Bits,
    queued_count: usize,
    pending: VecDeque<QueuedCell>,
    sent: BTreeMap<u32, Vec<QueuedCell>>,
    sent_cells: usize,
    next_seq: u32,
    reads: usize,
    retries: BTreeMap<usize, u8>,
    refetched: u64,
    accepted: bool,
    attach_due: bool,
    commit_due: bool,
    abort_due: bool,
}

impl PushState {
    /// A push of `planes * slots` cells of `cell_bytes` bytes.
    pub fn new(planes: usize, slots: usize, cell_bytes: usize, bounds: FrameBounds) -> Self {
        let total = planes.saturating_mul(slots);
        Self {
            phase: PushPhase::Opening,
            end: None,
            slots,
            total,
            cell_bytes,
            bounds,
            queued: Bits::new(total),
            queued_count: 0,
            pending: VecDeque::new(),
            sent: BTreeMap::new(),
            sent_cells: 0,
            next_seq: 1,
            reads: 0,
            retries: BTreeMap::new(),
            refetched: 0,
            accepted: false,
            attach_due: true,
            commit_due: false,
            abort_due: false,
        }
    }

    /// Where it is.
    pub fn phase(&self) -> PushPhase {
        self.phase
    }

    /// Why it is over, once Closing or Closed without a commit.
    pub fn end(&self) -> Option<&PushError> {
        self.end.as_ref()
    }

    /// Reads of the source in flight.
    pub fn reads(&self) -> usize {
        self.reads
    }

    /// Cells sent again because of a bad checksum.
    pub fn refetched(&self) -> u64 {
        self.refetched
    }

    /// Bytes accepted and not acknowledged yet.
    pub fn outstanding_bytes(&self) -> usize {
        (self.pending.len() + self.sent_cells).saturating_mul(self.cell_bytes)
    }

    /// How many cells may be queued now without exceeding the window; at least one when nothing is outstanding.
    pub fn room(&self) -> usize {
        let outstanding = self.outstanding_bytes();
        let room = self.bounds.window_bytes.saturating_sub(outstanding) / self.cell_bytes.max(1);
        if outstanding == 0 { room.max(1) } else { room }
    }

    /// Whether the push goes on.
    pub fn is_open(&self) -> bool {
        matches!(self.phase, PushPhase::Opening | PushPhase::Pushing | PushPhase::Committing)
    }

    fn id(&self, plane: u32, index: u32) -> Option<usize> {
        let (plane, index) = (plane as usize, index as usize);
        let id = plane.checked_mul(self.slots)?.checked_add(index)?;
        (index < self.slots && id < self.total).then_some(id)
    }

    /// Accepts cells, all or none; each may be queued once.
    pub fn queue(&mut self, cells: &[QueuedCell]) -> Result<(), PushError> {
        if !matches!(self.phase, PushPhase::Opening | PushPhase::Pushing) {
            return Err(self.end.clone().unwrap_or(PushError::Closed));
        }
        for (at, cell) in cells.iter().enumerate() {
            if !self.id(cell.plane, cell.index).is_some_and(|id| self.queued.add(id)) {
                for cell in cells.iter().take(at) {
                    self.id(cell.plane, cell.index).map(|id| self.queued.remove(id));
                }
                return Err(PushError::BadCell { plane: cell.plane, index: cell.index });
            }
        }
        self.queued_count += cells.len();
        self.pending.extend(cells);
        Ok(())
    }

    /// The receiver accepted the ticket. Comes once per connection.
    pub fn attached(&mut self) {
        self.accepted = true;
        if self.phase == PushPhase::Opening {
            self.phase = PushPhase::Pushing;
        }
    }

    /// The caller wants to commit.
    pub fn commit(&mut self) -> Result<(), PushError> {
        match self.phase {
            PushPhase::Opening | PushPhase::Pushing if self.queued_count == self.total => {
                self.phase = PushPhase::Committing;
                self.commit_due = true;
                Ok(())
            }
            PushPhase::Opening | PushPhase::Pushing => {
                Err(PushError::Incomplete { missing: (self.total - self.queued_count) as u64 })
            }
            _ => Err(self.end.clone().unwrap_or(PushError::Closed)),
        }
    }

    /// Whether [`PushState::next`] has something to send.
    pub fn has_next(&self) -> bool {
        match self.phase {
            PushPhase::Opening | PushPhase::Pushing | PushPhase::Committing => {
                self.attach_due || self.may_write() || self.may_commit()
            }
            PushPhase::Committed => false,
            PushPhase::Closing | PushPhase::Closed => self.abort_due,
        }
    }

    fn may_write(&self) -> bool {
        let sent = self.sent_cells.saturating_mul(self.cell_bytes);
        let fits = sent.saturating_add(self.cell_bytes) <= self.bounds.window_bytes;
        !self.pending.is_empty() && (self.sent_cells == 0 || fits)
    }

    fn may_commit(&self) -> bool {
        self.commit_due && self.pending.is_empty()
    }

    /// Whether the commit is what comes next: the frame before it was the last one of cells.
    pub fn commits_next(&self) -> bool {
        self.is_open() && self.may_commit()
    }

    /// Takes what a connection shall send now.
    #[expect(clippy::should_implement_trait, reason = "it is no iterator: nothing now does not mean the end")]
    pub fn next(&mut self) -> Next {
        if !self.has_next() {
            return Next::Nothing;
        }
        if !self.is_open() {
            self.abort_due = false;
            return Next::Abort;
        }
        // Every frame shows the ticket on a connection that has not seen it: an attach is for having nothing else to say.
        let attach_due = std::mem::take(&mut self.attach_due);
        if self.may_write() {
            self.next_write()
        } else if self.may_commit() {
            self.commit_due = false;
            Next::Commit
        } else {
            debug_assert!(attach_due);
            Next::Attach
        }
    }

    fn next_write(&mut self) -> Next {
        let window = self.bounds.window_bytes.saturating_sub(self.sent_cells.saturating_mul(self.cell_bytes));
        let by_bytes = self.bounds.bytes.min(window) / self.cell_bytes.max(1);
        let count = by_bytes.clamp(1, self.bounds.cells.max(1)).min(self.pending.len());
        let cells: Vec<_> = self.pending.drain(..count).collect();
        let seq = self.next_seq;
        self.next_seq = self.next_seq % LAST_SEQ + 1;
        self.sent_cells += cells.len();
        self.sent.insert(seq, cells.clone());
        Next::Write { seq, cells }
    }

    /// A read of the source is about to start; false when it must not.
    #[must_use]
    pub fn read_begins(&mut self) -> bool {
        let may = self.is_open();
        self.reads += usize::from(may);
        may
    }

    /// A read that was let begin is over.
    pub fn read_ends(&mut self) {
        self.reads = self.reads.saturating_sub(1);
        self.advance();
    }

    /// The receiver took frame `seq`; the cells whose bit is set in `bad` must be sent again.
    /// Replies to unknown frames are ignored.
    pub fn acked(&mut self, seq: u32, bad: u64) {
        let Some(cells) = self.sent.remove(&seq) else {
            return;
        };
        self.sent_cells -= cells.len();
        for (at, cell) in cells.into_iter().enumerate().filter(|(at, _)| *at < 64 && bad >> at & 1 == 1) {
            debug_assert!(at < 64);
            let Some(id) = self.id(cell.plane, cell.index) else {
                continue;
            };
            let retries = self.retries.entry(id).or_insert(0);
            if *retries >= MAX_REFETCHES {
                return self.close(PushError::Corrupt);
            }
            *retries += 1;
            self.refetched += 1;
            self.pending.push_front(cell);
        }
    }

    /// Frame `seq` went a way that is gone, and no answer to it will come: its cells are to be sent again.
    pub fn unsend(&mut self, seq: u32) {
        let Some(cells) = self.sent.remove(&seq) else {
            return;
        };
        self.sent_cells -= cells.len();
        for cell in cells.into_iter().rev() {
            self.pending.push_front(cell);
        }
    }

    /// The receiver committed, so it has verified every cell. Ignored unless the commit was sent. Where it did not take this push's
    /// ticket, it speaks of an earlier one that used it.
    pub fn commit_acked(&mut self) {
        if !self.commit_is_out() {
            return;
        }
        if self.accepted {
            self.phase = PushPhase::Committed;
        } else {
            self.close(PushError::Refused(Refusal::Stale));
        }
    }

    /// Whether the receiver committed, whatever came after that: a lost connection, or a late answer to a ticket shown twice.
    pub fn was_committed(&self) -> bool {
        let is_over = matches!(self.phase, PushPhase::Closing | PushPhase::Closed);
        self.phase == PushPhase::Committed || is_over && self.end.is_none()
    }

    fn commit_is_out(&self) -> bool {
        self.phase == PushPhase::Committing && !self.commit_due
    }

    /// The receiver refused a frame. That a ticket is stale says nothing once the commit is out, but in answer to it: shown on one connection,
    /// the ticket may come after another one's commit has used it.
    pub fn refused(&mut self, refusal: Refusal, of_commit: bool) {
        if of_commit || !self.commit_is_out() || refusal != Refusal::Stale {
            self.close(match refusal {
                Refusal::Corrupt => PushError::Corrupt,
                refusal => PushError::Refused(refusal),
            });
        }
    }

    /// The push is over. The first reason stays. Unless the receiver knows already, it must be told.
    pub fn close(&mut self, why: PushError) {
        if matches!(self.phase, PushPhase::Closing | PushPhase::Closed) {
            return;
        }
        if self.phase != PushPhase::Committed {
            // A connection that is too busy says nothing about the others, unless nothing was shown but there.
            let alone = self.phase == PushPhase::Opening && self.next_seq == 1;
            self.abort_due = !matches!(why, PushError::Refused(refusal) if alone || refusal != Refusal::Busy);
            self.end = Some(why);
        }
        self.phase = PushPhase::Closing;
        self.pending.clear();
        self.sent.clear();
        self.sent_cells = 0;
        self.advance();
    }

    fn advance(&mut self) {
        if self.phase == PushPhase::Closing && self.reads == 0 {
            self.phase = PushPhase::Closed;
        }
    }
}

#[cfg(test)]
#[path = "push_state_tests.rs"]
mod tests;
