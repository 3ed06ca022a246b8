//! `tandem router`, `worker`, `prefill`, `decode`: one process of a deployment each.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use cluster::{EtcdRegistry, Join, MemoryRegistry, RemoteRegistry, Role};
use decode_worker::DecodeConfig;
use decode_worker::scheduler::LocalPrefill;
use kv_transport::GpuDirect;
use prefill_worker::PrefillConfig;
use router::keys::Keys;
use router::placement::Policy;
use router::status::Slo;
use router::text::model::TextModel;
use router::{Registry, RouterConfig};
use tls::{Expiry, Part};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use worker::WorkerConfig;
use worker::transport::{KvWire, TransportChoice, TransportConfig};

use crate::args::{
    Device, EngineArgs, EtcdArgs, GpuDirectKind, KvWireKind, PlacementArgs, RouterArgs, Strategy,
    TransportArgs, TransportKind, WorkerArgs,
};
use crate::{engines, model, signal, trace};

/// Tokens in one step of a prefill worker: enough rows to fill the matrix units.
const PREFILL_STEP_TOKENS: usize = 512;
/// The same on a GPU: where its products are as fast as they get.
const PREFILL_STEP_TOKENS_GPU: usize = 8192;
/// The same of a decode worker: local prompts must not hold up running sequences for long.
const DECODE_STEP_TOKENS: usize = 256;
/// The same where prompts are not cut.
const SHARED_STEP_TOKENS: usize = 2048;
/// How long a process that starts waits for a registry that does not answer, before it ends with an error.
const FIRST_CONTACT: Duration = Duration::from_secs(60);
/// How long a reservation may wait for its KV.
const RESERVATION: Duration = Duration::from_secs(120);
/// Longest silence of a worker's stream, as long as a dead connection takes to be found: a ping after 5 s, 5 s for its answer.
const WORKER_SILENCE: Duration = Duration::from_secs(10);

/// Runs a router until it is told to stop.
pub async fn router(args: RouterArgs) -> anyhow::Result<()> {
    let stop = signal::stop_token();
    let tls = server_files(&args)?;
    let cluster_tls = args.cluster_tls.files();
    cluster_tls.as_ref().map(|files| files.check(&Part::Router)).transpose()?;
    let registry = match args.etcd.is_empty() {
        true => Registry::Served(MemoryRegistry::new()),
        false => {
            let lease = cluster::etcd::DEFAULT_LEASE;
            Registry::Watched(Arc::new(etcd(&args.etcd, &args.etcd_access, &args.cluster, lease)?))
        }
    };
    let keys = args.api_keys.as_deref().map(Keys::read).transpose().map_err(anyhow::Error::msg)?;
    if keys.is_some() && tls.is_none() {
        tracing::warn!("--api-keys without --tls-cert: keys cross the network in plain text");
    }
    let expiry = Expiry::default().with("clients", args.tls_cert.as_deref(), args.tls_client_ca.as_deref());
    let expiry = args.cluster_tls.expiry(args.etcd_access.expiry(expiry));
    let text = load_text(&args.model).await?;
    let listener = bind(args.listen).await?;
    announce("router", &text.name, listener.local_addr()?);
    let config = router_config(&args.placement, Duration::from_secs(args.drain_seconds));
    let tracer = args.trace.tracer("tandem-router", &listener.local_addr()?.to_string())?;
    let deps = router::Deps { text, registry, tracer: tracer.clone(), tls, cluster_tls, expiry, keys };
    let ended = router::run(config, deps, listener, stop).await;
    trace::shutdown(tracer).await;
    Ok(ended?)
}

