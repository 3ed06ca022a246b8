//! The command line, with what each knob means, its unit, default and range.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kv_transport::verbs::DeviceSelector;

use crate::trace::TraceArgs;

/// The model that is used when none is named.
pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// Tandem: disaggregated prefill/decode serving for large language models.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, about, after_help = EXAMPLES)]
pub struct Cli {
    /// What is logged to standard error: error, warn, info, debug, or a filter like `router=debug,info`
    #[arg(long, global = true, env = "TANDEM_LOG", default_value = "warn")]
    pub log: String,
    /// Log one JSON object a line
    #[arg(long, global = true)]
    pub log_json: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  tandem model fetch                                  get the demo model (93 MB, once)
  tandem generate \"What is the capital of France?\"    a temporary local cluster answers
  tandem up --prefill 1 --decode 2                    a local cluster in the foreground
  tandem generate --addr 127.0.0.1:50051 \"Hello\"      ask a running cluster

A deployment, one process each:
  tandem router  --model DIR --etcd http://etcd:2379
  tandem prefill --model DIR --etcd http://etcd:2379 --listen 0.0.0.0:50061 --advertise pod-ip:50061
  tandem decode  --model DIR --etcd http://etcd:2379 --listen 0.0.0.0:50071 --advertise pod-ip:50071

Exit codes: 0 done, 1 failed, 2 wrong command line, 3 cluster unreachable or pool empty,
4 request refused, 5 cluster full, 6 deadline passed, 130 interrupted.";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a local cluster in the foreground: a router and worker processes, no etcd needed
    Up(UpArgs),
    /// Run the router: admission, tokenizer, placement, the client API
    Router(RouterArgs),
    /// Run a prefill worker: computes prompts and pushes their KV
    Prefill(WorkerArgs),
    /// Run a decode worker: receives KV and streams tokens
    Decode(WorkerArgs),
    /// Send prompts to a cluster and stream the answers
    Generate(GenerateArgs),
    /// Take a worker out of placement: its running sequences move to others, nothing new comes
    Drain(DrainArgs),
    /// Let a drained worker take requests again
    Undrain(DrainArgs),
    /// Show the cluster once: workers, rates, what moved
    Status(StatusArgs),
    /// Watch the cluster live, in a terminal
    Top(TopArgs),
    /// Fetch, import and inspect models
    Model(ModelArgs),
    /// Measure the parts on the machine at hand
    Bench(BenchArgs),
    /// Look at what fast KV needs of this machine: RDMA devices, limits, members; with a fix for each problem
    Doctor(DoctorArgs),
    /// Replay a trace: how many workers each pool should have had, when and why, and what it would have cost
    Plan(PlanArgs),
    /// Run the planner on a live cluster: how many workers each pool should have, for KEDA and Prometheus
    Planner(PlannerArgs),
}

/// What is promised, what it may cost.
#[derive(Debug, Clone, Args)]
pub struct PlanningArgs {
    /// Promised time to the first token, seconds
    #[arg(long)]
    pub slo_ttft: f64,
    /// Promised time between tokens, seconds
    #[arg(long)]
    pub slo_itl: f64,
    /// How fast a worker is: JSON with fields of planner/src/profile.rs; what is missing is that of an 8B model in bf16
    /// on one H100
    #[arg(long)]
    pub profile: Option<PathBuf>,
    /// Fewest prefill workers; 0 lets an idle pool go away
    #[arg(long, default_value_t = 1)]
    pub min_prefill: usize,
    /// Most prefill workers
    #[arg(long, default_value_t = 64)]
    pub max_prefill: usize,
    /// Fewest decode workers
    #[arg(long, default_value_t = 1)]
    pub min_decode: usize,
    /// Most decode workers
    #[arg(long, default_value_t = 64)]
    pub max_decode: usize,
}

