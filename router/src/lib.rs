//! The only room with text: admission, tokenizer, placement, relay.
//!
//! [`run`] is a process's whole life. A request is a [`journey`]; where it goes is decided by
//! [`placement`], a pure function of the [`fleet`]'s picture.

pub mod admission;
mod attempt;
mod certified;
pub mod fair_queue;
pub mod fleet;
mod form;
mod http;
mod incoming;
pub mod journey;
pub mod keys;
mod legs;
mod losses;
pub mod metrics;
mod moving;
pub mod operator_service;
pub mod placement;
pub mod prefix_index;
mod probing;
mod receiving;
pub mod registry_service;
pub mod relay;
pub mod request;
pub mod service;
pub mod shortlist;
pub mod status;
pub mod text;
pub mod timeline;

#[doc(hidden)]
pub use http::read_bodies;

use std::sync::Arc;
use std::time::Duration;

use cluster::{MemoryRegistry, RegistryError, Watch};
use parking_lot::Mutex;
use proto::v1::inference_server::InferenceServer;
use proto::v1::operator_server::OperatorServer;
use proto::v1::registry_server::RegistryServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::{Routes, RoutesBuilder};
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};

use admission::Admission;
use fleet::Fleet;
use journey::Shared;
use placement::{Model, Policy};
use receiving::Receiving;
use service::InferenceService;
use status::{Board, Slo};
use telemetry::trace::Tracer;
use text::model::TextModel;
use tls::server::Faces;

/// Settings of a router.
#[derive(Debug, Clone)]
pub struct RouterConfig {
    /// Requests at once. Default 1024.
    pub max_running: usize,
    /// Requests waiting behind them. Default 1024.
    pub max_waiting: usize,
    /// Longest wait for a place in a pool. Default 30 s.
    pub queue_patience: Duration,
    /// Local or remote prefill.
    pub policy: Policy,
    /// How long a drain may take. Default 30 s.
    pub drain_deadline: Duration,
    /// What the status counts as good.
    pub slo: Slo,
    /// Longest silence of a worker's stream before its request goes on elsewhere. Default 10 s; workers speak every 2 s.
    pub worker_silence: Duration,
    /// Connections from one address. Default 4096.
    pub max_connections: usize,
    /// What the prefix index may use. Default 128 MiB.
    pub prefix_index_bytes: usize,
}

/// Where the fleet is found.
pub enum Registry {
    /// Workers join this router over gRPC; with nothing else to run.
    Served(MemoryRegistry),
    /// Elsewhere: etcd.
    Watched(Arc<dyn Watch>),
}

/// What a router works with.
pub struct Deps {
    /// Tokenizer and template.
    pub text: TextModel,
    /// The fleet.
    pub registry: Registry,
    /// Where spans of requests go.
    pub tracer: Tracer,
    /// Certificates of the client API; without them it is not encrypted.
    pub tls: Option<tls::ServerFiles>,
    /// Certificates for workers; without them workers are reached, and join, unencrypted.
    pub cluster_tls: Option<tls::ClusterFiles>,
    /// How long this process's certificates last.
    pub expiry: tls::Expiry,
    /// Who may call, and how much; anybody without.
    pub keys: Option<keys::Keys>,
}

/// Why a router's process ends badly.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The registry cannot be watched.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Certificates that cannot be used.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    /// The server cannot be put together, or failed.
    #[error("serving failed: {0}")]
    Serve(String),
}

/// What the port speaks to parts of the cluster.
const PROTOCOLS: &[&[u8]] = &[tls::cluster::H2];

