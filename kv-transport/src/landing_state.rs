//! The states of a landing: what may be written, when it is whole, when its memory is free again.
//!
//! ```text
//! Reserved ──first write──► Receiving ──every cell verified, commit here, no write or key alive──► Committed
//!     │                         │                                                          (the caller owns it)
//!     └─────── revoke ──────────┴──► Revoking ──no write or key alive any more──► Void (memory released)
//! ```
//!
//! A write is one system call or copy of ours; a key lets a peer's network card write until it is taken back.

//! A transfer of no cells goes from Reserved to Committed by its commit alone. Plain synchronous code: no clock,
//! no sockets, no locks.

use std::collections::BTreeMap;

use crate::bits::Bits;
use crate::error::{LandingError, Refusal};

/// A cell is sent again at most this often after a bad checksum.
pub const MAX_REFETCHES: u8 = 3;

/// Where a landing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LandingPhase {
    /// Nothing was written yet.
    Reserved,
    /// Cells arrive.
    Receiving,
    /// All is verified and committed; nothing may be written any more.
    Committed,
    /// Over, but a write is still in flight: the memory is in quarantine.
    Revoking,
    /// Over and quiet: the memory may be released.
    Void,
}

/// Why a landing ended without a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LandingEnd {
    /// Its deadline passed.
    Expired,
    /// No byte for the progress timeout.
    Stalled,
    /// A connection of its sender was lost.
    PeerGone,
    /// The sender gave up.
    Aborted,
    /// A cell kept failing its checksum.
    Corrupt,
    /// The receiver shuts down.
    Shutdown,
    /// The receiving side revoked or dropped it.
    Revoked,
}

impl LandingEnd {
    /// Every way to end, in the order of the counters.
    pub const ALL: [Self; 7] = [
        Self::Expired,
        Self::Stalled,
        Self::PeerGone,
        Self::Aborted,
        Self::Corrupt,
        Self::Shutdown,
        Self::Revoked,
    ];

    /// Short name for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Stalled => "stalled",
            Self::PeerGone => "peer_gone",
            Self::Aborted => "aborted",
            Self::Corrupt => "corrupt",
            Self::Shutdown => "shutdown",
            Self::Revoked => "revoked",
        }
    }

    /// What late frames of the sender are told.
    pub fn refusal(self) -> Refusal {
        match self {
            Self::Expired => Refusal::Expired,
            Self::Stalled => Refusal::Stalled,
            Self::PeerGone => Refusal::PeerGone,
            Self::Aborted => Refusal::Aborted,
            Self::Corrupt => Refusal::Corrupt,
            Self::Shutdown => Refusal::Shutdown,
            Self::Revoked => Refusal::Revoked,
        }
    }

    /// What the receiving caller is told.
    pub(crate) fn error(self, reason: &str) -> LandingError {
        match self {
            Self::Expired => LandingError::Expired,
            Self::Stalled => LandingError::Stalled,
            Self::PeerGone => LandingError::PeerGone,
            Self::Aborted => LandingError::Aborted { reason: reason.to_owned() },
            Self::Corrupt => LandingError::Corrupt,
            Self::Shutdown => LandingError::Shutdown,
            Self::Revoked => LandingError::Revoked,
        }
    }
}

/// Whether a frame may write a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// Yes; nobody else may until it is settled.
    Granted,
    /// It is verified already: discard the bytes and acknowledge.
    Duplicate,
    /// Another frame is writing it now: discard the bytes and ask for them again.
    Busy,
    /// The transfer has no such cell: the peer is broken.
    Outside,
    /// The landing is over: discard the bytes and refuse.
    Over,
}

/// What the checksum of a written cell led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// The cell is good and will not be written again.
    Verified,
    /// The cell is bad: ask for it again.
    Refetch,
    /// The cell was bad once too often: the landing is over.
    GaveUp,
    /// The landing was over already, or the cell was not being written.
    Ignored,
}

/// The state of one landing.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LandingState {
    phase: LandingPhase,
    end: Option<LandingEnd>,
    cells: usize,
    claimed: Bits,
    verified: Bits,
    missing: usize,
    writes: usize,
    /// Peers whose network card may write by itself.
    grants: usize,
    commit_here: bool,
    failures: BTreeMap<usize, u8>,
    refetched: u64,
}

