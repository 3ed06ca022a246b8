//! A worker's life: serve gRPC and KV connections on one address, be a member, drain, end.

use std::sync::Arc;
use std::time::Duration;

use cluster::{Join, Load, Member};

use kv_transport::{Socket, mux};
use proto::v1::worker_control_server::WorkerControlServer;
use tls::cluster::KV;
use tls::server::Faces;
use tls::{ClusterFiles, TlsError};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::{Routes, RoutesBuilder};
use tonic::transport::Server;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::WorkerConfig;
use crate::attempts::Attempts;
use crate::control::{Control, follow_readiness};
use crate::probe::Probe;
use crate::progress::{self, Progress};
use crate::secure;

/// What a shed request is told to wait.
const RETRY_AFTER: Duration = Duration::from_millis(500);
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// RESOURCE_EXHAUSTED with a hint when to try again.
pub fn shed(why: &str) -> Status {
    let retry = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
    Status::with_error_details(Code::ResourceExhausted, why, retry)
}

/// Runs the engine's loop on its own thread; the receiver tells how it ended.
pub fn on_thread<E: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<(), E> + Send + 'static,
) -> oneshot::Receiver<Result<(), E>> {
    let (done, ended) = oneshot::channel();
    let spawned = std::thread::Builder::new().name(name.into()).spawn(move || {
        let _ = done.send(work());
    });
    if let Err(error) = spawned {
        tracing::error!(%error, name, "no thread for the engine");
    }
    ended
}

/// What a worker needs besides its service to live as a member of the cluster.
pub struct Life {
    /// Settings.
    pub config: WorkerConfig,
    /// What it registers as.
    pub member: Member,
    /// Where.
    pub registry: Arc<dyn Join>,
    /// What it reports.
    pub load: Arc<watch::Sender<Load>>,
    /// What runs, for the drain.
    pub attempts: Attempts,
    /// The engine's steps.
    pub progress: Progress,
    /// What it shows of itself.
    pub page: telemetry::http::Page,
    /// Test pushes.
    pub probe: Arc<dyn Probe>,
}

/// Why a life ended badly.
#[derive(Debug, thiserror::Error)]
pub enum LifeError<E> {
    /// The engine's loop failed.
    #[error("engine: {0}")]
    Engine(E),
    /// The server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The registry could not be joined.
    #[error(transparent)]
    Registry(#[from] cluster::RegistryError),
    /// A part ended that never should.
    #[error("{0}")]
    Broken(String),
}

impl Life {
    /// Serves until `stop`, then drains: out of the registry at once, nothing new taken, running requests
    /// end on their own until the deadline.
    pub async fn run<E, F, Fut>(
        self,
        listener: TcpListener,
        mut routes: RoutesBuilder,
        on_kv: F,
        mut engine: oneshot::Receiver<Result<(), E>>,
        stop: CancellationToken,
    ) -> Result<(), LifeError<E>>
    where
        F: Fn(Socket) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        // Ready once it is a member: a rolling upgrade must not end the old worker before the router knows the new one.
        let (ready, is_ready) = watch::channel(false);
        let control = Control {
            load: Arc::clone(&self.load),
            stop: stop.clone(),
            probe: self.probe,
            role: self.member.role,
            next_role: self.config.next_role.clone(),
        };
        routes.add_service(WorkerControlServer::new(control));
        let (load, attempts) = (Arc::clone(&self.load), self.attempts.clone());
        let (patience, lease) = (self.config.progress_timeout, self.config.lease);
        let watchdog = progress::watch(self.progress, patience, lease, load, attempts);
        let _watchdog = AbortOnDrop(tokio::spawn(watchdog));
        let routes = proto::server::with_health_and_reflection(routes, is_ready.clone())
            .await
            .map_err(|e| ServeError::Setup(e.to_string()))?;
        let pages = telemetry::http::routes(self.page, is_ready);
        let routes = Routes::from(routes.into_axum_router().merge(pages));
        let close = CancellationToken::new();
        let tls = self.config.tls.clone();
        let mut server = tokio::spawn(serve(listener, routes, on_kv, tls, close.clone()));
        let broken = |text: &str| LifeError::Broken(text.into());
        let engine_ended = |ended: Result<Result<(), E>, _>| match ended {
            Ok(Err(error)) => LifeError::Engine(error),
            _ => broken("the engine's thread ended"),
        };
        let load = self.load.subscribe();
        let membership = tokio::select! {
            joined = self.registry.join(self.member, load) => joined?,
            () = stop.cancelled() => return Ok(()),
        };
        tokio::spawn(follow_readiness(self.load.subscribe(), ready));
        tracing::info!(worker = %self.config.name, "serving");
        tokio::select! {
            () = stop.cancelled() => {}
            ended = &mut engine => return Err(engine_ended(ended)),
            ended = &mut server => match ended {
                Ok(Err(error)) => return Err(error.into()),
                _ => return Err(broken("the server ended")),
            },
        }