/// Settings of `planner`.
#[derive(Debug, Args)]
pub struct PlannerArgs {
    /// Routers, host:port; every address that the name has is looked at (Kubernetes: a headless Service)
    #[arg(long)]
    pub routers: String,
    #[command(flatten)]
    pub dial: DialArgs,
    /// Address for KEDA (gRPC), /metrics and /health, host:port
    #[arg(long, default_value = "0.0.0.0:50081")]
    pub listen: SocketAddr,
    /// Seconds between two looks
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub look_seconds: u64,
    #[command(flatten)]
    pub planning: PlanningArgs,
}

/// Settings of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Requests: Mooncake's JSON lines (timestamp, input_length, output_length, hash_ids) or Azure's CSV
    /// (TIMESTAMP,ContextTokens,GeneratedTokens)
    #[arg(long)]
    pub trace: PathBuf,
    /// Every request that many times, with nothing in common
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub load: u32,
    #[command(flatten)]
    pub planning: PlanningArgs,
    /// Prefill workers at the trace's beginning [default: the fewest]
    #[arg(long)]
    pub start_prefill: Option<usize>,
    /// Decode workers at the trace's beginning [default: the fewest]
    #[arg(long)]
    pub start_decode: Option<usize>,
    /// Also the cheapest fixed fleet that is as good, and an autoscaler on busy shares
    #[arg(long)]
    pub compare: bool,
    /// One JSON array instead of tables
    #[arg(long)]
    pub json: bool,
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// CPU cores
    Cpu,
    /// An NVIDIA GPU, compute capability 8.0 or later; needs CUDA 13's driver, NVRTC and cuBLASLt
    Cuda,
}

/// Rounding of weights and activations at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantize {
    /// e4m3: weights with a scale per output, activations with a scale per token; Hopper GPUs
    Fp8,
}

/// Settings of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Which part
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// The measurements.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Steps of an engine with random weights, each beside the least time that the device's ceilings allow
    Engine(BenchEngineArgs),
    /// The KV transport between two processes, or two hosts: bandwidth, latency, CPU time by block size
    Kv(BenchKvArgs),
}

/// Settings of `bench kv`.
#[derive(Debug, Args)]
pub struct BenchKvArgs {
    /// Be the far side, listening here, host:port, until interrupted; it reserves up to 4 GiB for whoever asks
    #[arg(long)]
    pub serve: Option<SocketAddr>,
    /// The far side's address, host:port [default: a child process on loopback]
    #[arg(long, conflicts_with = "serve")]
    pub to: Option<String>,
    /// Bytes of a block, comma-separated
    #[arg(long, value_delimiter = ',', default_value = "4096,16384,65536,262144,1048576,4194304")]
    pub blocks: Vec<u32>,
    /// TCP connections
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub streams: u16,
    /// MiB of one push
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub mib: u64,
    /// Pushes of each block size
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub runs: u16,
    /// Over RDMA, and nothing else
    #[arg(long)]
    pub rdma: bool,
    /// RDMA devices to use, as device, device:port or device:port:gid, comma-separated [default: every active port]
    #[arg(long, value_delimiter = ',')]
    pub rdma_device: Vec<DeviceSelector>,
    /// One JSON object instead of a table
    #[arg(long)]
    pub json: bool,
    /// Stop when standard input ends
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// Settings of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Also look at the members of the cluster behind this router, host:port
    #[arg(long)]
    pub addr: Option<String>,
    /// The pool that is tried to be registered, MiB
    #[arg(long, default_value_t = 1024)]
    pub kv_mib: usize,
    /// RDMA devices to look at, as for a worker
    #[arg(long, value_delimiter = ',')]
    pub rdma_device: Vec<DeviceSelector>,
    /// A JSON list instead of text
    #[arg(long)]
    pub json: bool,
}

