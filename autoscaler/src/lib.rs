//! The planner on a live cluster: looks at routers and workers, decides, and offers the sizes to KEDA and Prometheus.
//!
//! It never touches Kubernetes: KEDA asks over its external scaler protocol, an HPA through a metric. When nothing can be
//! seen, the last sizes stand: unreachable is not gone.

mod collect;
mod look;
mod metrics;
mod scaler;
mod switching;

use std::time::{Duration, Instant};

use planner::{Planner, Policy, Pool, Profile};
use proto::keda::external_scaler_server::ExternalScalerServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::service::{Routes, RoutesBuilder};
use tonic::transport::Server;

use collect::Collector;
use metrics::Metrics;
use scaler::Scaler;
use switching::Switching;

/// Settings.
#[derive(Debug, Clone)]
pub struct Config {
    /// Routers, host:port; every address that the name has is looked at.
    pub routers: String,
    /// How routers with TLS are reached.
    pub tls: Option<tls::ClientFiles>,
    /// Our API key, where routers want one.
    pub api_key: Option<String>,
    /// How workers with TLS are reached.
    pub cluster_tls: Option<tls::ClusterFiles>,
    /// What is promised, and how decisions are damped.
    pub policy: Policy,
    /// How fast a worker is, where the cluster does not say so itself.
    pub profile: Profile,
    /// Time between two looks.
    pub interval: Duration,
    /// Move workers that may change their pool to where they are needed.
    pub switch_roles: bool,
}

/// Workers that each pool should have; `None` until the cluster was seen.
pub(crate) type Sizes = Option<[usize; 2]>;

/// Why it ends badly.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The server cannot be put together, or failed.
    #[error("serving failed: {0}")]
    Serve(String),
}

/// Looks and serves until `stop`.
pub async fn run(config: Config, listener: TcpListener, stop: CancellationToken) -> Result<(), RunError> {
    let registry = telemetry::Metrics::default();
    let metrics = Metrics::new(&registry);
    let (sizes, offered) = watch::channel(None);
    let (ready, is_ready) = watch::channel(false);
    let mut routes = RoutesBuilder::default();
    routes.add_service(ExternalScalerServer::new(Scaler::new(offered)));
    let routes = proto::server::with_health_and_reflection(routes, is_ready.clone())
        .await
        .map_err(|e| RunError::Serve(e.to_string()))?;
    let pages = telemetry::http::routes(registry.page(|| {}), is_ready);
    let server = Server::builder()
        .accept_http1(true)
        .add_routes(Routes::from(routes.into_axum_router().merge(pages)))
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.clone().cancelled_owned());
    tokio::select! {
        served = server => served.map_err(|e| RunError::Serve(e.to_string())),
        never = watch_cluster(config, &metrics, &sizes, &ready) => match never {},
    }
}

/// Looks for ever.
async fn watch_cluster(
    config: Config,
    metrics: &Metrics,
    sizes: &watch::Sender<Sizes>,
    ready: &watch::Sender<bool>,
) -> std::convert::Infallible {
    let mut collector = Collector::new(config.routers, config.profile.clone());
    collector.tls = config.tls;
    collector.cluster_tls = config.cluster_tls;
    collector.api_key = config.api_key;
    let mut planner: Option<Planner> = None;
    let mut switching = Switching::default();
    let start = Instant::now();
    let mut tick = tokio::time::interval(config.interval);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let seen = match collector.look(start.elapsed().as_secs_f64()).await {
            Ok(seen) => seen,
            Err(error) => {
                metrics.looks.of("failed").increment(1);
                collector.forget_channels();
                tracing::warn!(%error, "the cluster cannot be seen; the last sizes stand");
                continue;
            }
        };
        metrics.looks.of("ok").increment(1);
        let planner = planner.get_or_insert_with(|| {
            let (prefill, decode) = (seen.prefill_workers, seen.decode_workers);
            tracing::info!(prefill, decode, "planning begins");
            Planner::new(config.policy.clone(), config.profile.clone(), prefill, decode)
        });
        for decision in planner.look(seen) {
            metrics.decided(&decision);
            tracing::info!(pool = ?decision.pool, from = decision.from, to = decision.to,
                reason = decision.reason.name(), "decided");
        }
        let now = [planner.target(Pool::Prefill), planner.target(Pool::Decode)];
        metrics.sizes(planner, now);
        sizes.send_replace(Some(now));
        if config.switch_roles {
            move_one(&mut switching, &collector, metrics, now).await;
        }
        ready.send_replace(true);
    }
}

/// Tells a worker to change its pool, if that helps.
async fn move_one(switching: &mut Switching, collector: &Collector, metrics: &Metrics, sizes: [usize; 2]) {
    let Some((worker, to)) = switching.next(sizes, collector.workers(), Instant::now()) else { return };
    match collector.set_role(&worker, to.name()).await {
        Ok(()) => {
            metrics.switches.of("told").increment(1);
            tracing::info!(worker, to = to.name(), ?sizes, "a worker changes its pool");
            switching.told(worker, to, Instant::now());
        }
        Err(error) => {
            metrics.switches.of("refused").increment(1);
            tracing::warn!(worker, to = to.name(), %error, "a worker does not change its pool");
        }
    }
}
