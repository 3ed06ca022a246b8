//! The receiving side of a worker: reservations, the table of transfers, its connections' entry point.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::borrow::Borrowed;
use crate::error::{Refusal, ReserveError, TicketError};
use crate::landing_shared::{LandingFacts, LandingShared};
use crate::landing_state::{LandingEnd, LandingPhase};
use crate::mux::KvIncoming;
use crate::packing::Packing;
use crate::socket::Socket;
use crate::stats::{ReceiverCounters, ReceiverStats};
use crate::ticket::{Secret, Ticket};
use crate::{Fabric, Grid, Identity, Landing, Region};

/// Ended transfers a receiver remembers, to tell late writers why and to answer a repeated commit.
const REMEMBERED: usize = 4096;

/// The knobs of a receiver.
#[derive(Debug, Clone)]
pub struct ReceiverConfig {
    /// Transfers at a time (default 1024).
    pub max_transfers: usize,
    /// Connections at a time (default 1024).
    pub max_connections: usize,
    /// Transfers that one connection may have attached at a time (default 1024).
    pub max_attached: usize,
    /// A receiving transfer without a byte for this long has failed (default 10 s).
    pub progress_timeout: Duration,
    /// A connection must have said hello by then (default 5 s).
    pub hello_timeout: Duration,
    /// A connection without a frame for this long is closed (default 10 min; senders close theirs earlier).
    pub idle_timeout: Duration,
    /// A sender must confirm by then that it writes no more into a landing that is over; then its key is taken
    /// back, or its queue pair torn down (default 500 ms).
    pub fence_timeout: Duration,
    /// RDMA devices, with the region of this receiver; none: TCP only (default).
    pub fabric: Option<Arc<Fabric>>,
    /// Cells that come over TCP are refused (default false).
    pub require_rdma: bool,
    /// Only encrypted connections are taken, and only of peers whose certificate speaks for the worker that they say
    /// they are (default false).
    pub secure: bool,
    /// Memory that a sender on this host lends is read instead of a connection (default true).
    pub borrow: bool,
    /// How cells may come packed over TCP; whole rows of it must make a cell (default: not at all).
    pub packing: Option<Packing>,
    /// Where this receiver can be reached, `host:port`, best first; goes into every ticket (default empty).
    pub endpoints: Vec<String>,
}

impl Default for ReceiverConfig {
    fn default() -> Self {
        Self {
            max_transfers: 1024,
            max_connections: 1024,
            max_attached: 1024,
            progress_timeout: Duration::from_secs(10),
            hello_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(600),
            fence_timeout: Duration::from_millis(500),
            fabric: None,
            require_rdma: false,
            secure: false,
            borrow: true,
            packing: None,
            endpoints: Vec::new(),
        }
    }
}

/// What to reserve.
#[derive(Debug)]
pub struct Reserve<H> {
    /// Slots to be written on every plane, each once; cells name them by their index here.
    pub slots: Vec<u32>,
    /// Words for the sending side, carried by the ticket.
    pub meta: Bytes,
    /// The caller's count of attempts for the same request.
    pub attempt: u32,
    /// The worker that may write: the ticket is worthless in other hands. Anybody's when not given.
    pub sender: Option<String>,
    /// The landing must be committed by then.
    pub deadline: Instant,
    /// Ownership of the slots. Kept until nothing can write them, then yielded or dropped.
    pub hold: H,
}

/// The receiving side. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Receiver {
    pub(crate) shared: Arc<ReceiverShared>,
}

#[derive(Debug)]
pub(crate) struct ReceiverShared {
    pub(crate) identity: Identity,
    pub(crate) region: Region,
    pub(crate) grid: Grid,
    pub(crate) config: ReceiverConfig,
    pub(crate) counters: ReceiverCounters,
    pub(crate) stop: CancellationToken,
    pub(crate) connections: AtomicUsize,
    /// What senders lend now.
    pub(crate) borrowed: Mutex<Vec<Weak<Borrowed>>>,
    generation: AtomicU64,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    live: HashMap<u128, Arc<LandingShared>>,
    ended: HashMap<u128, Option<LandingEnd>>,
    order: VecDeque<u128>,
}