/// Settings of `bench engine`.
#[derive(Debug, Args)]
pub struct BenchEngineArgs {
    /// The network: smollm2, llama-1b, llama-8b, llama-70b-layer, qwen3-8b, or a model folder (its shape only)
    #[arg(long, default_value = "smollm2")]
    pub shape: String,
    /// Which measurements
    #[arg(long, value_enum, value_delimiter = ',', default_value = "all")]
    pub table: Vec<BenchTable>,
    /// What computes
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    pub device: Device,
    /// Which GPU, from 0
    #[arg(long, default_value_t = 0)]
    pub gpu: usize,
    /// Compute threads on the CPU [default: all cores]
    #[arg(long)]
    pub threads: Option<usize>,
    /// Timed runs of each row
    #[arg(long, default_value_t = 5)]
    pub runs: usize,
    /// Largest decode batch
    #[arg(long, default_value_t = 256)]
    pub max_batch: usize,
    /// Longest prompt, tokens
    #[arg(long, default_value_t = 8192)]
    pub max_prompt: usize,
    /// Tokens that a decoding sequence has behind it
    #[arg(long, default_value_t = 1200)]
    pub context: usize,
    /// Round the layers' weights, and activations in every step; GPU only
    #[arg(long, value_enum)]
    pub quantize: Option<Quantize>,
    /// Write where the time of some steps goes, for chrome://tracing or Perfetto; GPU only
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// One JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// Measurements of `bench engine`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchTable {
    /// All of them
    All,
    /// Prompts of several lengths, alone and packed
    Prefill,
    /// One token for batches of several sizes
    Decode,
    /// Decode with and without CUDA graphs
    Graphs,
    /// 128 decoding sequences with a prompt beside them, in chunks of several sizes
    Chunk,
    /// Where the time of a prefill and of decode steps goes, per kernel; GPU only
    Profile,
}

/// Where a model is found.
#[derive(Debug, Clone, Args)]
pub struct ModelChoice {
    /// A Hugging Face folder, or the name of a fetched model
    #[arg(long, env = "TANDEM_MODEL", default_value = DEFAULT_MODEL)]
    pub model: String,
    /// Name that clients use; the folder's name unless given
    #[arg(long)]
    pub model_name: Option<String>,
    /// Where fetched models are kept [default: ~/.cache/tandem]
    #[arg(long, env = "TANDEM_CACHE_DIR")]
    pub cache_dir: Option<PathBuf>,
}

/// How a worker computes.
#[derive(Debug, Clone, Args)]
pub struct EngineArgs {
    /// What computes
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    pub device: Device,
    /// Which GPU, from 0
    #[arg(long, default_value_t = 0)]
    pub gpu: usize,
    /// Round the layers' weights, and activations in every step; equal on every worker [default: bf16 as it is]
    #[arg(long, value_enum)]
    pub quantize: Option<Quantize>,
    /// Launch every kernel of a decode step instead of replaying a captured CUDA graph
    #[arg(long)]
    pub no_graphs: bool,
    /// Compute threads of a worker [default: all cores]
    #[arg(long)]
    pub threads: Option<usize>,
    /// Memory of a worker's KV pool, MiB
    #[arg(long, default_value_t = 1024)]
    pub kv_mib: usize,
    /// KV blocks of a worker's pool, instead of --kv-mib
    #[arg(long)]
    pub kv_blocks: Option<usize>,
    /// Tokens per KV block; equal on every worker
    #[arg(long, default_value_t = 16)]
    pub block_tokens: usize,
    /// Element type of the KV pool; equal on every worker
    #[arg(long, value_enum, default_value_t = KvType::Bf16)]
    pub kv_dtype: KvType,
    /// Tokens in one engine step [default: prefill 512 on a CPU, 8192 on a GPU; decode 256]
    #[arg(long)]
    pub step_tokens: Option<usize>,
    /// Sequences at once on one worker
    #[arg(long, default_value_t = 256)]
    pub max_sequences: usize,
    /// Sequences waiting on one worker before it sheds
    #[arg(long, default_value_t = 1024)]
    pub max_waiting: usize,
}