        let running = self.attempts.len();
        tracing::info!(worker = %self.config.name, running, "draining");
        self.load.send_modify(|load| load.draining = true);
        membership.leave(LEAVE_PATIENCE).await;
        tokio::select! {
            () = self.attempts.all_ended() => {}
            () = tokio::time::sleep(self.config.drain_deadline) => {
                tracing::warn!(cut = self.attempts.len(), "drain deadline passed");
            }
            ended = &mut engine => return Err(engine_ended(ended)),
        }
        close.cancel();
        if tokio::time::timeout(CLOSE_PATIENCE, &mut server).await.is_err() {
            server.abort();
        }
        // The engine ends with the last handle on its inbox; a worker that goes on in another role needs its memory.
        if tokio::time::timeout(CLOSE_PATIENCE, &mut engine).await.is_err() {
            tracing::warn!("the engine's thread is still busy");
        }
        Ok(())
    }
}

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Why serving ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The server could not be put together.
    #[error("cannot set up the server: {0}")]
    Setup(String),
    /// The listener or the HTTP/2 server failed.
    #[error("serving failed: {0}")]
    Transport(String),
    /// A certificate that cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Serves until `stop`, then lets running calls end. `on_kv` gets every KV connection. With `tls` everything is encrypted;
/// a KV connection that is not still reaches `on_kv`, which refuses it in words.
async fn serve<F, Fut>(
    listener: TcpListener,
    routes: Routes,
    on_kv: F,
    tls: Option<ClusterFiles>,
    stop: CancellationToken,
) -> Result<(), ServeError>
where
    F: Fn(Socket) -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let (mut kv, grpc) = mux::split(listener, mux::MuxConfig::default());
    let server = Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)));
    let stopped = stop.cancelled_owned();
    let failed = |e: tonic::transport::Error| ServeError::Transport(e.to_string());
    let Some(files) = tls else {
        let kv = tokio::spawn(async move {
            while let Some(stream) = kv.next().await {
                tokio::spawn(on_kv(stream.into()));
            }
        });
        let _kv = AbortOnDrop(kv);
        let mut server = server;
        return server.add_routes(routes).serve_with_incoming_shutdown(grpc, stopped).await.map_err(failed);
    };
    let faces = Faces { clients: None, cluster: Some((files, secure::PROTOCOLS)) };
    let mut shaken = tls::server::accept(grpc, faces)?;
    let (calls, incoming) = mpsc::channel(16);
    let _sort = AbortOnDrop(tokio::spawn(async move {
        loop {
            tokio::select! {
                Some(stream) = kv.next() => drop(tokio::spawn(on_kv(stream.into()))),
                Some(Ok(secured)) = shaken.next() => match secured.speaks(KV) {
                    true => drop(tokio::spawn(on_kv(secure::kv_socket(secured)))),
                    false => drop(calls.send(Ok::<_, std::io::Error>(secured)).await),
                },
                else => return,
            }
        }
    }));
    let routes = Routes::from(routes.into_axum_router().layer(axum::middleware::from_fn(secure::require)));
    let mut server = server;
    let incoming = ReceiverStream::new(incoming);
    server.add_routes(routes).serve_with_incoming_shutdown(incoming, stopped).await.map_err(failed)
}
