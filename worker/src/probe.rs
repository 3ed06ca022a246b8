//! Test pushes between two workers, for `tandem doctor`: the real transport, pools and checksums, and nothing kept.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use engine::KvMemory;
use engine::kv::pool::{Block, BlockPool, BlockState};
use futures::future::BoxFuture;
use kv_transport::{Cell, PushError, Sender, Ticket};
use parking_lot::Mutex;
use proto::v1;
use tonic::Status;

/// Blocks that are sent again and again.
const SOURCES: usize = 4;

/// What a worker does for a probe.
pub trait Probe: Send + Sync {
    /// Makes room for about so many bytes from the worker `from`; the right to write them. The room is free again as soon as
    /// they have come, or did not.
    fn reserve(&self, bytes: u64, from: String) -> Result<Bytes, Status> {
        let _ = (bytes, from);
        Err(Status::failed_precondition("nothing can be pushed to a prefill worker"))
    }

    /// Fills what a ticket reserves.
    fn push(&self, ticket: Bytes) -> BoxFuture<'_, Result<v1::PushProbeReply, Status>>;
}

/// Milliseconds since 1970 by this machine's clock.
pub fn unix_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64() * 1e3)
}

/// Fills what a ticket reserves with whatever lies in a few free blocks.
pub async fn push(
    sender: &Sender,
    pool: &Arc<BlockPool>,
    kv: &Arc<dyn KvMemory>,
    ticket: Bytes,
) -> Result<v1::PushProbeReply, Status> {
    let slots =
        Ticket::decode(&ticket).map_err(|e| Status::invalid_argument(format!("ticket: {e}")))?.slots.len();
    let sources = SOURCES.min(slots.max(1)).min(pool.available());
    let blocks = pool.alloc(sources.max(1), BlockState::Running);
    let blocks = blocks.map_err(|e| Status::resource_exhausted(format!("nothing to send from: {e}")))?;
    let ids: Vec<u32> = blocks.iter().map(Block::id).collect();
    let layers = kv.layout().layers;
    // The bytes are read from host memory, so what lies there is what counts.
    let sums: Vec<Vec<u32>> =
        (0..layers).map(|layer| ids.iter().map(|id| kv.checksum(layer, *id)).collect()).collect();
    let began = Instant::now();
    let push = sender.open_ahead(ticket, Arc::new(Mutex::new(blocks)), None).await.map_err(status)?;
    for (layer, sums) in sums.iter().enumerate() {
        let cell = |index: usize| {
            let at = index % ids.len();
            Cell { index: index as u32, src_slot: ids[at], checksum: sums[at] }
        };
        let cells: Vec<Cell> = (0..slots).map(cell).collect();
        push.cells(layer as u32, &cells).await.map_err(status)?;
    }
    let report = push.commit(Bytes::new()).await.map_err(status)?;
    Ok(v1::PushProbeReply {
        bytes: report.bytes,
        total_ms: began.elapsed().as_secs_f64() * 1e3,
        transport: report.transport.to_owned(),
    })
}

fn status(error: PushError) -> Status {
    let text = format!("KV push: {error}");
    match error {
        PushError::Layout { .. } => Status::failed_precondition(text),
        _ => Status::unavailable(text),
    }
}
