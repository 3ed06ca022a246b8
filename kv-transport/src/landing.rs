//! A landing: reserved memory on its way to being whole, as its owner sees it.

use std::marker::PhantomData;
use std::sync::Arc;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use crate::error::LandingError;
use crate::landing_shared::{LandingShared, Poll};
use crate::landing_state::LandingEnd;

/// What arrived.
#[derive(Debug)]
pub struct Landed<H> {
    /// The sender's words, from its commit.
    pub payload: Bytes,
    /// The memory, verified; nothing writes it any more.
    pub hold: H,
    /// Bytes of all cells.
    pub bytes: u64,
    /// Number of cells.
    pub cells: u64,
    /// How they came: `tcp`, `rdma`, `shm`, `cuda_ipc`, or several joined by `+` when the transfer moved.
    pub transport: &'static str,
    /// Cells that had to be sent again.
    pub refetched: u64,
    /// The producer's checksum of every cell, plane after plane, in the order of the slots: for whoever wants to
    /// look again later.
    pub checksums: Vec<u32>,
    /// In the same order, whether a cell lies on the device ([`crate::DeviceMemory`]) and not in the region.
    pub on_device: Vec<bool>,
}

/// A reservation and, later, what arrives in it. Dropping it revokes it.
#[derive(Debug)]
pub struct Landing<H> {
    shared: Arc<LandingShared>,
    ticket: Bytes,
    hold: PhantomData<fn() -> H>,
}

impl<H: Send + 'static> Landing<H> {
    pub(crate) fn new(shared: Arc<LandingShared>, ticket: Bytes) -> Self {
        Self { shared, ticket, hold: PhantomData }
    }

    /// The right to write, as bytes for the sender.
    pub fn ticket(&self) -> &Bytes {
        &self.ticket
    }

    /// Waits until everything is verified and committed, or the landing failed. Cancel-safe. Yields the hold
    /// once; afterwards it is [`LandingError::Revoked`].
    pub async fn committed(&mut self) -> Result<Landed<H>, LandingError> {
        loop {
            let until = match self.shared.poll(Instant::now()) {
                Poll::Pending(until) => until,
                Poll::Failed(error) => return Err(error),
                Poll::Done(parts) => {
                    let hold = parts.hold.downcast::<H>().map_err(|_| LandingError::Revoked)?;
                    let (cells, refetched) = (self.shared.cells as u64, parts.refetched);
                    let bytes = cells * self.shared.cell_bytes as u64;
                    let payload = parts.payload;
                    return Ok(Landed {
                        payload,
                        hold: *hold,
                        bytes,
                        cells,
                        transport: self.shared.used.name(),
                        refetched,
                        checksums: parts.checksums,
                        on_device: parts.on_device,
                    });
                }
            };
            // Either a wake-up or the time has come: both mean to look again.
            let _ = timeout_at(until, self.shared.changed()).await;
        }
    }

    /// Ends the landing; late writes are thrown away and the sender is told.
    pub fn revoke(self) -> Revoking {
        Revoking { shared: self.shared.clone() }
    }
}

impl<H> Drop for Landing<H> {
    fn drop(&mut self) {
        self.shared.revoke(LandingEnd::Revoked, "");
        self.shared.discard();
    }
}

/// A revoked landing whose memory may be in quarantine for a moment. Dropping it changes nothing.
#[derive(Debug)]
pub struct Revoking {
    shared: Arc<LandingShared>,
}

impl Revoking {
    /// Waits until the hold was dropped: no write can be in flight any more. Over TCP that is at most the time
    /// of one system call, over RDMA until the sender's key is dead.
    pub async fn released(self) {
        self.shared.released().await;
    }
}