/// What the receiver knows about a transfer id.
pub(crate) enum Known {
    Live(Arc<LandingShared>),
    Ended(Refusal),
    Never,
}

impl Receiver {
    /// A receiver of cells laid out as `grid` in `region`.
    pub fn new(identity: Identity, region: Region, grid: Grid, config: ReceiverConfig) -> Self {
        let shared = ReceiverShared {
            identity,
            region,
            grid,
            config,
            counters: ReceiverCounters::default(),
            stop: CancellationToken::new(),
            connections: AtomicUsize::new(0),
            borrowed: Mutex::default(),
            generation: AtomicU64::new(1),
            table: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.shared.identity
    }

    /// How cells may come packed to it.
    pub fn packing(&self) -> Option<Packing> {
        self.shared.config.packing
    }

    /// Reserves slots and issues the ticket to write them. On an error the hold is dropped.
    pub fn reserve<H: Send + 'static>(&self, reserve: Reserve<H>) -> Result<Landing<H>, ReserveError> {
        let Reserve { slots, meta, attempt, sender, deadline, hold } = reserve;
        let shared = &self.shared;
        let time_to_live = deadline.saturating_duration_since(tokio::time::Instant::now().into_std());
        if time_to_live.is_zero() {
            return Err(ReserveError::Expired);
        }
        let cells = shared.check_slots(&slots)?;
        let ticket = Ticket {
            transfer: rand::random(),
            secret: Secret::random(),
            receiver: shared.identity.clone(),
            generation: shared.generation.fetch_add(1, Ordering::Relaxed),
            attempt,
            endpoints: shared.config.endpoints.clone(),
            grid: shared.grid,
            slots,
            meta,
            time_to_live_ms: u64::try_from(time_to_live.as_millis()).unwrap_or(u64::MAX),
        };
        let bytes = ticket.encode()?;
        let facts = LandingFacts {
            transfer: ticket.transfer,
            secret: ticket.secret,
            generation: ticket.generation,
            attempt,
            meant_for: sender,
            slots: ticket.slots,
            cells,
            cell_bytes: shared.grid.cell_bytes as usize,
            deadline: tokio::time::Instant::from_std(deadline),
            progress_timeout: shared.config.progress_timeout,
        };
        let landing = Arc::new(LandingShared::new(facts, Box::new(hold), Arc::downgrade(shared)));
        shared.insert(landing.clone())?;
        Ok(Landing::new(landing, bytes))
    }

    /// Serves one connection that begins with the transport's magic, until it closes.
    pub async fn serve(&self, stream: impl Into<Socket>) {
        crate::serve::serve(self.shared.clone(), stream.into()).await;
    }

    /// Serves every connection the mux hands over, each on its own task, until the mux or the receiver ends.
    pub async fn serve_all(&self, mut incoming: KvIncoming) {
        loop {
            let next = tokio::select! {
                next = incoming.next() => next,
                () = self.shared.stop.cancelled() => None,
            };
            let Some(stream) = next else { return };
            let receiver = self.clone();
            tokio::spawn(async move { receiver.serve(stream).await });
        }
    }