/// The router's certificates. Read here once, so that a wrong file ends the process before a model is loaded.
fn server_files(args: &RouterArgs) -> anyhow::Result<Option<tls::ServerFiles>> {
    let joins_here = args.etcd.is_empty();
    let Some((cert, key)) = args.tls_cert.clone().zip(args.tls_key.clone()) else {
        if joins_here && args.cluster_tls.cluster_cert.is_some() {
            anyhow::bail!(
                "--cluster-cert: without --etcd it needs --tls-cert and --tls-key too (the same files will do): workers join on the clients' port"
            );
        }
        return Ok(None);
    };
    if joins_here && args.cluster_tls.cluster_cert.is_none() {
        anyhow::bail!("--tls-cert: needs --cluster-cert, or --etcd: workers could not join over TLS");
    }
    let files = tls::ServerFiles { cert, key, client_ca: args.tls_client_ca.clone() };
    files.read()?;
    Ok(Some(files))
}

/// The registry on etcd; a file that could never work ends the process before a model is loaded.
fn etcd(
    endpoints: &[String],
    access: &EtcdArgs,
    cluster: &str,
    lease: Duration,
) -> anyhow::Result<EtcdRegistry> {
    let access = access.access();
    access.check(endpoints)?;
    Ok(EtcdRegistry::new(endpoints, cluster, lease).with_access(access).patient(FIRST_CONTACT))
}

/// A router's settings.
pub fn router_config(args: &PlacementArgs, drain_deadline: Duration) -> RouterConfig {
    RouterConfig {
        max_running: args.max_running,
        max_connections: args.max_connections,
        prefix_index_bytes: args.prefix_index_mib << 20,
        max_waiting: args.max_queued,
        queue_patience: Duration::from_secs(args.queue_seconds),
        worker_silence: WORKER_SILENCE,
        policy: match args.strategy {
            Strategy::Adaptive => Policy::Adaptive,
            Strategy::Disaggregated => Policy::Remote,
            Strategy::Shared | Strategy::Chunked | Strategy::Priority => Policy::Local,
        },
        drain_deadline,
        slo: Slo {
            ttft: Duration::from_millis(args.slo_ttft_ms),
            itl: Duration::from_millis(args.slo_itl_ms),
        },
    }
}

/// Loads tokenizer and template off the async threads.
pub async fn load_text(choice: &crate::args::ModelChoice) -> anyhow::Result<TextModel> {
    let dir = model::folder(choice)?;
    let name = model::served_name(choice, &dir);
    Ok(tokio::task::spawn_blocking(move || TextModel::load(&dir, &name)).await??)
}

/// Runs a worker of a fixed role until it is told to stop.
pub async fn worker(args: WorkerArgs, role: Role) -> anyhow::Result<()> {
    let stop = signal::stop_token();
    if args.stop_with_parent {
        signal::stop_with_parent(stop.clone());
    }
    let listener = bind(args.listen).await?;
    turn(&args, role, listener, stop, None).await
}

/// One role's life: loads the model, joins, serves, drains, leaves. Ends early when `next_role` is told another role.
pub async fn turn(
    args: &WorkerArgs,
    role: Role,
    listener: TcpListener,
    stop: CancellationToken,
    next_role: Option<Arc<watch::Sender<Role>>>,
) -> anyhow::Result<()> {
    let Start { config, built, registry, expiry } = Start::new(args, role, &listener, next_role).await?;
    let service = match role {
        Role::Prefill => "tandem-prefill",
        Role::Decode => "tandem-decode",
    };
    let tracer = args.trace.tracer(service, &config.name)?;
    let deps = built.deps(registry, tracer.clone(), expiry);
    let ended: anyhow::Result<()> = match role {
        Role::Prefill => {
            let config = PrefillConfig {
                worker: config,
                max_prompts: args.engine.max_sequences.min(64),
                convert_bytes: args.engine.convert_mib << 20,
            };
            prefill_worker::run(config, deps, listener, stop).await.map_err(Into::into)
        }
        Role::Decode => {
            let chunk_tokens = args.engine.chunk_tokens.map_or(config.step_tokens, |tokens| tokens as usize);
            let config = DecodeConfig {
                worker: config,
                reservation: RESERVATION,
                prefill: match args.strategy {
                    Strategy::Shared => LocalPrefill::Shared,
                    Strategy::Chunked => LocalPrefill::Chunked,
                    Strategy::Priority | Strategy::Adaptive | Strategy::Disaggregated => {
                        LocalPrefill::Priority
                    }
                },
                chunk_tokens,
                itl_limit: Duration::from_millis(args.slo_itl_ms),
            };
            decode_worker::run(config, deps, listener, stop).await.map_err(Into::into)
        }
    };
    trace::shutdown(tracer).await;
    ended
}

