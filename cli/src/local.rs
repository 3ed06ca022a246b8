//! A local cluster: the router in this process, each worker a process of its own, KV over TCP on loopback.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use cluster::MemoryRegistry;
use proto::v1::ListWorkersRequest;
use proto::v1::inference_client::InferenceClient;
use router::Registry;
use telemetry::trace::Tracer;
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::args::{EngineArgs, ModelChoice, PlacementArgs, TransportArgs, TransportKind, UpArgs};
use crate::trace::{self, TraceArgs};
use crate::{model, serve, signal};

const START_PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);
const DRAIN: Duration = Duration::from_secs(30);
/// After this a child that does not end on its own is killed.
const CHILD_PATIENCE: Duration = Duration::from_secs(35);

/// What to start.
pub struct LocalSpec<'a> {
    pub prefill: usize,
    pub decode: usize,
    pub listen: SocketAddr,
    pub model: &'a ModelChoice,
    pub engine: &'a EngineArgs,
    pub transport: &'a TransportArgs,
    pub placement: &'a PlacementArgs,
    pub trace: TraceArgs,
    pub log: String,
}

/// A running local cluster. Its workers end with it, whatever happens.
pub struct LocalCluster {
    pub address: SocketAddr,
    children: Vec<(String, Child)>,
    /// The other ends of the children's standard inputs: closing them is their sign to drain.
    lifelines: Vec<ChildStdin>,
    router: JoinHandle<Result<(), router::RunError>>,
    tracer: Tracer,
    stop: CancellationToken,
}

impl LocalCluster {
    /// Starts everything and waits until every worker is in the fleet.
    pub async fn start(spec: LocalSpec<'_>) -> anyhow::Result<Self> {
        if spec.decode == 0 {
            bail!("--decode: at least 1; only decode workers stream tokens");
        }
        let text = serve::load_text(spec.model).await?;
        let listener = serve::bind(spec.listen).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let tracer = spec.trace.tracer("tandem-router", &address.to_string())?;
        let registry = Registry::Served(MemoryRegistry::new());
        let deps = router::Deps {
            text,
            registry,
            tracer: tracer.clone(),
            tls: None,
            cluster_tls: None,
            expiry: tls::Expiry::default(),
            keys: None,
        };
        let config = serve::router_config(spec.placement, DRAIN);
        let router = tokio::spawn(router::run(config, deps, listener, stop.clone()));
        let mut cluster = Self { address, children: Vec::new(), lifelines: Vec::new(), router, tracer, stop };
        for (role, count) in [("prefill", spec.prefill), ("decode", spec.decode)] {
            for number in 0..count {
                let name = format!("{role}-{number}");
                let mut child = spawn(role, &name, address, &spec)?;
                // Taken out, since waiting for a child closes what it still holds.
                cluster.lifelines.extend(child.stdin.take());
                cluster.children.push((name, child));
            }
        }
        cluster.wait_ready().await?;
        Ok(cluster)
    }

