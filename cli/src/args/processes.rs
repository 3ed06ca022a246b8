//! The processes of a cluster: `up`, `router`, `prefill` and `decode`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use cluster::Role;
use kv_transport::verbs::DeviceSelector;

use super::{ClusterTlsArgs, EngineArgs, ModelChoice};
use crate::cpus::Cpus;
use crate::trace::TraceArgs;

/// Which ways KV takes from worker to worker.
#[derive(Debug, Clone, Args)]
pub struct TransportArgs {
    /// The best way that both sides have (auto), only TCP, or only RDMA
    #[arg(long, value_enum, default_value_t = TransportKind::Auto)]
    pub transport: TransportKind,
    /// RDMA devices to use, as device, device:port or device:port:gid, comma-separated [default: every active port]
    #[arg(long, value_delimiter = ',')]
    pub rdma_device: Vec<DeviceSelector>,
    /// Refuse a peer without RDMA, and a transfer that would have to leave it, rather than use TCP
    #[arg(long)]
    pub require_rdma: bool,
    /// Network cards read and write a GPU's KV pool by themselves where they can (auto), never (off), or the worker does not start
    #[arg(long, value_enum, default_value_t = GpuDirectKind::Auto)]
    pub gpudirect: GpuDirectKind,
    /// As what KV goes over TCP from prefill to decode workers: plain, as the pools hold it, or int8 or fp8, half the bytes and
    /// rounded; only where both workers say the same and the decode worker's pool is bf16
    #[arg(long, value_enum, default_value_t = KvWireKind::Plain)]
    pub kv_wire: KvWireKind,
    /// With --cluster-cert: use RDMA although what it writes is not encrypted; without this, TCP is used
    #[arg(long)]
    pub allow_plain_rdma: bool,
}

/// Ways for KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TransportKind {
    /// Shared memory between workers on one host; else RDMA where both sides have it; else TCP
    Auto,
    /// Only TCP
    Tcp,
    /// RDMA; a worker without it does not start
    Rdma,
}

/// Whether KV goes between network card and GPU without the host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GpuDirectKind {
    /// Where card, driver and kernel can
    Auto,
    /// Always through the host's memory
    Off,
    /// A worker whose cards cannot does not start, and says why
    Require,
}

impl GpuDirectKind {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
            Self::Require => "require",
        }
    }
}

/// As what KV goes over TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvWireKind {
    /// As the pools hold it
    Plain,
    /// As eight-bit numbers with a scale for each head's vector
    Int8,
    /// As e4m3 numbers with a scale for each head's vector
    Fp8,
}

impl KvWireKind {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }
}

/// How requests are placed.
#[derive(Debug, Clone, Args)]
pub struct PlacementArgs {
    /// How prompts and decoding share the machines; the same on the router and on decode workers
    #[arg(long, alias = "prefill-on", value_enum, default_value_t = Strategy::Adaptive)]
    pub strategy: Strategy,
    /// Requests at once in the router
    #[arg(long, default_value_t = 1024)]
    pub max_running: usize,
    /// Requests queued in the router before it sheds
    #[arg(long, default_value_t = 1024)]
    pub max_queued: usize,
    /// Connections of the router from one address, at most; more when a proxy stands before it
    #[arg(long, default_value_t = 4096)]
    pub max_connections: usize,
    /// MiB of the router's memory of which worker holds which prompt's beginning; the least recently used goes first
    #[arg(long, default_value_t = router::prefix_index::DEFAULT_BYTES >> 20, value_parser = prefix_index_mib)]
    pub prefix_index_mib: usize,
    /// Longest wait for room on a worker, seconds
    #[arg(long, default_value_t = 30)]
    pub queue_seconds: u64,
    /// Time to first token that counts as good, ms; for the status and the metrics only
    #[arg(long, default_value_t = 2000)]
    pub slo_ttft_ms: u64,
    /// Mean gap between tokens that counts as good, ms; on decode workers the limit that steps keep to
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub slo_itl_ms: u64,
}