/// What a worker process has before it serves.
struct Start {
    config: WorkerConfig,
    built: engines::Built,
    registry: Arc<dyn Join>,
    expiry: Expiry,
}

impl Start {
    async fn new(
        args: &WorkerArgs,
        role: Role,
        listener: &TcpListener,
        next_role: Option<Arc<watch::Sender<Role>>>,
    ) -> anyhow::Result<Self> {
        let registry: Arc<dyn Join> = match &args.registry {
            Some(address) => {
                let tls = args.cluster_tls.files();
                if address.starts_with("https://") && tls.is_none() {
                    anyhow::bail!(
                        "--registry {address}: needs --cluster-cert, --cluster-key and --cluster-ca"
                    );
                }
                Arc::new(RemoteRegistry::new(address).with_tls(tls).patient(FIRST_CONTACT))
            }
            None => {
                let lease = Duration::from_secs(args.lease_seconds);
                Arc::new(etcd(&args.etcd, &args.etcd_access, &args.cluster, lease)?)
            }
        };
        let dir = model::folder(&args.model)?;
        let model_name = model::served_name(&args.model, &dir);
        let bound = listener.local_addr()?;
        let step_tokens = step_tokens(&args.engine, role, args.strategy);
        let kind = if next_role.is_some() { "worker" } else { role.name() };
        let name = args.name.clone().unwrap_or_else(|| default_name(kind, bound));
        let tls = args.cluster_tls.files();
        tls.as_ref().map(|files| files.check(&Part::Worker(name.clone()))).transpose()?;
        let transport = transport(&args.transport, tls.is_some())?;
        let built = load_engine(&dir, args, role, step_tokens).await?;
        let config = WorkerConfig {
            name,
            model: model_name.clone(),
            advertise: args.advertise.clone(),
            zone: args.zone.clone(),
            compat_hash: built.compat_hash.clone(),
            incarnation: cluster::member::new_incarnation(),
            max_sequences: args.engine.max_sequences,
            max_waiting: args.engine.max_waiting,
            step_tokens,
            progress_timeout: Duration::from_secs(args.progress_seconds),
            lease: Duration::from_secs(args.lease_seconds),
            drain_deadline: Duration::from_secs(args.drain_seconds),
            transport,
            tls,
            next_role,
        };
        announce(role.name(), &model_name, bound);
        let expiry = args.cluster_tls.expiry(args.etcd_access.expiry(Expiry::default()));
        Ok(Self { config, built, registry, expiry })
    }
}

/// Tokens in one engine step.
pub fn step_tokens(args: &EngineArgs, role: Role, strategy: Strategy) -> usize {
    let default = match (role, args.device) {
        (Role::Prefill, Device::Cpu) => PREFILL_STEP_TOKENS,
        (Role::Prefill, Device::Cuda | Device::Sim) => PREFILL_STEP_TOKENS_GPU,
        (Role::Decode, Device::Cpu) if strategy == Strategy::Shared => SHARED_STEP_TOKENS,
        (Role::Decode, _) if strategy == Strategy::Shared => PREFILL_STEP_TOKENS_GPU,
        (Role::Decode, _) => DECODE_STEP_TOKENS,
    };
    args.step_tokens.unwrap_or(default).max(args.block_tokens)
}

