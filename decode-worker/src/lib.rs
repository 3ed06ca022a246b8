//! Reserve, land, stream tokens: the bandwidth-tuned pool.
//!
//! [`run`] is a process's whole life: serve until `stop`, drain, end.

mod choice;
mod engine_loop;
mod error;
pub mod scheduler;
mod service;

use std::sync::Arc;
use std::time::Duration;

use cluster::{Join, Load, Role};
use engine::kv::pool::BlockPool;
use engine::{Engine, EngineError};
use kv_transport::{Identity, Receiver, ReceiverConfig};
use proto::v1::decode_worker_server::DecodeWorkerServer;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tonic::service::RoutesBuilder;
use worker::WorkerConfig;
use worker::attempts::Attempts;
use worker::request::Limits;
use worker::serve::{self, Life, LifeError};

/// Why a decode worker's process ends badly.
pub type RunError = LifeError<EngineError>;

/// Settings of a decode worker.
#[derive(Debug, Clone)]
pub struct DecodeConfig {
    /// What every worker has.
    pub worker: WorkerConfig,
    /// How long a reservation may wait for its KV. Default 120 s.
    pub reservation: Duration,
}

/// What a decode worker works with.
pub struct Deps {
    /// The model on its device.
    pub engine: Box<dyn Engine>,
    /// Who owns which block of the engine's KV pool.
    pub pool: Arc<BlockPool>,
    /// Where to become a member.
    pub registry: Arc<dyn Join>,
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
    let identity = Identity { worker: config.worker.name.clone(), incarnation: config.worker.incarnation };
    let receiver = Receiver::new(
        identity,
        region,
        worker::pool::grid(kv.as_ref()),
        ReceiverConfig {
            endpoints: vec![address.clone()],
            progress_timeout: worker::pool::PROGRESS_TIMEOUT,
            ..ReceiverConfig::default()
        },
    );
    let load = Arc::new(watch::channel(Load::default()).0);
    let (inbox, submissions) = std::sync::mpsc::channel();
    let attempts = Attempts::default();
    let service = service::DecodeService {
        limits: Arc::new(Limits {
            vocab_size: info.vocab_size,
            max_context_tokens: info.max_context_tokens,
            layout,
            compat_hash: config.worker.compat_hash.clone(),
            incarnation: config.worker.incarnation,
        }),
        pool: Arc::clone(&deps.pool),
        receiver: receiver.clone(),
        engine: inbox,
        slots: Arc::new(Semaphore::new(config.worker.max_sequences + config.worker.max_waiting)),
        attempts: attempts.clone(),
        load: Arc::clone(&load),
        reservation: config.reservation,
    };
    let rules = scheduler::Rules {
        step_tokens: config.worker.step_tokens,
        max_choices: config.worker.max_sequences,
        block_tokens: layout.block_tokens,
    };
    let engine_loop =
        engine_loop::EngineLoop::new(deps.engine, deps.pool, rules, submissions, Arc::clone(&load));
    let engine = serve::on_thread("decode-engine", move || engine_loop.run());

    let mut routes = RoutesBuilder::default();
    routes.add_service(DecodeWorkerServer::new(service).max_decoding_message_size(proto::MAX_MESSAGE_BYTES));
    let member = config.worker.member(Role::Decode, &address, &layout, &info);
    let life = Life { config: config.worker, member, registry: deps.registry, load, attempts };
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
