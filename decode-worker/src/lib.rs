//! Reserve, land, stream tokens: the bandwidth-tuned pool.
//!
//! [`run`] is a process's whole life: serve until `stop`, drain, end.

mod cargo;
mod choice;
mod engine_loop;
mod error;
mod landing;
mod metrics;
mod moving;
mod order;
pub mod outlook;
mod probe;
pub mod scheduler;
mod seal;
mod service;

use std::sync::Arc;
use std::time::Duration;

use cluster::{Load, Role};
use engine::EngineError;
use kv_transport::{Receiver, ReceiverConfig, Sender, SenderConfig};
use proto::v1::decode_worker_server::DecodeWorkerServer;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tonic::service::RoutesBuilder;
use worker::WorkerConfig;
use worker::attempts::Attempts;
use worker::progress::Progress;
use worker::serve::{self, Life, LifeError};

pub use worker::Deps;

use scheduler::LocalPrefill;

/// Why a decode worker's process ends badly.
pub type RunError = LifeError<EngineError>;

/// Settings of a decode worker.
#[derive(Debug, Clone)]
pub struct DecodeConfig {
    /// What every worker has.
    pub worker: WorkerConfig,
    /// How long a reservation may wait for its KV. Default 120 s.
    pub reservation: Duration,
    /// How prompts share steps with decoding sequences.
    pub prefill: LocalPrefill,
    /// Prompt tokens in one step, at most, unless prompts are not cut.
    pub chunk_tokens: usize,
    /// Gap between tokens that is kept to with [`LocalPrefill::Priority`]. Default 100 ms.
    pub itl_limit: Duration,
}

/// Serves until `stop`; then takes nothing new, lets running requests end (at most the drain
/// deadline) and returns.
pub async fn run(
    config: DecodeConfig,
    deps: Deps,
    listener: TcpListener,
    stop: CancellationToken,
) -> Result<(), RunError> {
    let kv = deps.engine.kv();
    let layout = *kv.layout();
    let info = deps.engine.info().clone();
    let bound = listener.local_addr().map_err(|e| LifeError::Broken(e.to_string()))?;
    let address = config.worker.address(bound);
    let region = worker::pool::region(&kv)
        .ok_or_else(|| LifeError::Broken("the KV pool is not in host memory".into()))?;
    let ways = config.worker.transport.open(&region, config.worker.tls.as_ref());
    let ways = ways.map_err(|e| LifeError::Broken(e.to_string()))?;
    let sender = Sender::new(
        config.worker.identity(),
        region.clone(),
        worker::pool::grid(&layout),
        ways.sender(SenderConfig {
            progress_timeout: config.worker.progress_timeout,
            ..SenderConfig::default()
        }),
    );
    let packing = config.worker.transport.packing(&layout);
    if packing.is_some() {
        tracing::info!("KV may come over TCP as int8");
    }
    let receiver = Receiver::new(
        config.worker.identity(),
        region,
        worker::pool::grid(&layout),
        ways.receiver(ReceiverConfig {
            endpoints: vec![address.clone()],
            // Every sequence that is let in may wait for a transfer: the bounds add up.
            max_transfers: config.worker.max_sequences + config.worker.max_waiting,
            progress_timeout: config.worker.progress_timeout,
            packing,
            ..ReceiverConfig::default()
        }),
    );
    let load = Arc::new(watch::channel(Load::default()).0);
    let progress = Progress::default();
    let shown = telemetry::Metrics::default();
    config.worker.tell(&shown, Role::Decode);
    let counters = metrics::LoopMetrics::new(&shown);
    let refusals = worker::metrics::Refusals::new(&shown);
    let collect = worker::metrics::collect(&shown, Arc::clone(&deps.pool), load.subscribe());
    let outlook = outlook::Outlook::new(layout.block_tokens);
    let no_room = Arc::new(metrics::no_room(&shown));
    let collect_outlook = metrics::collect_outlook(&shown, outlook.clone());
    let collect_receiver = metrics::collect_receiver(&shown, receiver.clone());
    let collect_sender = worker::metrics::collect_sender(&shown, sender.clone());
    let collect_certificates = worker::metrics::collect_certificates(&shown, deps.expiry);
    let page = shown.page(move || {
        collect();
        collect_certificates();
        collect_sender();
        collect_receiver();
        collect_outlook();
    });
    let (inbox, submissions) = std::sync::mpsc::channel();
    let attempts = Attempts::default();
    let service = service::DecodeService {
        limits: config.worker.limits(layout, &info, deps.vocabulary),
        pool: Arc::clone(&deps.pool),
        kv,
        receiver: receiver.clone(),
        is_secure: config.worker.tls.is_some(),
        sender,
        engine: inbox,
        slots: config.worker.slots(),
        attempts: attempts.clone(),
        load: Arc::clone(&load),
        reservation: config.reservation,
        outlook: outlook.clone(),
        no_room,
        refusals,
        tracer: deps.tracer,
    };
    let probe = Arc::new(probe::DecodeProbe {
        limits: Arc::clone(&service.limits),
        pool: Arc::clone(&service.pool),
        kv: Arc::clone(&service.kv),
        receiver: receiver.clone(),
        sender: service.sender.clone(),
        turn: Arc::new(Semaphore::new(probe::AT_ONCE)),
    });
    let rules = scheduler::Rules {
        step_tokens: config.worker.step_tokens,
        max_choices: config.worker.max_sequences,
        block_tokens: layout.block_tokens,
        prefill: config.prefill,
        chunk_tokens: config.chunk_tokens,
        itl_limit_ms: config.itl_limit.as_secs_f64() * 1e3,
    };
    let engine_loop = engine_loop::EngineLoop::new(
        deps.engine,
        deps.pool,
        (rules, outlook),
        submissions,
        Arc::clone(&load),
        counters,
        progress.clone(),
    );
    let engine = serve::on_thread("decode-engine", move || engine_loop.run());

    let mut routes = RoutesBuilder::default();
    routes.add_service(DecodeWorkerServer::new(service).max_decoding_message_size(proto::MAX_MESSAGE_BYTES));
    let member = config.worker.member(Role::Decode, &address, &layout, &info, &ways);
    let life = Life {
        config: config.worker,
        member,
        registry: deps.registry,
        load,
        attempts,
        progress,
        page,
        probe,
    };
    let on_kv = {
        let receiver = receiver.clone();
        move |stream| {
            let receiver = receiver.clone();
            async move { receiver.serve(stream).await }
        }
    };
    let ended = life.run(listener, routes, on_kv, engine, stop).await;
    receiver.shutdown();
    ended
}
