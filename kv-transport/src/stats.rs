//! Counters and gauges of both sides.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::landing_state::LandingEnd;
use crate::transport::Transport;

/// A counter that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a receiver counts.
#[derive(Debug, Default)]
pub(crate) struct ReceiverCounters {
    pub(crate) committed: Counter,
    pub(crate) voided: [Counter; LandingEnd::ALL.len()],
    pub(crate) bytes: Counter,
    pub(crate) packed_bytes: Counter,
    pub(crate) rdma_bytes: Counter,
    pub(crate) shm_bytes: Counter,
    pub(crate) cuda_ipc_bytes: Counter,
    pub(crate) queue_pairs: Counter,
    pub(crate) queue_pairs_lost: Counter,
    /// Times that queue pairs were to be broken on purpose.
    pub(crate) breaks: Counter,
    pub(crate) discarded_bytes: Counter,
    pub(crate) duplicate_cells: Counter,
    pub(crate) checksum_failures: Counter,
    pub(crate) stale_refused: Counter,
    pub(crate) forged_refused: Counter,
    pub(crate) misused_refused: Counter,
    pub(crate) identity_refused: Counter,
    pub(crate) protocol_errors: Counter,
}

impl ReceiverCounters {
    pub(crate) fn voided(&self, end: LandingEnd) {
        if let Some(at) = LandingEnd::ALL.iter().position(|e| *e == end)
            && let Some(counter) = self.voided.get(at)
        {
            counter.add(1);
        }
    }
}

/// A receiver's state now (gauges) and since its start (`_total`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiverStats {
    /// Transfers that wait for their first byte.
    pub reserved: usize,
    /// Transfers that receive.
    pub receiving: usize,
    /// Transfers in quarantine: over, but a write is still in flight.
    pub revoking: usize,
    /// Open connections.
    pub connections: usize,
    /// Transfers committed.
    pub committed_total: u64,
    /// Transfers that ended without a commit, by reason.
    pub voided_total: [(LandingEnd, u64); LandingEnd::ALL.len()],
    /// Payload bytes written into place; of packed cells, as they came.
    pub bytes_total: u64,
    /// Of these, bytes of packed cells.
    pub packed_bytes_total: u64,
    /// Of these, bytes written by RDMA.
    pub rdma_bytes_total: u64,
    /// Of these, bytes copied from memory that a sender on this host lent.
    pub shm_bytes_total: u64,
    /// Of these, bytes copied from the device of such a sender to ours.
    pub cuda_ipc_bytes_total: u64,
    /// Queue pairs connected.
    pub queue_pairs_total: u64,
    /// Queue pairs that broke.
    pub queue_pairs_lost_total: u64,
    /// Payload bytes thrown away: duplicates and late writes.
    pub discarded_bytes_total: u64,
    /// Cells that arrived once more although verified.
    pub duplicate_cells_total: u64,
    /// Cells whose checksum was wrong.
    pub checksum_failures_total: u64,
    /// Connections or attaches refused because they belong to another incarnation, generation or an ended transfer.
    pub stale_refused_total: u64,
    /// Attaches refused because the secret was wrong.
    pub forged_refused_total: u64,
    /// Attaches refused because the ticket was made for another worker.
    pub misused_refused_total: u64,
    /// Connections refused because they were not encrypted, or their peer's certificate is not that worker's.
    pub identity_refused_total: u64,
    /// Connections closed because of nonsense.
    pub protocol_errors_total: u64,
}

impl ReceiverStats {
    /// Transfers that ended for this reason.
    pub fn voided(&self, end: LandingEnd) -> u64 {
        self.voided_total.iter().find(|(e, _)| *e == end).map_or(0, |(_, n)| *n)
    }
}

/// What a sender counts.
#[derive(Debug, Default)]
pub(crate) struct SenderCounters {
    pub(crate) committed: Counter,
    pub(crate) failed: Counter,
    pub(crate) bytes: Counter,
    pub(crate) packed_bytes: Counter,
    pub(crate) refetched_cells: Counter,
    pub(crate) connects: Counter,
    pub(crate) rdma_bytes: Counter,
    pub(crate) shm_bytes: Counter,
    pub(crate) cuda_ipc_bytes: Counter,
    pub(crate) queue_pairs: Counter,
    /// Times that queue pairs were to be broken on purpose.
    pub(crate) breaks: Counter,
    /// On which rails, by bits.
    pub(crate) broken_rails: AtomicU64,
    pub(crate) fallbacks: [Counter; Fallback::ALL.len()],
}

/// A sender's state now (gauges) and since its start (`_total`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SenderStats {
    /// Pushes that are open.
    pub pushes: usize,
    /// Peers with warm connections.
    pub peers: usize,
    /// Pushes committed.
    pub committed_total: u64,
    /// Pushes that ended without a commit.
    pub failed_total: u64,
    /// Payload bytes handed to the network, repetitions included; of packed cells, as they went.
    pub bytes_total: u64,
    /// Of the bytes, those of packed cells.
    pub packed_bytes_total: u64,
    /// Cells sent again because of a bad checksum.
    pub refetched_cells_total: u64,
    /// Connections made.
    pub connects_total: u64,
    /// Of the bytes, those written by RDMA.
    pub rdma_bytes_total: u64,
    /// Of the bytes, those that lay in lent memory.
    pub shm_bytes_total: u64,
    /// Of the bytes, those that lay in lent memory of a device.
    pub cuda_ipc_bytes_total: u64,
    /// RDMA ports in use.
    pub rails: usize,
    /// Of these, those whose card reads and writes the device's memory by itself.
    pub direct_rails: usize,
    /// Peers reached now over RDMA; those in neither count, of `peers`, over TCP.
    pub rdma_peers: usize,
    /// Peers on this host that read our memory.
    pub shm_peers: usize,
    /// Peers on this host that read our device's memory.
    pub cuda_ipc_peers: usize,
    /// Queue pairs connected.
    pub queue_pairs_total: u64,
    /// Times that a peer was used over TCP although RDMA was wanted, by reason.
    pub fallbacks_total: [(Fallback, u64); Fallback::ALL.len()],
}

/// Why a peer is used over TCP although RDMA was wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// The peer has no RDMA, or no queue pair could be connected to it.
    Refused,
    /// The peer did not answer the offer in time.
    NoAnswer,
    /// A queue pair of this side could not be made.
    Local,
    /// The queue pair broke here.
    Broken,
    /// The peer said that its side broke.
    PeerBroken,
}

impl Fallback {
    /// Every reason, in the order of the counters.
    pub const ALL: [Self; 5] = [Self::Refused, Self::NoAnswer, Self::Local, Self::Broken, Self::PeerBroken];

    /// Short name for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::NoAnswer => "no_answer",
            Self::Local => "local",
            Self::Broken => "broken",
            Self::PeerBroken => "peer_broken",
        }
    }
}

impl SenderCounters {
    /// Of what lay in memory lent that way.
    pub(crate) fn lent(&self, way: Transport) -> &Counter {
        if way == Transport::CudaIpc { &self.cuda_ipc_bytes } else { &self.shm_bytes }
    }

    pub(crate) fn fell_back(&self, why: Fallback) {
        if let Some(at) = Fallback::ALL.iter().position(|f| *f == why)
            && let Some(counter) = self.fallbacks.get(at)
        {
            counter.add(1);
        }
    }
}