/// How prompts and decoding share the machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    /// On the prefill pool or on the decode worker, each request by predicted time; there as `priority`
    Adaptive,
    /// Always on the prefill pool
    #[value(alias = "remote")]
    Disaggregated,
    /// On the decode worker, whole prompts: decoding waits
    Shared,
    /// On the decode worker, in chunks of --chunk-tokens beside the decoding ones
    #[value(alias = "local")]
    Chunked,
    /// On the decode worker, decoding first: chunks in what --slo-itl-ms leaves of a step
    Priority,
}

impl Strategy {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Adaptive => "adaptive",
            Strategy::Disaggregated => "disaggregated",
            Strategy::Shared => "shared",
            Strategy::Chunked => "chunked",
            Strategy::Priority => "priority",
        }
    }
}

/// Settings of `up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Prefill workers, each a process
    #[arg(long, default_value_t = 1)]
    pub prefill: usize,
    /// Decode workers, each a process
    #[arg(long, default_value_t = 1)]
    pub decode: usize,
    /// Address of the client API, host:port; port 0 picks a free one
    #[arg(long, default_value = "127.0.0.1:50051")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub model: ModelChoice,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub transport: TransportArgs,
    #[command(flatten)]
    pub placement: PlacementArgs,
    #[command(flatten)]
    pub trace: TraceArgs,
}

/// How etcd is reached. The files are read again at every connection.
#[derive(Debug, Clone, Args)]
pub struct EtcdArgs {
    /// Authorities (PEM) that may have signed etcd's certificate; with https:// endpoints
    #[arg(long, env = "TANDEM_ETCD_CA", requires = "etcd")]
    pub etcd_ca: Option<PathBuf>,
    /// Our certificate for etcd (PEM), where it asks for one
    #[arg(long, env = "TANDEM_ETCD_CERT", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, env = "TANDEM_ETCD_KEY", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
    /// User of etcd, where it has authentication
    #[arg(long, env = "TANDEM_ETCD_USER", requires = "etcd_password_file")]
    pub etcd_user: Option<String>,
    /// File with the user's password on one line
    #[arg(long, env = "TANDEM_ETCD_PASSWORD_FILE", requires = "etcd_user")]
    pub etcd_password_file: Option<PathBuf>,
}

impl EtcdArgs {
    /// How long its files last, beside others.
    pub fn expiry(&self, expiry: tls::Expiry) -> tls::Expiry {
        expiry.with("etcd", self.etcd_cert.as_deref(), self.etcd_ca.as_deref())
    }

    /// The same for the registry.
    pub fn access(&self) -> cluster::EtcdAccess {
        cluster::EtcdAccess {
            ca: self.etcd_ca.clone(),
            identity: self.etcd_cert.clone().zip(self.etcd_key.clone()),
            user: self.etcd_user.clone().zip(self.etcd_password_file.clone()),
        }
    }
}

/// Settings of `router`.
#[derive(Debug, Args)]
pub struct RouterArgs {
    /// Address of the client API, host:port
    #[arg(long, default_value = "0.0.0.0:50051")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub model: ModelChoice,
    /// etcd endpoints, comma-separated; without it the router keeps the registry itself, for workers with --registry
    #[arg(long, value_delimiter = ',', env = "TANDEM_ETCD")]
    pub etcd: Vec<String>,
    #[command(flatten)]
    pub etcd_access: EtcdArgs,
    /// Name of the cluster, the middle of its keys in etcd
    #[arg(long, default_value = "default")]
    pub cluster: String,
    /// Certificate chain of the client API (PEM), gRPC and HTTPS; read again when it changes
    #[arg(long, env = "TANDEM_TLS_CERT", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, env = "TANDEM_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Only clients with a certificate of these authorities (PEM) may call; /health and /live stay open for probes
    #[arg(long, env = "TANDEM_TLS_CLIENT_CA", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Only who shows a key of this file may call, within the key's limits; read again when it changes (`tandem key new`)
    #[arg(long, env = "TANDEM_API_KEYS")]
    pub api_keys: Option<PathBuf>,
    #[command(flatten)]
    pub cluster_tls: ClusterTlsArgs,
    /// Seconds that running requests may take when stopping
    #[arg(long, default_value_t = 30)]
    pub drain_seconds: u64,
    #[command(flatten)]
    pub placement: PlacementArgs,
    #[command(flatten)]
    pub trace: TraceArgs,
}