impl LandingState {
    /// A reservation of this many cells.
    pub fn new(cells: usize) -> Self {
        Self {
            phase: LandingPhase::Reserved,
            end: None,
            cells,
            claimed: Bits::new(cells),
            verified: Bits::new(cells),
            missing: cells,
            writes: 0,
            grants: 0,
            commit_here: false,
            failures: BTreeMap::new(),
            refetched: 0,
        }
    }

    /// Where it is.
    pub fn phase(&self) -> LandingPhase {
        self.phase
    }

    /// Why it ended, once Revoking or Void.
    pub fn end(&self) -> Option<LandingEnd> {
        self.end
    }

    /// Writes in flight now.
    pub fn writes(&self) -> usize {
        self.writes
    }

    /// Cells asked for again because of a bad checksum.
    pub fn refetched(&self) -> u64 {
        self.refetched
    }

    /// Whether frames are still welcome.
    pub fn is_open(&self) -> bool {
        matches!(self.phase, LandingPhase::Reserved | LandingPhase::Receiving)
    }

    /// A frame wants to write a cell.
    pub fn claim(&mut self, cell: usize) -> Claim {
        if cell >= self.cells {
            Claim::Outside
        } else if !self.is_open() {
            if self.phase == LandingPhase::Committed { Claim::Duplicate } else { Claim::Over }
        } else if self.verified.has(cell) {
            Claim::Duplicate
        } else if self.claimed.add(cell) {
            self.phase = LandingPhase::Receiving;
            Claim::Granted
        } else {
            Claim::Busy
        }
    }

    /// A write into claimed cells is about to start; false when it must not.
    #[must_use]
    pub fn write_begins(&mut self) -> bool {
        if self.phase != LandingPhase::Receiving {
            return false;
        }
        self.writes += 1;
        true
    }

    /// A write that was let begin is over. The last one lets the landing move on.
    pub fn write_ends(&mut self) {
        self.writes = self.writes.saturating_sub(1);
        self.advance();
    }

    /// A peer is about to get a key to write without being asked; false when it must not.
    #[must_use]
    pub fn grant_begins(&mut self) -> bool {
        let may = self.is_open();
        self.grants += usize::from(may);
        may
    }

    /// A key that was given is dead: nothing can be written with it any more.
    pub fn grant_ends(&mut self) {
        self.grants = self.grants.saturating_sub(1);
        self.advance();
    }

    /// Keys that are alive.
    pub fn grants(&self) -> usize {
        self.grants
    }

    /// Whether all is verified and committed but for keys that are still alive.
    pub fn awaits_grants(&self) -> bool {
        self.is_open() && self.commit_here && self.missing == 0 && self.grants > 0
    }

    /// The bytes of a claimed cell are all there; `good` says whether their checksum is right.
    pub fn settle(&mut self, cell: usize, good: bool) -> Settled {
        if self.phase != LandingPhase::Receiving || !self.claimed.remove(cell) {
            return Settled::Ignored;
        }
        if good || cfg!(feature = "sabotage-checksum") {
            self.verified.add(cell);
            self.missing -= 1;
            self.advance();
            return Settled::Verified;
        }
        let failures = self.failures.entry(cell).or_insert(0);
        *failures += 1;
        if *failures > MAX_REFETCHES {
            self.revoke(LandingEnd::Corrupt);
            return Settled::GaveUp;
        }
        self.refetched += 1;
        Settled::Refetch
    }

    /// The sender's commit arrived; it may come before the last cell, and more than once.
    pub fn commit_arrives(&mut self) {
        if self.is_open() {
            self.commit_here = true;
            self.advance();
        }
    }

    /// The landing is to end. The first reason stays; a committed landing stays committed.
    pub fn revoke(&mut self, end: LandingEnd) {
        if self.is_open() {
            self.end = Some(end);
            self.phase = LandingPhase::Revoking;
            self.advance();
        }
    }

    fn advance(&mut self) {
        if self.writes + self.grants > 0 && !cfg!(feature = "sabotage-quarantine") {
            return;
        }
        if self.phase == LandingPhase::Revoking {
            self.phase = LandingPhase::Void;
        } else if self.is_open() && self.commit_here && self.missing == 0 {
            self.phase = LandingPhase::Committed;
        }
    }
}

#[cfg(test)]
#[path = "landing_state_tests.rs"]
mod tests;