/// Which ways KV takes from worker to worker.
#[derive(Debug, Clone, Args)]
pub struct TransportArgs {
    /// The best way that both sides have (auto), only TCP, or RDMA or not at all on this machine
    #[arg(long, value_enum, default_value_t = TransportKind::Auto)]
    pub transport: TransportKind,
    /// RDMA devices to use, as device, device:port or device:port:gid, comma-separated [default: every active port]
    #[arg(long, value_delimiter = ',')]
    pub rdma_device: Vec<DeviceSelector>,
    /// Refuse a peer without RDMA, and a transfer that would have to leave it, rather than use TCP
    #[arg(long)]
    pub require_rdma: bool,
}

/// Ways for KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TransportKind {
    /// RDMA where both sides have it, else TCP
    Auto,
    /// Only TCP
    Tcp,
    /// RDMA; a worker without it does not start
    Rdma,
}

/// Element type of the KV pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvType {
    /// 16-bit brain float
    Bf16,
    /// 32-bit float
    F32,
}

/// How requests are placed.
#[derive(Debug, Clone, Args)]
pub struct PlacementArgs {
    /// Where prompts are prefilled: by predicted time, always on the prefill pool, or always on the decode worker
    #[arg(long, value_enum, default_value_t = PrefillOn::Adaptive)]
    pub prefill_on: PrefillOn,
    /// Requests at once in the router
    #[arg(long, default_value_t = 1024)]
    pub max_running: usize,
    /// Requests queued in the router before it sheds
    #[arg(long, default_value_t = 1024)]
    pub max_queued: usize,
    /// Longest wait for room on a worker, seconds
    #[arg(long, default_value_t = 30)]
    pub queue_seconds: u64,
    /// Time to first token that counts as good, ms; for the status and the metrics only
    #[arg(long, default_value_t = 2000)]
    pub slo_ttft_ms: u64,
    /// Mean gap between tokens that counts as good, ms; for the status and the metrics only
    #[arg(long, default_value_t = 100)]
    pub slo_itl_ms: u64,
}

/// Where prompts are prefilled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrefillOn {
    /// By predicted time
    Adaptive,
    /// Always on the prefill pool
    Remote,
    /// Always on the decode worker
    Local,
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
    /// Seconds that running requests may take when stopping
    #[arg(long, default_value_t = 30)]
    pub drain_seconds: u64,
    #[command(flatten)]
    pub placement: PlacementArgs,
    #[command(flatten)]
    pub trace: TraceArgs,
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

/// How a router with TLS is reached.
#[derive(Debug, Clone, Default, Args)]
pub struct DialArgs {
    /// Authorities (PEM) that may have signed the router's certificate; its address may be https://host:port
    #[arg(long, env = "TANDEM_CA")]
    pub ca: Option<PathBuf>,
    /// Our certificate (PEM), where the router wants one
    #[arg(long, env = "TANDEM_CERT", requires_all = ["key", "ca"])]
    pub cert: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, env = "TANDEM_KEY", requires = "cert")]
    pub key: Option<PathBuf>,
}

impl DialArgs {
    /// The same as files, where there is an authority.
    pub fn files(&self) -> Option<tls::ClientFiles> {
        let flags = tls::client::Flags { ca: "--ca", cert: "--cert", key: "--key" };
        Some(tls::ClientFiles {
            flags,
            ca: self.ca.clone()?,
            identity: self.cert.clone().zip(self.key.clone()),
        })
    }
}

/// Settings of `generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The prompt; read from standard input when missing
    pub prompt: Option<String>,
    /// Router of a running cluster, host:port; without it a temporary local cluster answers
    #[arg(long)]
    pub addr: Option<String>,
    #[command(flatten)]
    pub dial: DialArgs,
    /// File with prompts: [{"id", "messages" | "text" | "token_ids"}]
    #[arg(long, conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// Prompts of the file that run at once
    #[arg(long, default_value_t = 1)]
    pub concurrency: usize,
    /// System message before the prompt
    #[arg(long)]
    pub system: Option<String>,
    /// Send the prompt as it is, without the model's chat template
    #[arg(long, conflicts_with = "system")]
    pub raw: bool,
    /// One JSON object a line instead of text
    #[arg(long)]
    pub json: bool,
    /// No timeline after the answer
    #[arg(long, short)]
    pub quiet: bool,
    /// Give up after that many seconds
    #[arg(long)]
    pub timeout: Option<f64>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Prefill workers of a temporary cluster
    #[arg(long, default_value_t = 1)]
    pub prefill: usize,
    /// Decode workers of a temporary cluster
    #[arg(long, default_value_t = 1)]
    pub decode: usize,
    #[command(flatten)]
    pub model: ModelChoice,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub transport: TransportArgs,
    #[command(flatten)]
    pub placement: PlacementArgs,
}

