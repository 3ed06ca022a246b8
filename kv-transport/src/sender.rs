//! The sending side of a worker: opens tickets, keeps warm connections to the peers that issued them.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};

use crate::dial::{Unreached, dial};
use crate::error::PushError;
use crate::lend::Lender;
use crate::link::Link;
use crate::packing::Packing;
use crate::push::{Push, PushShared};
use crate::push_state::{FrameBounds, PushState};
use crate::socket::{Secure, Socket};
use crate::stats::{Fallback, SenderCounters, SenderStats};
use crate::stream::{Limits, Stream};
use crate::stream_rdma::{Lane, LaneConfig};
use crate::ticket::Ticket;
use crate::transport::Transport;
use crate::wire;
use crate::{Fabric, Grid, Identity, Region};

/// The knobs of a sender.
#[derive(Debug, Clone)]
pub struct SenderConfig {
    /// Connections to each peer (default 2).
    pub streams: usize,
    /// Bytes of one push that may be queued by [`Push::cells`] or sent, and not acknowledged (default 16 MiB).
    pub window_bytes: usize,
    /// A peer must be reached and answer by then (default 3 s).
    pub connect_timeout: Duration,
    /// No byte taken and no reply for this long, while one is due, ends a peer's connections (default 10 s).
    pub progress_timeout: Duration,
    /// Connections without a push for this long are closed (default 60 s).
    pub idle_timeout: Duration,
    /// Peers to keep connections to (default 256); those without a push give way.
    pub max_peers: usize,
    /// Most cells in one frame (default and bound 64).
    pub frame_cells: usize,
    /// Most bytes in one frame of several cells (default 1 MiB, bound 4 MiB).
    pub frame_bytes: usize,
    /// RDMA devices, with the region of this sender; none: TCP only (default).
    pub fabric: Option<Arc<Fabric>>,
    /// Pushes fail rather than use TCP (default false).
    pub require_rdma: bool,
    /// A peer that had to be used over TCP is offered a queue pair again after this long (default 5 s).
    pub rdma_retry: Duration,
    /// Peers on this host are let read our region, if it is shareable, unless RDMA is required (default true).
    pub lend: bool,
    /// Encrypts connections, and shows each side who the other one is (default: plain connections). Cells written by
    /// RDMA are not encrypted by it.
    pub secure: Option<Arc<dyn Secure>>,
}

impl Default for SenderConfig {
    fn default() -> Self {
        Self {
            streams: 2,
            window_bytes: 16 << 20,
            connect_timeout: Duration::from_secs(3),
            progress_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            max_peers: 256,
            frame_cells: wire::MAX_FRAME_CELLS,
            frame_bytes: 1 << 20,
            fabric: None,
            require_rdma: false,
            rdma_retry: Duration::from_secs(5),
            lend: true,
            secure: None,
        }
    }
}

/// The sending side. Cheap to clone. Connections live until idle, or until the last clone and push are gone.
#[derive(Debug, Clone)]
pub struct Sender {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    identity: Identity,
    region: Region,
    grid: Grid,
    config: SenderConfig,
    counters: Arc<SenderCounters>,
    peers: Mutex<HashMap<Identity, Arc<Peer>>>,
    /// Hands out the region's file, from the first peer on this host on; nothing where that cannot be.
    lender: OnceLock<Option<Lender>>,
}

/// One peer; the lock is held while connecting, so that others wait for the outcome.
#[derive(Debug, Default)]
struct Peer {
    link: tokio::sync::Mutex<Option<Arc<Link>>>,
}

impl Peer {
    fn now(&self) -> Option<Arc<Link>> {
        self.link.try_lock().ok()?.clone().filter(|link| !link.is_dead())
    }
}

impl Sender {
    /// A sender of cells laid out as `grid` in `region`.
    pub fn new(identity: Identity, region: Region, grid: Grid, config: SenderConfig) -> Self {
        Self::counting(Arc::default(), identity, region, grid, config)
    }

    /// Another sender of the same worker, from other memory. It has connections of its own; what it does is counted with what
    /// this one does, but for the gauges.
    pub fn beside(&self, region: Region, grid: Grid, config: SenderConfig) -> Self {
        Self::counting(Arc::clone(&self.shared.counters), self.shared.identity.clone(), region, grid, config)
    }