/// Serves until `stop`; then takes nothing new and lets running requests end, at most the drain deadline.
pub async fn run(
    config: RouterConfig,
    deps: Deps,
    listener: TcpListener,
    stop: CancellationToken,
) -> Result<(), RunError> {
    let close = CancellationToken::new();
    let mut routes = RoutesBuilder::default();
    let picture = match deps.registry {
        Registry::Served(registry) => {
            let picture = registry.watch().await?;
            routes.add_service(RegistryServer::new(registry_service::RegistryService {
                is_secure: deps.cluster_tls.is_some(),
                registry,
                close: close.clone(),
            }));
            picture
        }
        Registry::Watched(registry) => tokio::select! {
            picture = registry.watch() => picture?,
            () = stop.cancelled() => return Ok(()),
        },
    };
    let fleet = Fleet::new(deps.cluster_tls.clone(), config.prefix_index_bytes);
    let registry = telemetry::Metrics::default();
    let counters = metrics::Metrics::new(&registry, &deps.text.name);
    let turned_away = counters.turned_away.clone();
    let admission = Admission::new(config.max_running, config.max_waiting);
    let collect = metrics::collect(&registry, fleet.clone(), admission.clone(), deps.expiry);
    let board = Board::new(deps.text.name.clone(), config.slo, fleet.clone(), admission.clone());
    let (ready, is_ready) = watch::channel(true);
    let following = tokio::spawn(fleet.clone().follow(picture));
    let key_metrics = Arc::new(metrics::KeyMetrics::new(&registry));
    let shared = Arc::new(Shared {
        keys: Arc::clone(&key_metrics),
        text: deps.text,
        fleet,
        admission,
        policy: config.policy,
        queue_patience: config.queue_patience,
        worker_silence: config.worker_silence,
        model: Mutex::new(Model::FIRST_GUESS),
        metrics: counters,
        tracer: deps.tracer,
        board: board.clone(),
        origin: proto::new_request_id(),
    });
    routes.add_service(OperatorServer::new(operator_service::OperatorService {
        fleet: shared.fleet.clone(),
        board: board.clone(),
    }));
    let inference = InferenceService::new(shared);
    routes.add_service(
        InferenceServer::new(inference.clone()).max_decoding_message_size(proto::MAX_MESSAGE_BYTES),
    );
    let routes = proto::server::with_health_and_reflection(routes, is_ready.clone())
        .await
        .map_err(|e| RunError::Serve(e.to_string()))?;
    let pages = telemetry::http::routes(registry.page(collect), is_ready);
    let mut routes =
        routes.into_axum_router().merge(pages).merge(http::routes(inference)).merge(status::routes(board));
    let mut watching = Vec::new();
    if let Some(keys) = deps.keys {
        watching.push(AbortOnDrop(tokio::spawn(keys.clone().follow())));
        let guard = keys::Guard { keys, metrics: key_metrics };
        routes = routes.layer(axum::middleware::from_fn_with_state(guard, keys::require));
    }
    if let Some(files) = &deps.tls {
        let wants = certified::Wants { certificate: files.client_ca.is_some() };
        routes = routes.layer(axum::middleware::from_fn_with_state(wants, certified::require));
    }
    routes = routes.layer(axum::middleware::from_fn_with_state(Receiving::default(), receiving::bounded));
    let server = Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_routes(Routes::from(routes));
    let door = incoming::Door::new(config.max_connections, turned_away);
    let faces = deps.tls.map(|files| Faces {
        clients: Some(files),
        cluster: deps.cluster_tls.map(|files| (files, PROTOCOLS)),
    });
    let mut server = serve(server, listener, faces, door, close.clone())?;
    let ended = tokio::select! {
        () = stop.cancelled() => {
            ready.send_replace(false);
            close.cancel();
            match tokio::time::timeout(config.drain_deadline, &mut server).await {
                Ok(ended) => Some(ended),
                Err(_) => { server.abort(); None }
            }
        }
        ended = &mut server => Some(ended),
    };
    following.abort();
    drop(watching);
    match ended {
        Some(Ok(Err(error))) => Err(RunError::Serve(error.to_string())),
        _ => Ok(()),
    }
}

/// A task that ends with its owner.
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Serves on that port until `close`, encrypted if there are certificates.
fn serve(
    server: Router,
    listener: TcpListener,
    faces: Option<Faces>,
    door: incoming::Door,
    close: CancellationToken,
) -> Result<JoinHandle<Result<(), tonic::transport::Error>>, tls::TlsError> {
    let closed = close.cancelled_owned();
    Ok(match faces {
        None => {
            // Without it a token waits for the acknowledgement of the last one: 40 ms, seen. The builder's own setting
            // does not reach a listener that it has not made.
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let incoming = door.watch(incoming, |io| io.peer_addr().ok().map(|from| from.ip()));
            tokio::spawn(server.serve_with_incoming_shutdown(incoming, closed))
        }
        Some(faces) => {
            let incoming = tls::server::accept(TcpIncoming::from(listener), faces)?;
            let incoming = door.watch(incoming, |io| io.peer_addr().ok().map(|from| from.ip()));
            tokio::spawn(server.serve_with_incoming_shutdown(incoming, closed))
        }
    })
}