/// Settings of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Router of the cluster, host:port
    #[arg(long, default_value = "127.0.0.1:50051")]
    pub addr: String,
    #[command(flatten)]
    pub dial: DialArgs,
    /// One JSON object, as at /status.json
    #[arg(long)]
    pub json: bool,
}

/// Settings of `top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Router of the cluster, host:port
    #[arg(long, default_value = "127.0.0.1:50051")]
    pub addr: String,
    #[command(flatten)]
    pub dial: DialArgs,
    /// Seconds between looks, 0.2 to 60
    #[arg(long, default_value_t = 1.0)]
    pub every: f64,
    /// Print one JSON object and end, as `status --json` does
    #[arg(long)]
    pub json: bool,
}

/// Settings of `drain` and `undrain`.
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// The worker's name, as `tandem.v1.Inference/ListWorkers` shows it
    pub worker: String,
    /// Router of the cluster, host:port
    #[arg(long, default_value = "127.0.0.1:50051")]
    pub addr: String,
    #[command(flatten)]
    pub dial: DialArgs,
    /// Return once nothing runs on it, at most after that many seconds (drain only)
    #[arg(long)]
    pub wait: Option<u64>,
    /// One JSON object instead of words
    #[arg(long)]
    pub json: bool,
}

/// How tokens are drawn.
#[derive(Debug, Clone, Args)]
pub struct SamplingArgs {
    /// 0 is greedy: always the most likely token; up to 2
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Only the most likely tokens that together reach this probability, above 0, up to 1
    #[arg(long, allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Only the k most likely tokens; 0 is off
    #[arg(long)]
    pub top_k: Option<u32>,
    /// Only tokens at least this fraction as likely as the most likely one, 0 to 1
    #[arg(long, allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Penalty on tokens seen before, above 0; 1 is off
    #[arg(long, allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Same seed, same tokens
    #[arg(long)]
    pub seed: Option<u64>,
    /// Output tokens, at most [default: what the context leaves, up to 4096]
    #[arg(long)]
    pub max_tokens: Option<u32>,
    /// End the answer before this string; may be given several times
    #[arg(long)]
    pub stop: Vec<String>,
    /// Go on after an end token
    #[arg(long)]
    pub ignore_eos: bool,
    /// Parallel answers, 1 to 16
    #[arg(long, short)]
    pub n: Option<u32>,
    /// Log-probabilities of this many alternatives (JSON only), 0 to 20
    #[arg(long)]
    pub logprobs: Option<u32>,
}

/// Settings of `model`.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Which tool
    #[command(subcommand)]
    pub command: ModelCommand,
}

/// The tools for models.
#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    /// Download a known model, check it, and import it into the cache
    Fetch {
        /// Its name
        #[arg(default_value = DEFAULT_MODEL)]
        name: String,
        /// Where fetched models are kept [default: ~/.cache/tandem]
        #[arg(long, env = "TANDEM_CACHE_DIR")]
        cache_dir: Option<PathBuf>,
    },
    /// Turn a GGUF file into a Hugging Face folder with bf16 weights
    Import {
        /// The GGUF file (Q4_0, Q4_1, Q8_0, F16, BF16, F32)
        gguf: PathBuf,
        /// The folder to make
        #[arg(long)]
        out: PathBuf,
    },
    /// Show what a model folder holds and what it needs
    Inspect {
        #[command(flatten)]
        model: ModelChoice,
        /// One JSON object
        #[arg(long)]
        json: bool,
    },
}