    fn counting(
        counters: Arc<SenderCounters>,
        identity: Identity,
        region: Region,
        grid: Grid,
        config: SenderConfig,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                identity,
                region,
                grid,
                config,
                counters,
                peers: Mutex::default(),
                lender: OnceLock::new(),
            }),
        }
    }

    /// Opens a ticket: reaches its receiver, on warm connections if there are any, and shows it the ticket, which must be accepted.
    /// `hold` keeps the source memory until nothing reads it.
    pub async fn open(&self, ticket: Bytes, hold: Arc<dyn Any + Send + Sync>) -> Result<Push, PushError> {
        let push = self.open_ahead(ticket, hold, None).await?;
        push.accepted().await?;
        Ok(push)
    }

    /// The same without waiting for the receiver's answer: cells and commit may follow at once, and a refusal ends the push. With a
    /// packing what goes over TCP goes packed; only for a receiver that is known to unpack it: another one refuses the ticket.
    pub async fn open_ahead(
        &self,
        ticket: Bytes,
        hold: Arc<dyn Any + Send + Sync>,
        packing: Option<Packing>,
    ) -> Result<Push, PushError> {
        let shared = &self.shared;
        let ticket = Ticket::decode(&ticket)?;
        let deadline = Instant::now() + Duration::from_millis(ticket.time_to_live_ms).min(FAR);
        shared.check_layout(&ticket)?;
        let mut link = shared.link(&ticket, deadline).await?;
        let bounds = FrameBounds {
            cells: shared.config.frame_cells.clamp(1, wire::MAX_FRAME_CELLS),
            // Of lent memory a frame only names cells, and the more it names the fewer copies there are.
            bytes: link.lent.map_or(shared.config.frame_bytes, |_| usize::MAX).min(wire::MAX_FRAME_BYTES),
            window_bytes: shared.config.window_bytes,
        };
        let cell_bytes = shared.grid.cell_bytes as usize;
        let packing = packing.filter(|packing| packing.packed_bytes(cell_bytes).is_some());
        let memory = || (shared.region.clone(), shared.grid, packing);
        let state = || PushState::new(shared.grid.planes as usize, ticket.slots.len(), cell_bytes, bounds);
        let new =
            |link| Arc::new(PushShared::new(ticket.clone(), deadline, state(), memory(), link, hold.clone()));
        let mut push = new(link.clone());
        let mut added = link.add(&push);
        if added == Err(PushError::PeerGone) {
            // The link died between two looks at it: once more, with a fresh one.
            link = shared.link(&ticket, deadline).await?;
            push = new(link.clone());
            added = link.add(&push);
        }
        added?;
        if let Some(packing) = packing.filter(|_| link.lent.is_none())
            && !link.packs.swap(true, Ordering::Relaxed)
        {
            let peer = &ticket.receiver.worker;
            tracing::info!(%peer, packing = packing.name(), "what goes to this peer over TCP is packed");
        }
        let push_handle = Push::new(push.clone());
        link.list(&push);
        if shared.config.require_rdma && !link.has_lanes() {
            return Err(PushError::Downgrade { reason: link.why_tcp() });
        }
        Ok(push_handle)
    }

    /// Puts every queue pair with a transfer under way into the error state, as a failing link does: for drills.
    #[doc(hidden)]
    pub fn break_queue_pairs(&self) {
        self.break_rails(u64::MAX);
    }

    /// The same for the rails whose bits are set.
    #[doc(hidden)]
    pub fn break_rails(&self, rails: u64) {
        self.shared.counters.broken_rails.store(rails, Ordering::Relaxed);
        self.shared.counters.breaks.add(1);
    }

    /// Counters and gauges.
    pub fn stats(&self) -> SenderStats {
        let shared = &self.shared;
        let links: Vec<_> = shared.peers.lock().values().filter_map(|peer| peer.now()).collect();
        let counters = &shared.counters;
        let lent = |way| links.iter().filter(|link| link.lent == Some(way)).count();
        SenderStats {
            pushes: links.iter().map(|link| link.pushes()).sum(),
            peers: links.len(),
            committed_total: counters.committed.get(),
            failed_total: counters.failed.get(),
            bytes_total: counters.bytes.get(),
            packed_bytes_total: counters.packed_bytes.get(),
            refetched_cells_total: counters.refetched_cells.get(),
            connects_total: counters.connects.get(),
            rdma_bytes_total: counters.rdma_bytes.get(),
            rails: shared.config.fabric.as_ref().map_or(0, |fabric| fabric.len()),
            direct_rails: shared.config.fabric.as_ref().map_or(0, |fabric| fabric.direct()),
            shm_bytes_total: counters.shm_bytes.get(),
            shm_peers: lent(Transport::Shm),
            cuda_ipc_bytes_total: counters.cuda_ipc_bytes.get(),
            cuda_ipc_peers: lent(Transport::CudaIpc),
            rdma_peers: links.iter().filter(|link| link.has_lanes()).count(),
            queue_pairs_total: counters.queue_pairs.get(),
            fallbacks_total: std::array::from_fn(|at| {
                let why = Fallback::ALL.get(at).copied().unwrap_or(Fallback::Refused);
                (why, counters.fallbacks.get(at).map_or(0, |counter| counter.get()))
            }),
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Pushes that are still open keep their link; the others close now.
        for peer in self.peers.get_mut().values() {
            if let Some(link) = peer.now() {
                link.close_if_idle();
            }
        }
    }
}

/// The longest a ticket is believed to live.
const FAR: Duration = Duration::from_secs(24 * 3600);

impl Shared {
    fn check_layout(&self, ticket: &Ticket) -> Result<(), PushError> {
        if (ticket.grid.planes, ticket.grid.cell_bytes) == (self.grid.planes, self.grid.cell_bytes) {
            return Ok(());
        }
        Err(PushError::Layout {
            theirs_planes: ticket.grid.planes,
            theirs_bytes: ticket.grid.cell_bytes,
            ours_planes: self.grid.planes,
            ours_bytes: self.grid.cell_bytes,
        })
    }

