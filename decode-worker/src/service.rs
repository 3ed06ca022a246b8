//! `DecodeWorker.Decode`: reserve → land → tokens. One request, one screen.

use std::sync::Arc;
use std::sync::mpsc::Sender as Inbox;
use std::time::Duration;

use cluster::Load;
use engine::KvMemory;
use engine::kv::pool::{Block, BlockPool};
use kv_transport::{Receiver, Sender};
use proto::v1::{self, decode_event::Event};
use telemetry::trace::{Span, Tracer};
use telemetry::{Counter, Family};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Response, Status};
use worker::attempts::{Attempts, Observer};
use worker::metrics::Refusals;
use worker::request::{Limits, load_to_wire, traceparent};
use worker::{Request, pulse, serve};

use crate::cargo::Cargo;
use crate::order::{Events, Hold, Order, Start, Submission};
use crate::outlook::{Expected, Outlook, Wanted};

type Stream = UnboundedReceiverStream<Result<v1::DecodeEvent, Status>>;

/// The gRPC face of a decode worker.
#[derive(Clone)]
pub(crate) struct DecodeService {
    pub limits: Arc<Limits>,
    pub pool: Arc<BlockPool>,
    pub kv: Arc<dyn KvMemory>,
    pub receiver: Receiver,
    /// Whether every ticket must name who may use it.
    pub is_secure: bool,
    pub sender: Sender,
    pub engine: Inbox<Order>,
    pub slots: Arc<Semaphore>,
    pub attempts: Attempts,
    pub load: Arc<watch::Sender<Load>>,
    pub reservation: Duration,
    pub outlook: Outlook,
    pub no_room: Arc<Family<Counter>>,
    pub refusals: Refusals,
    pub tracer: Tracer,
}

#[tonic::async_trait]
impl v1::decode_worker_server::DecodeWorker for DecodeService {
    type DecodeStream = Stream;

    async fn decode(
        &self,
        call: tonic::Request<v1::DecodeRequest>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        let span = self.tracer.serve("decode", traceparent(&call));
        self.start(call.into_inner(), span).map(Response::new).map_err(|status| self.refusals.count(status))
    }

    async fn r#move(&self, call: tonic::Request<v1::MoveRequest>) -> Result<Response<v1::MoveReply>, Status> {
        self.move_out(call.into_inner())
            .await
            .map(Response::new)
            .map_err(|status| self.refusals.count(status))
    }
}

impl DecodeService {
    /// Reserves room for a request and opens its stream.
    fn start(&self, call: v1::DecodeRequest, span: Span) -> Result<Stream, Status> {
        if self.load.borrow().draining {
            return Err(Status::unavailable("this decode worker is draining"));
        }
        let request = Request::from_wire(call.sequence, &call.compat_hash, call.incarnation, &self.limits)?;
        let request = Arc::new(request);
        let attempt = Arc::new(self.attempts.start(&request.key, request.attempt)?);
        let open = u32::try_from(request.open.len()).unwrap_or(u32::MAX);
        let slot = Arc::clone(&self.slots)
            .try_acquire_many_owned(open)
            .map_err(|_| serve::shed("all sequence slots of this decode worker are taken"))?;
        let block_tokens = self.limits.layout.block_tokens;
        let cargo = call.moving.then(|| Cargo::of(&request, block_tokens));
        let reusable = request.reusable(block_tokens);
        let reusable = &reusable[..cargo.as_ref().map_or(reusable.len(), |c| c.shared.min(reusable.len()))];
        let cached = self.pool.lookup(reusable);
        let cached_blocks = cached.len();
        let expected = self.expect(&request, cached_blocks, call.moving)?;
        let hold = Hold { _slot: slot, expected, attempt, span };
        hold.span.set("tandem.kv.cached_blocks", i64::try_from(cached_blocks).unwrap_or(i64::MAX));
        let uncached = request.stem.len() - cached_blocks * block_tokens;
        let (events, stream) = mpsc::unbounded_channel();
        tokio::spawn(stay_heard(hold.attempt.observer(), self.load.subscribe(), events.downgrade()));
        if cargo.is_none() && uncached <= call.local_prefill_max_tokens as usize {
            self.announce(&events, bytes::Bytes::new(), cached_blocks);
            let computed = cached_blocks * block_tokens;
            self.submit(Submission {
                request,
                events,
                blocks: cached,
                computed,
                cached: cached_blocks,
                start: Start::Local,
                seal: None,
                hold,
            })?;
        } else {
            let sender = self.sender_of(call.kv_from)?;
            let waiting = self.reserve(request, events, cached, cargo, sender, hold)?;
            failpoints::at("reserved", 0, String::new);
            self.announce(&waiting.events, waiting.ticket(), cached_blocks);
            tokio::spawn(self.clone().land(waiting));
        }
        Ok(UnboundedReceiverStream::new(stream))
    }