    async fn wait_ready(&mut self) -> anyhow::Result<()> {
        let started = tokio::time::Instant::now();
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", self.address))?;
        let mut client = InferenceClient::new(endpoint.connect().await?);
        loop {
            let workers = client.list_workers(ListWorkersRequest {}).await?.into_inner().workers;
            if workers.len() == self.children.len() {
                return Ok(());
            }
            for (name, child) in &mut self.children {
                if let Some(status) = child.try_wait()? {
                    bail!("worker {name} ended at once ({status}); its message is above");
                }
            }
            if started.elapsed() > START_PATIENCE {
                bail!("{} of {} workers started in {START_PATIENCE:?}", workers.len(), self.children.len());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Resolves when a worker ended by itself, with its name.
    async fn lost_worker(&mut self) -> String {
        let ends = self.children.iter_mut().map(|(name, child)| {
            Box::pin(async move {
                let _ = child.wait().await;
                name.clone()
            })
        });
        futures::future::select_all(ends).await.0
    }

    /// Drains and ends everything: first the workers, while the router still relays their tokens.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.lifelines.clear();
        for (name, mut child) in std::mem::take(&mut self.children) {
            if tokio::time::timeout(CHILD_PATIENCE, child.wait()).await.is_err() {
                tracing::warn!(worker = name, "does not end; killed");
                let _ = child.kill().await;
            }
        }
        self.stop.cancel();
        let ended = (&mut self.router).await?;
        trace::shutdown(self.tracer.clone()).await;
        Ok(ended?)
    }
}

fn spawn(role: &str, name: &str, registry: SocketAddr, spec: &LocalSpec<'_>) -> anyhow::Result<Child> {
    let engine = spec.engine;
    let dir = model::folder(spec.model)?;
    let mut command = Command::new(std::env::current_exe().context("where is this program?")?);
    // The router of a local cluster has no certificates, so its workers must not find any.
    for name in ["TANDEM_CLUSTER_CERT", "TANDEM_CLUSTER_KEY", "TANDEM_CLUSTER_CA"] {
        command.env_remove(name);
    }
    // The settings file has been read for `up`: its children are told everything.
    command
        .env_remove("TANDEM_CONFIG")
        .args(["--log", &spec.log, role, "--name", name, "--listen", "127.0.0.1:0", "--stop-with-parent"])
        .args(["--registry", &registry.to_string(), "--drain-seconds", "10"])
        .arg("--model")
        .arg(&dir)
        .args(["--model-name", &model::served_name(spec.model, &dir)])
        .args(["--block-tokens", &engine.block_tokens.to_string()])
        .args(["--kv-mib", &engine.kv_mib.to_string()])
        .args(["--kv-dtype", engine.kv_dtype.of_engine().name()])
        .args(["--device", engine.device.name()])
        .args(["--sim-profile", &engine.sim_profile])
        .args(["--gpu", &engine.gpu.to_string()])
        .args(["--max-sequences", &engine.max_sequences.to_string()])
        .args(["--max-waiting", &engine.max_waiting.to_string()])
        .args(["--strategy", spec.placement.strategy.name()])
        .args(["--slo-itl-ms", &spec.placement.slo_itl_ms.to_string()]);
    command.args(spec.trace.flags());
    let way = match spec.transport.transport {
        TransportKind::Auto => "auto",
        TransportKind::Tcp => "tcp",
        TransportKind::Rdma => "rdma",
    };
    command.args(["--transport", way, "--kv-wire", spec.transport.kv_wire.name()]);
    command.args(["--gpudirect", spec.transport.gpudirect.name()]);
    if spec.transport.require_rdma {
        command.arg("--require-rdma");
    }
    for device in &spec.transport.rdma_device {
        command.args(["--rdma-device", &device.to_string()]);
    }
    for (flag, value) in [
        ("--threads", engine.threads),
        ("--kv-blocks", engine.kv_blocks),
        ("--step-tokens", engine.step_tokens),
    ] {
        if let Some(value) = value {
            command.args([flag, &value.to_string()]);
        }
    }
    if let Some(shape) = &engine.sim_shape {
        command.args(["--sim-shape", shape]);
    }
    if let Some(tokens) = engine.chunk_tokens {
        command.args(["--chunk-tokens", &tokens.to_string()]);
    }
    if let Some(quantize) = engine.quantize {
        command.args(["--quantize", quantize.kind().name()]);
    }
    if engine.no_graphs {
        command.arg("--no-graphs");
    }
    // A process group of its own: Ctrl-C reaches this process only, which then ends the children in order.
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true);
    command.spawn().with_context(|| format!("cannot start worker {name}"))
}

/// `tandem up`.
pub async fn up(args: UpArgs) -> anyhow::Result<()> {
    let stop = signal::stop_token();
    let spec = LocalSpec {
        prefill: args.prefill,
        decode: args.decode,
        listen: args.listen,
        model: &args.model,
        engine: &args.engine,
        transport: &args.transport,
        placement: &args.placement,
        trace: args.trace.clone(),
        log: log_level(),
    };
    let mut cluster = tokio::select! {
        started = LocalCluster::start(spec) => started?,
        () = stop.cancelled() => return Ok(()),
    };
    println!(
        "serving {} on {} ({} prefill, {} decode)",
        args.model.model, cluster.address, args.prefill, args.decode
    );
    println!("try: tandem generate --addr {} \"Hello\"", cluster.address);
    loop {
        tokio::select! {
            () = stop.cancelled() => return cluster.stop().await,
            name = cluster.lost_worker(), if !cluster.children.is_empty() => {
                eprintln!("worker {name} ended; the others go on");
                cluster.children.retain(|(other, _)| *other != name);
            }
        }
    }
}

/// The level that this process logs at, for its children.
pub fn log_level() -> String {
    tracing::level_filters::LevelFilter::current().to_string().to_lowercase()
}