/// What a router would refuse at its start.
pub async fn check_router(args: &RouterArgs) -> anyhow::Result<()> {
    server_files(args)?;
    args.cluster_tls.files().map(|files| files.check(&Part::Router)).transpose()?;
    args.api_keys.as_deref().map(Keys::read).transpose().map_err(anyhow::Error::msg)?;
    if !args.etcd.is_empty() {
        args.etcd_access.access().check(&args.etcd)?;
    }
    load_text(&args.model).await.map(drop)
}

/// What a worker would refuse at its start, but for its engine.
pub fn check_worker(args: &WorkerArgs) -> anyhow::Result<()> {
    if !args.etcd.is_empty() {
        args.etcd_access.access().check(&args.etcd)?;
    }
    let tls = args.cluster_tls.files();
    if let Some(files) = &tls {
        match &args.name {
            Some(name) => files.check(&Part::Worker(name.clone()))?,
            None => drop(files.names()?),
        }
    }
    transport(&args.transport, tls.is_some()).map(drop)
}

fn transport(args: &TransportArgs, tls: bool) -> anyhow::Result<TransportConfig> {
    let choice = match args.transport {
        TransportKind::Auto => TransportChoice::Auto,
        TransportKind::Tcp => TransportChoice::Tcp,
        TransportKind::Rdma => TransportChoice::Rdma,
    };
    if args.require_rdma && choice == TransportChoice::Tcp {
        anyhow::bail!("--require-rdma: contradicts --transport tcp; leave one of them out");
    }
    let gpudirect = match args.gpudirect {
        GpuDirectKind::Auto => GpuDirect::Auto,
        GpuDirectKind::Off => GpuDirect::Off,
        GpuDirectKind::Require => GpuDirect::Require,
    };
    if gpudirect == GpuDirect::Require && choice == TransportChoice::Tcp {
        anyhow::bail!("--gpudirect require: contradicts --transport tcp; leave one of them out");
    }
    let wants_rdma = args.require_rdma || choice == TransportChoice::Rdma || gpudirect == GpuDirect::Require;
    if tls && wants_rdma && !args.allow_plain_rdma {
        anyhow::bail!(
            "--cluster-cert: what RDMA writes is not encrypted; add --allow-plain-rdma to accept that, or use --transport tcp"
        );
    }
    if args.allow_plain_rdma && !tls {
        anyhow::bail!("--allow-plain-rdma: means nothing without --cluster-cert; leave it out");
    }
    let wire = match args.kv_wire {
        KvWireKind::Plain => KvWire::Plain,
        KvWireKind::Int8 => KvWire::Int8,
        KvWireKind::Fp8 => KvWire::Fp8,
    };
    if args.require_rdma && wire != KvWire::Plain {
        anyhow::bail!(
            "--kv-wire: contradicts --require-rdma, since only TCP packs KV; leave one of them out"
        );
    }
    let (devices, require_rdma) = (args.rdma_device.clone(), args.require_rdma);
    let plain_rdma = args.allow_plain_rdma;
    Ok(TransportConfig { choice, devices, require_rdma, gpudirect, plain_rdma, wire })
}

async fn load_engine(
    dir: &Path,
    args: &WorkerArgs,
    role: Role,
    step_tokens: usize,
) -> anyhow::Result<engines::Built> {
    let (dir, engine) = (dir.to_owned(), args.engine.clone());
    tokio::task::spawn_blocking(move || engines::build(&dir, &engine, role, step_tokens)).await?
}

/// Binds, saying which address was wanted when that fails.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; is the port in use? choose another with --listen")
    })
}

fn default_name(role: &str, bound: SocketAddr) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = match host.trim() {
        "" => "localhost",
        host => host,
    };
    format!("{host}-{role}-{}", bound.port())
}

fn announce(role: &str, model: &str, address: SocketAddr) {
    tracing::info!(role, model, %address, "starting");
}
