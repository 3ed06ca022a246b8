//! `DecodeWorker.Move`: a running sequence goes to another decode worker, KV and all.
//!
//! Full blocks never change, so they are pushed while the sequence goes on decoding. Only then it stops, and the
//! commit brings the tokens drawn meanwhile; the other worker computes their KV, less than a block or two, in its
//! first step. The sequence stands still for one round trip. Should the commit's fate stay unknown, both go on and
//! draw the same tokens: the router reads one of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::KvMemory;
use kv_transport::{Cell, CellQueue, Push, PushError, Refusal};
use prost::Message;
use proto::v1;
use tokio::sync::oneshot;
use tonic::Status;

use crate::cargo::Cargo;
use crate::engine_loop::{Order, Portrait};
use crate::service::{DecodeService, Kept};

/// How long a sequence may stand still for its commit before it goes on here.
const STOPPED_PATIENCE: Duration = Duration::from_secs(2);

impl DecodeService {
    pub(crate) async fn move_out(&self, call: v1::MoveRequest) -> Result<v1::MoveReply, Status> {
        if call.compat_hash != self.limits.compat_hash || call.incarnation != self.limits.incarnation {
            return Err(Status::failed_precondition(
                "the move is for another start or version of this worker",
            ));
        }
        let gone = || Status::not_found("the sequence does not run here (any more)");
        let portrait = self.ask(|reply| Order::Portray { id: call.request_id, attempt: call.attempt, reply });
        let portrait = portrait.await?.ok_or_else(gone)?;
        let group = portrait.group;

        let ticket = kv_transport::Ticket::decode(&call.ticket)
            .map_err(|e| Status::invalid_argument(format!("ticket: {e}")))?;
        let (cargo, slots) = self.cells_of(&portrait, &ticket.meta, ticket.slots.len())?;
        let kept = Arc::new(Kept { _blocks: portrait.into_blocks() });
        let push = self.sender.open(call.ticket, kept).await.map_err(push_error)?;
        let (kv, queue) = (Arc::clone(&self.kv), push.queue());
        tokio::task::spawn_blocking(move || queue_all(kv.as_ref(), &queue, &slots))
            .await
            .map_err(|_| Status::internal("the checksums could not be made"))?
            .map_err(push_error)?;
        push.settled().await.map_err(push_error)?;

        let stopped = Instant::now();
        let known = cargo.choices.iter().map(|own| (own.choice, own.known)).collect();
        let tokens = self.ask(|reply| Order::Stop { group, known, reply }).await?.ok_or_else(gone)?;
        let mut resume = ResumeOnDrop { service: self, group, moved: false };
        let kv = self.commit(push, tokens).await?;
        resume.moved = true;
        Ok(v1::MoveReply { kv: Some(kv), stopped_ms: stopped.elapsed().as_secs_f64() * 1e3 })
    }

    async fn commit(&self, push: Push, first: Vec<v1::SampledToken>) -> Result<v1::KvTransfer, Status> {
        let commit = push.commit(v1::Commit { first }.encode_to_vec().into());
        let report = tokio::time::timeout(STOPPED_PATIENCE, commit)
            .await
            .map_err(|_| Status::unavailable("the other decode worker does not acknowledge"))?
            .map_err(push_error)?;
        let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(v1::KvTransfer {
            bytes: report.bytes,
            blocks: count(report.cells / self.limits.layout.layers as u64),
            cached_blocks: 0,
            transport: report.transport.to_string(),
            refetched: count(report.refetched),
        })
    }

    /// Local blocks in the order of the ticket's slots; refuses a ticket that this sequence cannot fill.
    fn cells_of(&self, portrait: &Portrait, meta: &[u8], slots: usize) -> Result<(Cargo, Vec<u32>), Status> {
        let bad = |why: &str| Status::invalid_argument(format!("ticket: {why}"));
        let meta = v1::TicketMeta::decode(meta).map_err(|e| bad(&e.to_string()))?;
        if meta.compat_hash != self.limits.compat_hash {
            return Err(bad("made for another model or version"));
        }
        let (cargo, held) = Cargo::from_meta(&meta, slots).ok_or_else(|| bad("its slots do not add up"))?;
        let not_yet = || Status::unavailable("the KV of this sequence is not all here now");
        let mut cells = Vec::with_capacity(slots);
        for (at, own) in cargo.choices.iter().enumerate() {
            let full = portrait.full_blocks(own.choice).ok_or_else(not_yet)?;
            let table = full.get(..cargo.shared + own.blocks).ok_or_else(not_yet)?;
            let from = if at == 0 { held } else { cargo.shared };
            cells.extend(&table[from..]);
        }
        Ok((cargo, cells))
    }

    /// Asks the engine's loop.
    async fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        self.order(order(reply))?;
        answer.await.map_err(|_| Status::unavailable("the engine of this decode worker has stopped"))
    }
}

fn queue_all(kv: &dyn KvMemory, queue: &CellQueue, slots: &[u32]) -> Result<(), PushError> {
    for layer in 0..kv.layout().layers {
        let cell =
            |(index, slot): (u32, &u32)| Cell { index, src_slot: *slot, checksum: kv.checksum(layer, *slot) };
        let plane = u32::try_from(layer).unwrap_or(u32::MAX);
        queue.send(plane, (0..).zip(slots).map(cell).collect())?;
    }
    Ok(())
}

/// A stopped sequence goes on here, unless it was moved.
struct ResumeOnDrop<'a> {
    service: &'a DecodeService,
    group: u64,
    moved: bool,
}

impl Drop for ResumeOnDrop<'_> {
    fn drop(&mut self) {
        let order = if self.moved { Order::Moved(self.group) } else { Order::GoOn(self.group) };
        // Without an engine there is nothing to go on.
        let _ = self.service.order(order);
    }
}

/// A move that failed; the sequence goes on here.
fn push_error(error: PushError) -> Status {
    let text = format!("KV move: {error}");
    match error {
        PushError::Ticket(_) | PushError::Layout { .. } => Status::invalid_argument(text),
        PushError::Refused(Refusal::Corrupt) | PushError::Corrupt => Status::data_loss(text),
        PushError::Refused(_) | PushError::Closed => Status::aborted(text),
        _ => Status::unavailable(text),
    }
}
