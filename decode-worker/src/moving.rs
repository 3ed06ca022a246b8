//! `DecodeWorker.Move`: a running sequence goes to another decode worker, KV and all.
//!
//! Full blocks never change, so they are pushed while the sequence goes on decoding. Only then it stops; what is
//! left, a block or two, and the tokens drawn meanwhile follow, and the other worker goes on with an ordinary step.
//! The sequence stands still for about one round trip. Should the commit's fate stay unknown, both go on and draw the
//! same tokens: the router reads one of them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::KvMemory;
use kv_transport::{Cell, CellQueue, Push, PushError, Refusal};
use prost::Message;
use proto::v1;
use tokio::sync::oneshot;
use tonic::Status;
use worker::request::Key;

use crate::cargo::Cargo;
use crate::order::{Order, Portrait};
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
        let key = Key::new(&call.origin, &call.request_id);
        let portrait = self.ask(|reply| Order::Portray { key, attempt: call.attempt, reply });
        let portrait = portrait.await?.ok_or_else(gone)?;
        let group = portrait.group;
        let ticket = kv_transport::Ticket::decode(&call.ticket)
            .map_err(|e| Status::invalid_argument(format!("ticket: {e}")))?;
        let plan = self.plan(&ticket)?;
        let full = plan.cells(&portrait).ok_or_else(not_yet)?;
        let kept = Arc::new(Kept::default());
        kept.0.lock().extend(portrait.into_blocks());
        let push = self.sender.open(call.ticket, Arc::clone(&kept) as _).await.map_err(push_error)?;
        self.queue(&push, full.clone()).await?;
        push.settled().await.map_err(push_error)?;

        let stopped = Instant::now();
        let known = plan.cargo.choices.iter().map(|own| (own.choice, own.known)).collect();
        let (tokens, portrait) =
            self.ask(|reply| Order::Stop { group, known, reply }).await?.ok_or_else(gone)?;
        let mut resume = ResumeOnDrop { service: self, group, moved: false };
        let rest = plan.rest(&portrait, &full).ok_or_else(not_yet)?;
        kept.0.lock().extend(portrait.into_blocks());
        self.queue(&push, rest).await?;
        let kv = self.commit(push, tokens).await?;
        resume.moved = true;
        Ok(v1::MoveReply { kv: Some(kv), stopped_ms: stopped.elapsed().as_secs_f64() * 1e3 })
    }

    fn plan(&self, ticket: &kv_transport::Ticket) -> Result<Plan, Status> {
        let bad = |why: &str| Status::invalid_argument(format!("ticket: {why}"));
        let meta = v1::TicketMeta::decode(ticket.meta.clone()).map_err(|e| bad(&e.to_string()))?;
        if meta.compat_hash != self.limits.compat_hash {
            return Err(bad("made for another model or version"));
        }
        // What runs is not converted: it would stand still for as long as that takes.
        if meta.form.as_ref().is_some_and(|form| *form != self.limits.form()) {
            return Err(Status::failed_precondition(
                "the other worker's KV has another block size or type: only equal ones move",
            ));
        }
        let (cargo, held) =
            Cargo::from_meta(&meta, ticket.slots.len()).ok_or_else(|| bad("its slots do not add up"))?;
        Ok(Plan { cargo, held })
    }

    /// Queues cells on every layer, with checksums made now, off the async threads.
    async fn queue(&self, push: &Push, cells: Vec<(u32, u32)>) -> Result<(), Status> {
        let (kv, queue) = (Arc::clone(&self.kv), push.queue());
        tokio::task::spawn_blocking(move || queue_all(kv.as_ref(), &queue, &cells))
            .await
            .map_err(|_| Status::internal("the checksums could not be made"))?
            .map_err(push_error)
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
            converted: false,
            packed_bytes: report.packed_bytes,
        })
    }

    /// Asks the engine's loop.
    async fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        self.order(order(reply))?;
        answer.await.map_err(|_| Status::unavailable("the engine of this decode worker has stopped"))
    }
}

/// The slots of a ticket, and what fills them.
struct Plan {
    cargo: Cargo,
    held: usize,
}

impl Plan {
    /// (index in the ticket, local block) of every slot that a block of the portrait fills. None when the shared ones are not all here.
    fn cells(&self, portrait: &Portrait) -> Option<Vec<(u32, u32)>> {
        let mut cells = Vec::new();
        let mut index = 0;
        for (at, own) in self.cargo.choices.iter().enumerate() {
            let blocks = portrait.blocks(own.choice).filter(|b| b.len() >= self.cargo.shared)?;
            let from = if at == 0 { self.held } else { self.cargo.shared };
            let to = self.cargo.shared + own.blocks;
            cells.extend((index..).zip(blocks.iter().copied().take(to).skip(from)));
            index += u32::try_from(to - from).ok()?;
        }
        Some(cells)
    }

    /// What is left of a sequence that stands still. Slots without a block hold room for later tokens: anything
    /// may fill them.
    fn rest(&self, portrait: &Portrait, sent: &[(u32, u32)]) -> Option<Vec<(u32, u32)>> {
        let used = self.cells(portrait)?;
        let filler = portrait.blocks(self.cargo.choices.first()?.choice)?.first().copied()?;
        let slots = u32::try_from(self.cargo.slots(self.held)).ok()?;
        let mut filled: Vec<u32> = vec![filler; slots as usize];
        used.iter().for_each(|(index, block)| filled[*index as usize] = *block);
        let sent: HashSet<u32> = sent.iter().map(|(index, _)| *index).collect();
        Some((0..slots).zip(filled).filter(|(index, _)| !sent.contains(index)).collect())
    }
}

fn queue_all(kv: &dyn KvMemory, queue: &CellQueue, cells: &[(u32, u32)]) -> Result<(), PushError> {
    for layer in 0..kv.layout().layers {
        let cell = |&(index, src_slot): &(u32, u32)| Cell {
            index,
            src_slot,
            checksum: kv.source_checksum(layer, src_slot),
        };
        queue.send(u32::try_from(layer).unwrap_or(u32::MAX), cells.iter().map(cell).collect())?;
    }
    Ok(())
}

fn not_yet() -> Status {
    Status::unavailable("the KV of this sequence is not all here now")
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