/// Settings of `worker`.
#[derive(Debug, Args)]
pub struct RoleWorkerArgs {
    /// Its pool; auto: may change while it runs, on `tandem role` or by the planner
    #[arg(long, value_enum)]
    pub role: RoleChoice,
    /// First role with --role auto: prefill or decode
    #[arg(long, default_value = "decode", value_parser = Role::from_str)]
    pub start_as: Role,
    #[command(flatten)]
    pub worker: WorkerArgs,
}

/// Which pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoleChoice {
    /// Always the prefill pool, as `tandem prefill`
    Prefill,
    /// Always the decode pool, as `tandem decode`
    Decode,
    /// One after the other
    Auto,
}

/// Settings of `prefill` and `decode`.
#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// Address for gRPC and KV, host:port; port 0 picks a free one
    #[arg(long, default_value = "0.0.0.0:0")]
    pub listen: SocketAddr,
    /// Address that others reach this worker at, host:port [default: the bound address]
    #[arg(long)]
    pub advertise: Option<String>,
    /// Unique name in the cluster [default: host name, role and port]
    #[arg(long)]
    pub name: Option<String>,
    /// Failure zone, free text
    #[arg(long, default_value = "")]
    pub zone: String,
    #[command(flatten)]
    pub model: ModelChoice,
    /// etcd endpoints, comma-separated
    #[arg(long, value_delimiter = ',', env = "TANDEM_ETCD", conflicts_with = "registry")]
    pub etcd: Vec<String>,
    #[command(flatten)]
    pub etcd_access: EtcdArgs,
    /// Address of a router that keeps the registry, host:port
    #[arg(long, required_unless_present = "etcd")]
    pub registry: Option<String>,
    #[command(flatten)]
    pub cluster_tls: ClusterTlsArgs,
    /// Name of the cluster, the middle of its keys in etcd
    #[arg(long, default_value = "default")]
    pub cluster: String,
    /// Seconds after which a silent worker's key leaves etcd
    #[arg(long, default_value_t = 10)]
    pub lease_seconds: u64,
    /// Seconds without a byte of a transfer, or without an engine step while there is work, that are a failure;
    /// more than the slowest step takes
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub progress_seconds: u64,
    /// Seconds that running requests may take when stopping
    #[arg(long, default_value_t = 30)]
    pub drain_seconds: u64,
    /// How prompts and decoding share the machines; the same on the router. Of prefill workers nothing changes
    #[arg(long, value_enum, default_value_t = Strategy::Adaptive)]
    pub strategy: Strategy,
    /// Gap between tokens that decode workers keep to, ms, where the strategy is adaptive, disaggregated or priority
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub slo_itl_ms: u64,
    /// CPUs that this process keeps to, such as 0-3,8: workers of one machine then leave each other's cores alone
    #[arg(long)]
    pub cpus: Option<Cpus>,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub transport: TransportArgs,
    #[command(flatten)]
    pub trace: TraceArgs,
    /// Stop when standard input ends (set by `up` on its children)
    #[arg(long, hide = true)]
    pub stop_with_parent: bool,
}

fn prefix_index_mib(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(mib @ 1..=65_536) => Ok(mib),
        _ => Err("not between 1 and 65536".into()),
    }
}