    /// Counts a request in, if it is expected to fit. A move brings what runs already: only its blocks must be there.
    fn expect(&self, request: &Request, cached_blocks: usize, is_move: bool) -> Result<Expected, Status> {
        let blocks = self.limits.layout.blocks_for(request.stem.len()).saturating_sub(cached_blocks);
        let max_tokens =
            if is_move { 0 } else { request.max_tokens.saturating_sub(request.stem_output().len()) };
        let wanted = Wanted { sequences: request.open.len(), blocks, max_tokens };
        self.outlook.admit(&wanted, self.pool.available()).map_err(|no_room| {
            self.no_room.of(no_room.name()).increment(1);
            serve::shed(no_room.why())
        })
    }

    /// The worker that the KV will come from; another one's push is refused.
    fn sender_of(&self, kv_from: String) -> Result<Option<String>, Status> {
        if kv_from.is_empty() && self.is_secure {
            return Err(Status::invalid_argument(
                "kv_from: is empty; with --cluster-cert a ticket is made for one worker",
            ));
        }
        Ok(Some(kv_from).filter(|name| !name.is_empty()))
    }

    fn announce(&self, events: &Events, ticket: bytes::Bytes, cached_blocks: usize) {
        self.load
            .send_modify(|load| load.free_blocks = u32::try_from(self.pool.available()).unwrap_or(u32::MAX));
        let cached_tokens = cached_blocks * self.limits.layout.block_tokens;
        let reserved = v1::Reserved {
            ticket,
            cached_tokens: u32::try_from(cached_tokens).unwrap_or(u32::MAX),
            cached_blocks: u32::try_from(cached_blocks).unwrap_or(u32::MAX),
        };
        let event = Some(Event::Reserved(reserved));
        let _ = events.send(Ok(v1::DecodeEvent { event, load: Some(load_to_wire(&self.load.borrow())) }));
    }

    /// Hands a request to the engine, once its grammar, if it has one, is compiled.
    pub(crate) fn submit(&self, submission: Submission) -> Result<(), Status> {
        let form = submission.request.form.clone().filter(|form| !form.is_compiled());
        let Some(form) = form else { return self.order(Order::Run(Box::new(submission))) };
        let service = self.clone();
        tokio::spawn(async move {
            form.compiled().await;
            let events = submission.events.clone();
            if let Err(status) = service.order(Order::Run(Box::new(submission))) {
                let _ = events.send(Err(status));
            }
        });
        Ok(())
    }

    /// Tells the engine's loop something.
    pub(crate) fn order(&self, order: Order) -> Result<(), Status> {
        self.engine
            .send(order)
            .map_err(|_| Status::unavailable("the engine of this decode worker has stopped"))
    }
}

/// Tells the router that the stream is alive, and when an attempt is ended from outside, whatever the engine does meanwhile.
async fn stay_heard(
    attempt: Observer,
    load: watch::Receiver<Load>,
    events: mpsc::WeakUnboundedSender<Result<v1::DecodeEvent, Status>>,
) {
    let mut ended = std::pin::pin!(attempt.ended());
    loop {
        let word = match tokio::time::timeout(pulse::PULSE, &mut ended).await {
            Ok(None) => return,
            Ok(Some(why)) => Err(why),
            Err(_) => Ok(v1::DecodeEvent { event: None, load: Some(load_to_wire(&load.borrow())) }),
        };
        let is_last = word.is_err();
        let Some(events) = events.upgrade() else { return };
        if events.send(word).is_err() || is_last {
            return;
        }
    }
}

/// Blocks kept for as long as a push reads them.
#[derive(Default)]
pub(crate) struct Kept(pub parking_lot::Mutex<Vec<Block>>);