    /// A live link to the ticket's receiver, old or new.
    async fn link(&self, ticket: &Ticket, deadline: Instant) -> Result<Arc<Link>, PushError> {
        let peer = self.peer(&ticket.receiver)?;
        let mut slot = timeout_at(deadline, peer.link.lock()).await.map_err(|_| PushError::Expired)?;
        if let Some(link) = slot.as_ref().filter(|link| !link.is_dead()) {
            return Ok(link.clone());
        }
        *slot = None;
        let link = self.connect(ticket, deadline).await?;
        *slot = Some(link.clone());
        Ok(link)
    }

    /// The place of a peer in the table; makes room by closing the link of one without pushes.
    fn peer(&self, identity: &Identity) -> Result<Arc<Peer>, PushError> {
        let mut peers = self.peers.lock();
        if let Some(peer) = peers.get(identity) {
            return Ok(peer.clone());
        }
        peers.retain(|_, peer| Arc::strong_count(peer) > 1 || peer.now().is_some());
        let max = self.config.max_peers;
        if peers.len() >= max {
            let idle = |peer: &Arc<Peer>| {
                Arc::strong_count(peer) == 1 && peer.now().is_none_or(|link| link.close_if_idle())
            };
            let victim = peers.iter().find(|(_, peer)| idle(peer)).map(|(identity, _)| identity.clone());
            peers.remove(&victim.ok_or(PushError::Busy { max })?);
        }
        let peer = Arc::<Peer>::default();
        peers.insert(identity.clone(), peer.clone());
        Ok(peer)
    }

    async fn connect(&self, ticket: &Ticket, deadline: Instant) -> Result<Arc<Link>, PushError> {
        let mut reason = "the ticket names no endpoint".to_owned();
        for endpoint in &ticket.endpoints {
            let until = deadline.min(Instant::now() + self.config.connect_timeout);
            let connects = (0..self.config.streams.max(self.lanes()).max(1))
                .map(|_| dial(endpoint, &self.identity, &ticket.receiver, self.config.secure.as_deref()));
            match timeout_at(until, futures::future::try_join_all(connects)).await {
                Ok(Ok(mut sockets)) => {
                    let lent = timeout_at(until, self.lend(&mut sockets)).await;
                    match lent {
                        Ok(Ok(lent)) => return Ok(self.start(sockets, lent)),
                        Ok(Err(error)) => reason = format!("{endpoint}: lending it our memory: {error}"),
                        Err(_) => reason = format!("{endpoint}: no answer about shared memory in time"),
                    }
                }
                Ok(Err(Unreached::Refused(refusal))) => return Err(PushError::Refused(refusal)),
                Ok(Err(Unreached::Io(error))) => reason = format!("{endpoint}: {error}"),
                Err(_) => reason = format!("{endpoint}: no answer in time"),
            }
        }
        Err(PushError::Connect { endpoints: ticket.endpoints.join(", "), reason })
    }

    /// Lets a peer on this host read our memory, and how; nothing where it is elsewhere or cannot.
    async fn lend(&self, sockets: &mut [Socket]) -> std::io::Result<Option<Transport>> {
        let wanted = self.config.lend && !self.config.require_rdma && sockets.iter().all(Socket::is_local);
        let Some(file) = self.region.file().filter(|_| wanted) else { return Ok(None) };
        let files = || [file].into_iter().chain(self.region.device().map(|device| device.file())).collect();
        let start = || match Lender::start(files(), self.region.len()) {
            Ok(lender) => Some(lender),
            Err(error) => {
                tracing::info!(%error, "no shared memory with peers on this host");
                None
            }
        };
        let Some(lender) = self.lender.get_or_init(start) else { return Ok(None) };
        let mut lent = None;
        for socket in sockets {
            match lender.offer(socket).await? {
                None => return Ok(None),
                way => lent = way,
            }
        }
        Ok(lent)
    }

    fn start(&self, sockets: Vec<Socket>, lent: Option<Transport>) -> Arc<Link> {
        // Reading our memory beats every other way.
        let lanes = if lent.is_some() { 0 } else { self.lanes() };
        let link = Arc::new(Link::new(self.counters.clone(), lanes, lent));
        let limits = Limits { progress: self.config.progress_timeout, idle: self.config.idle_timeout };
        for (rail, socket) in sockets.into_iter().enumerate() {
            self.counters.connects.add(1);
            let lane = self.config.fabric.clone().filter(|_| rail < lanes).map(|fabric| {
                let SenderConfig { require_rdma: required, rdma_retry: retry, .. } = self.config;
                let patience = self.config.connect_timeout;
                Lane::new(LaneConfig { fabric, rail, required, retry, patience }, link.clone())
            });
            tokio::spawn(Stream::new(link.clone(), socket, limits, lane).run());
        }
        link
    }

    /// Queue pairs to each peer: one for every rail.
    fn lanes(&self) -> usize {
        self.config.fabric.as_ref().map_or(0, |fabric| fabric.len())
    }
}
