//! `PrefillWorker.Prefill`: open the ticket → compute, pushing layer by layer → commit. One screen.

use std::sync::Arc;
use std::sync::mpsc::Sender as Inbox;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cluster::Load;
use futures::stream::BoxStream;
use futures::{FutureExt, TryFutureExt};
use kv_transport::{Push, PushReport, Sender};
use prost::Message;
use proto::v1;
use telemetry::trace::{Span, Tracer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tonic::{Response, Status};
use worker::attempts::{Attempts, Running};
use worker::metrics::Refusals;
use worker::request::{Limits, load_to_wire, sampled_to_wire, traceparent};
use worker::{Request, pulse, serve};

use crate::error;
use crate::job::{Computed, Job, Progress, Source};
use crate::stage::{Stage, Stages};

/// The gRPC face of a prefill worker.
#[derive(Clone)]
pub(crate) struct PrefillService {
    pub limits: Arc<Limits>,
    pub sender: Sender,
    pub stages: Arc<Stages>,
    pub engine: Inbox<Job>,
    pub slots: Arc<Semaphore>,
    pub attempts: Attempts,
    pub load: Arc<watch::Sender<Load>>,
    pub refusals: Refusals,
    pub tracer: Tracer,
}

#[tonic::async_trait]
impl v1::prefill_worker_server::PrefillWorker for PrefillService {
    type PrefillStream = BoxStream<'static, Result<v1::PrefillEvent, Status>>;

    async fn prefill(
        &self,
        call: tonic::Request<v1::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let span = self.tracer.serve("prefill", traceparent(&call));
        let call = call.into_inner();
        let ticket = call.ticket.clone();
        let accepted = self.accept(call).map_err(|status| self.refusals.count(status))?;
        let work = self.clone().work(accepted, ticket, span);
        let last = work.map_ok(|reply| v1::PrefillEvent { reply: Some(reply) });
        Ok(Response::new(pulse::until(last.boxed(), Ok(v1::PrefillEvent::default()))))
    }
}

/// A request that was taken on, and what it holds until its end.
type Accepted = (Arc<Request>, Running, OwnedSemaphorePermit);

impl PrefillService {
    /// All of a request, to its reply.
    async fn work(
        self,
        (request, attempt, _slot): Accepted,
        ticket: Bytes,
        span: Span,
    ) -> Result<v1::PrefillReply, Status> {
        let began = Instant::now();
        let work = async {
            let source = Arc::new(Source::default());
            let stage = self.stages.wanted(&ticket, &self.sender)?;
            let sender = stage.as_ref().map_or(&self.sender, |stage| &stage.sender);
            let packing = self.stages.packing(&ticket, stage.as_deref());
            let push = sender.open_ahead(ticket, Arc::clone(&source) as _, packing);
            let push = push.await.map_err(error::push)?;
            let is_converted = stage.is_some();
            let computed = self.compute(&request, &push, source, stage).await?;
            let (report, exposed) = self.commit(&request, push, &computed).await?;
            trace(&span, began, &computed, &report);
            if is_converted {
                self.stages.converted.increment(report.cells / self.limits.layout.layers as u64);
            }
            Ok(self.reply(&computed, &report, exposed, is_converted))
        };
        tokio::select! {
            reply = work => reply,
            why = attempt.ended() => Err(why),
            () = passed(request.deadline) => Err(Status::deadline_exceeded("the deadline passed during prefill")),
        }
    }

    fn accept(&self, call: v1::PrefillRequest) -> Result<Accepted, Status> {
        if self.load.borrow().draining {
            return Err(Status::unavailable("this prefill worker is draining"));
        }
        let request = Request::from_wire(call.sequence, &call.compat_hash, call.incarnation, &self.limits)?;
        let attempt = self.attempts.start(&request.key, request.attempt)?;
        let slot = Arc::clone(&self.slots)
            .try_acquire_owned()
            .map_err(|_| serve::shed("the queue of this prefill worker is full"))?;
        Ok((Arc::new(request), attempt, slot))
    }

    async fn compute(
        &self,
        request: &Arc<Request>,
        push: &Push,
        source: Arc<Source>,
        stage: Option<Arc<Stage>>,
    ) -> Result<Computed, Status> {
        let meta = v1::TicketMeta::decode(push.meta().clone())
            .map_err(|e| Status::invalid_argument(format!("ticket.meta: {e}")))?;
        let first_block = meta.first_block as usize;
        let target = stage.as_ref().map_or(&self.limits.layout, |stage| stage.conversion.to());
        let blocks = target.blocks_for(request.stem.len());
        if stage.is_some() && blocks - first_block.min(blocks) > target.blocks {
            return Err(serve::shed(&format!(
                "{blocks} converted blocks are wanted and --convert-mib has room for {}",
                target.blocks
            )));
        }
        if meta.compat_hash != self.limits.compat_hash || first_block + push.slots() != blocks {
            return Err(Status::invalid_argument(format!(
                "ticket: {} slots from block {first_block} on do not fit a prompt of {blocks} blocks of this model",
                push.slots()
            )));
        }
        if let Some(form) = &request.form {
            form.compiled().await;
        }
        let (done, computed) = oneshot::channel();
        let job = Job {
            request: Arc::clone(request),
            source,
            cells: push.queue(),
            first_block,
            stage,
            staged: Vec::new(),
            done,
            submitted: Instant::now(),
            progress: Progress::default(),
        };
        let stopped = || Status::unavailable("the engine of this prefill worker has stopped");
        self.engine.send(job).map_err(|_| stopped())?;
        tokio::select! {
            computed = computed => computed.map_err(|_| stopped())?,
            failed = push.failed() => Err(error::push(failed)),
        }
    }

    async fn commit(
        &self,
        request: &Request,
        push: Push,
        computed: &Computed,
    ) -> Result<(PushReport, f64), Status> {
        let position = request.stem_output().len();
        let first = request
            .drawn_at_stem()
            .zip(&computed.first)
            .map(|(choice, sampled)| sampled_to_wire(choice, position, sampled, &request.sampling))
            .collect();
        let payload = v1::Commit { first }.encode_to_vec();
        let report = push.commit(payload.into()).await.map_err(error::push)?;
        Ok((report, computed.at.elapsed().as_secs_f64() * 1e3))
    }

    fn reply(
        &self,
        computed: &Computed,
        report: &PushReport,
        exposed_transfer_ms: f64,
        converted: bool,
    ) -> v1::PrefillReply {
        let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        v1::PrefillReply {
            timing: Some(v1::PrefillTiming {
                queue_ms: computed.queue_ms,
                prefill_ms: computed.prefill_ms,
                exposed_transfer_ms,
                cached_tokens: count(computed.cached_tokens as u64),
            }),
            kv: Some(v1::KvTransfer {
                bytes: report.bytes,
                blocks: count(report.cells / self.limits.layout.layers as u64),
                cached_blocks: 0,
                transport: report.transport.to_string(),
                refetched: count(report.refetched),
                converted,
                packed_bytes: report.packed_bytes,
            }),
            load: Some(load_to_wire(&self.load.borrow())),
        }
    }
}

/// Where the span's time went: until the ticket was good, waiting for the engine, computing, and what the push still took.
fn trace(span: &Span, began: Instant, computed: &Computed, report: &PushReport) {
    let ms = |ms: f64| Duration::from_secs_f64(ms.max(0.0) / 1e3);
    let started = computed.at - ms(computed.prefill_ms);
    let submitted = started - ms(computed.queue_ms);
    span.part("open ticket", began, submitted);
    span.part("queue", submitted, started);
    span.part("compute", started, computed.at);
    span.part("exposed transfer", computed.at, Instant::now());
    span.set("tandem.kv.bytes", i64::try_from(report.bytes).unwrap_or(i64::MAX));
    span.set("tandem.kv.packed_bytes", i64::try_from(report.packed_bytes).unwrap_or(i64::MAX));
    span.set("tandem.kv.transport", report.transport.to_string());
}

async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
