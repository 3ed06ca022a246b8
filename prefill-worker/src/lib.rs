//! Prompt in, KV pushed: the compute-tuned pool.
//!
//! [`run`] is a process's whole life: serve until `stop`, drain, end.

mod engine_loop;
mod error;
mod job;
mod metrics;
mod probe;
pub mod scheduler;
mod service;
mod stage;

use std::sync::Arc;

use cluster::{Load, Role};
use engine::EngineError;
use kv_transport::{Sender, SenderConfig};
use proto::v1::prefill_worker_server::PrefillWorkerServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::service::RoutesBuilder;
use worker::WorkerConfig;
use worker::attempts::Attempts;
use worker::progress::Progress;
use worker::serve::{self, Life, LifeError};

pub use worker::Deps;

/// Why a prefill worker's process ends badly.
pub type RunError = LifeError<EngineError>;

/// Settings of a prefill worker.
#[derive(Debug, Clone)]
pub struct PrefillConfig {
    /// What every worker has.
    pub worker: WorkerConfig,
    /// Most prompts in one engine step.
    pub max_prompts: usize,
    /// Memory for KV converted for each other layout among decode workers, bytes.
    pub convert_bytes: usize,
}

/// Serves until `stop`; then takes nothing new, lets accepted prompts end (at most the drain deadline)
/// and returns.
pub async fn run(
    config: PrefillConfig,
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
    let sending =
        SenderConfig { progress_timeout: config.worker.progress_timeout, ..SenderConfig::default() };
    let sender = Sender::new(
        config.worker.identity(),
        region,
        worker::pool::grid(&layout),
        ways.sender(sending.clone()),
    );
    let load = Arc::new(watch::channel(Load::default()).0);
    let progress = Progress::default();
    let shown = telemetry::Metrics::default();
    config.worker.tell(&shown, Role::Prefill);
    let stages = Arc::new(stage::Stages {
        layout,
        bytes: config.convert_bytes,
        transport: config.worker.transport.clone(),
        tls: config.worker.tls.clone(),
        config: sending,
        made: parking_lot::Mutex::default(),
        converted: metrics::converted(&shown),
    });
    let counters = metrics::LoopMetrics::new(&shown);
    let refusals = worker::metrics::Refusals::new(&shown);
    let collect = worker::metrics::collect(&shown, Arc::clone(&deps.pool), load.subscribe());
    let collect_sender = worker::metrics::collect_sender(&shown, sender.clone());
    let collect_certificates = worker::metrics::collect_certificates(&shown, deps.expiry);
    let page = shown.page(move || {
        collect();
        collect_certificates();
        collect_sender();
    });
    let (inbox, jobs) = std::sync::mpsc::channel();
    let attempts = Attempts::default();
    let service = service::PrefillService {
        limits: config.worker.limits(layout, &info, deps.vocabulary),
        sender,
        stages,
        engine: inbox,
        slots: config.worker.slots(),
        attempts: attempts.clone(),
        load: Arc::clone(&load),
        refusals,
        tracer: deps.tracer,
    };
    let probe =
        Arc::new(probe::PrefillProbe { pool: Arc::clone(&deps.pool), kv, sender: service.sender.clone() });
    let rules = scheduler::Rules {
        step_tokens: config.worker.step_tokens,
        max_prompts: config.max_prompts,
        block_tokens: layout.block_tokens,
    };
    let engine_loop = engine_loop::EngineLoop::new(
        deps.engine,
        deps.pool,
        rules,
        jobs,
        Arc::clone(&load),
        counters,
        progress.clone(),
    );
    let engine = serve::on_thread("prefill-engine", move || engine_loop.run());

    let mut routes = RoutesBuilder::default();
    routes.add_service(PrefillWorkerServer::new(service).max_decoding_message_size(proto::MAX_MESSAGE_BYTES));
    let member = config.worker.member(Role::Prefill, &address, &layout, &info, &ways);
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
    // Nothing is pushed to a prefill worker; a KV connection to it is closed.
    life.run(listener, routes, |_stream| async {}, engine, stop).await
}