    /// Counters and gauges. Also notices reservations whose time is over.
    pub fn stats(&self) -> ReceiverStats {
        let shared = &self.shared;
        let live: Vec<_> = shared.table.lock().live.values().cloned().collect();
        let now = tokio::time::Instant::now();
        let (mut reserved, mut receiving, mut revoking) = (0, 0, 0);
        for landing in live {
            landing.check_time(now);
            match landing.phase() {
                LandingPhase::Reserved => reserved += 1,
                LandingPhase::Receiving => receiving += 1,
                LandingPhase::Revoking => revoking += 1,
                LandingPhase::Committed | LandingPhase::Void => {}
            }
        }
        let counters = &shared.counters;
        let mut voided_total = LandingEnd::ALL.map(|end| (end, 0));
        for ((_, total), counter) in voided_total.iter_mut().zip(&counters.voided) {
            *total = counter.get();
        }
        ReceiverStats {
            reserved,
            receiving,
            revoking,
            connections: shared.connections.load(Ordering::Relaxed),
            committed_total: counters.committed.get(),
            voided_total,
            bytes_total: counters.bytes.get(),
            packed_bytes_total: counters.packed_bytes.get(),
            discarded_bytes_total: counters.discarded_bytes.get(),
            duplicate_cells_total: counters.duplicate_cells.get(),
            rdma_bytes_total: counters.rdma_bytes.get(),
            shm_bytes_total: counters.shm_bytes.get(),
            cuda_ipc_bytes_total: counters.cuda_ipc_bytes.get(),
            queue_pairs_total: counters.queue_pairs.get(),
            queue_pairs_lost_total: counters.queue_pairs_lost.get(),
            checksum_failures_total: counters.checksum_failures.get(),
            stale_refused_total: counters.stale_refused.get(),
            forged_refused_total: counters.forged_refused.get(),
            misused_refused_total: counters.misused_refused.get(),
            identity_refused_total: counters.identity_refused.get(),
            protocol_errors_total: counters.protocol_errors.get(),
        }
    }

    /// Puts every queue pair with a transfer under way into the error state, as a failing link does: for drills.
    #[doc(hidden)]
    pub fn break_queue_pairs(&self) {
        self.shared.counters.breaks.add(1);
    }

    /// Ends every transfer and connection; later reservations are refused.
    pub fn shutdown(&self) {
        self.shared.stop.cancel();
        let live: Vec<_> = self.shared.table.lock().live.values().cloned().collect();
        for landing in live {
            landing.revoke(LandingEnd::Shutdown, "");
        }
    }
}

impl ReceiverShared {
    /// Every slot inside the region and named once; yields the number of cells.
    fn check_slots(&self, slots: &[u32]) -> Result<usize, ReserveError> {
        let mut seen = HashSet::with_capacity(slots.len());
        for &slot in slots {
            if !seen.insert(slot) || !self.grid.is_sane() || !self.grid.covers(&[slot], self.region.len()) {
                return Err(ReserveError::BadSlot { slot });
            }
        }
        self.grid.cells_of(slots.len()).ok_or(ReserveError::Ticket(TicketError::TooLarge))
    }

    fn insert(&self, landing: Arc<LandingShared>) -> Result<(), ReserveError> {
        let mut table = self.table.lock();
        // Under the lock, so that a shutdown either sees this landing or is seen here.
        if self.stop.is_cancelled() {
            return Err(ReserveError::Shutdown);
        }
        if table.live.len() >= self.config.max_transfers {
            return Err(ReserveError::Full { max: self.config.max_transfers });
        }
        table.live.insert(landing.transfer, landing);
        Ok(())
    }

    /// A landing is committed (no end) or void.
    pub(crate) fn finished(&self, transfer: u128, end: Option<LandingEnd>) {
        match end {
            None => self.counters.committed.add(1),
            Some(end) => self.counters.voided(end),
        }
        let mut table = self.table.lock();
        let landing = table.live.remove(&transfer);
        if table.ended.insert(transfer, end).is_none() {
            table.order.push_back(transfer);
        }
        if table.order.len() > REMEMBERED
            && let Some(oldest) = table.order.pop_front()
        {
            table.ended.remove(&oldest);
        }
        drop(table);
        drop(landing);
    }

    pub(crate) fn known(&self, transfer: u128) -> Known {
        let table = self.table.lock();
        if let Some(landing) = table.live.get(&transfer) {
            return Known::Live(landing.clone());
        }
        match table.ended.get(&transfer) {
            Some(Some(end)) => Known::Ended(end.refusal()),
            Some(None) => Known::Ended(Refusal::Stale),
            None => Known::Never,
        }
    }
}
