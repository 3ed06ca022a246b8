//! The command line, with what each knob means, its unit, default and range.

mod bench;
mod clients;
mod modelling;
mod planning;
mod processes;
mod security;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::model::Quantisation;
use kv_transport::verbs::DeviceSelector;

use crate::cpus::Cpus;
pub use bench::{Api, BenchArgs, BenchCommand, BenchEngineArgs, BenchKvArgs, BenchServeArgs, BenchTable};
pub use clients::{DialArgs, DrainArgs, GenerateArgs, RoleArgs, SamplingArgs, StatusArgs, TopArgs};
pub use modelling::{NumberType, RooflineArgs, SimArgs, StrategyChoice};
pub use planning::{PlanArgs, PlannerArgs, PlanningArgs};
pub use processes::{
    EtcdArgs, GpuDirectKind, KvWireKind, PlacementArgs, RoleChoice, RoleWorkerArgs, RouterArgs, Strategy,
    TransportArgs, TransportKind, UpArgs, WorkerArgs,
};
pub use security::{ApiKeyArgs, ClusterTlsArgs, KeyArgs, KeyCommand};

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
    /// Settings (TOML): keys are long flags, for every command or in a section [COMMAND]. Flags win over the environment,
    /// the environment over the file
    #[arg(long, global = true, env = "TANDEM_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Say which settings a process would start with, where each comes from, and whether they can work; start nothing
    #[arg(long, global = true)]
    pub check_config: bool,
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
    /// Run a worker of either pool, or one that changes between them
    Worker(RoleWorkerArgs),
    /// Send prompts to a cluster and stream the answers
    Generate(GenerateArgs),
    /// Take a worker out of placement: its running sequences move to others, nothing new comes
    Drain(DrainArgs),
    /// Let a drained worker take requests again
    Undrain(DrainArgs),
    /// Move a worker to the other pool: it drains and joins again
    Role(RoleArgs),
    /// Show the cluster once: workers, rates, what moved
    Status(StatusArgs),
    /// Watch the cluster live, in a terminal
    Top(TopArgs),
    /// Fetch, import and inspect models
    Model(ModelArgs),
    /// Make API keys for a router with --api-keys
    Key(KeyArgs),
    /// Measure the parts on the machine at hand
    Bench(BenchArgs),
    /// Work out what a network asks of a device: intensity, floors, rounding, KV over links
    Roofline(RooflineArgs),
    /// Run a load or a trace through a simulated cluster in virtual time, by several strategies
    Sim(SimArgs),
    /// Look at what fast KV needs of this machine: RDMA devices, limits, members; with a fix for each problem
    Doctor(DoctorArgs),
    /// Replay a trace: how many workers each pool should have had, when and why, and what it would have cost
    Plan(PlanArgs),
    /// Run the planner on a live cluster: how many workers each pool should have, for KEDA and Prometheus
    Planner(PlannerArgs),
    /// Print a completion script: `tandem completions bash > /etc/bash_completion.d/tandem`
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages into a folder
    Man {
        /// The folder
        out: PathBuf,
    },
}

impl Command {
    /// The CPUs that this process is to keep to.
    pub fn cpus(&self) -> Option<&Cpus> {
        match self {
            Self::Prefill(args) | Self::Decode(args) => args.cpus.as_ref(),
            Self::Worker(args) => args.worker.cpus.as_ref(),
            _ => None,
        }
    }
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// CPU cores
    Cpu,
    /// An NVIDIA GPU, compute capability 8.0 or later; needs CUDA 13's driver, NVRTC and cuBLASLt
    Cuda,
    /// Nothing: steps take the time that --sim-profile says, tokens are made up. For trying out a cluster
    Sim,
}

impl Device {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Sim => "sim",
        }
    }
}

/// Rounding of weights and activations at load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantize {
    /// Integers: weights with a scale per output, activations with a scale per token (on a CPU per 128 inputs); CPU and GPUs
    Int8,
    /// e4m3, scales as for int8; Hopper GPUs
    Fp8,
}

impl Quantize {
    /// As the engine says it.
    pub fn kind(self) -> Quantisation {
        match self {
            Self::Int8 => Quantisation::Int8,
            Self::Fp8 => Quantisation::Fp8,
        }
    }
}

/// Settings of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Also look at the members of the cluster behind this router, host:port
    #[arg(long)]
    pub addr: Option<String>,
    #[command(flatten)]
    pub dial: DialArgs,
    /// With --addr: MiB that every prefill worker pushes to every decode worker, to measure them; takes up to a quarter of the free
    /// blocks for a moment. 0: nothing is pushed
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(0..=1024))]
    pub probe_mib: u64,
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
    /// With --device sim: a built-in profile (h100, h100-fp8, cpu; h100x4: four share a copy) or a JSON file, as `tandem bench engine --write-profile` writes
    #[arg(long, default_value = "h100")]
    pub sim_profile: String,
    /// With --device sim: the network whose time is taken, by name as in `tandem roofline` [default: the model's own shape]
    #[arg(long)]
    pub sim_shape: Option<String>,
    /// Which GPU, from 0
    #[arg(long, default_value_t = 0)]
    pub gpu: usize,
    /// Round the layers' weights, and activations in every step; equal on every worker [default: as the checkpoint is]
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
    /// Tokens per KV block. Where the pools differ, prefill workers convert
    #[arg(long, default_value_t = 16)]
    pub block_tokens: usize,
    /// Prefill worker: memory for KV that is converted for decode workers of another --block-tokens or --kv-dtype, MiB, taken when
    /// the first one is met; the longest prompt must fit
    #[arg(long, default_value_t = 512)]
    pub convert_mib: usize,
    /// Element type of the KV pool. Where the pools differ, prefill workers convert. fp8 halves KV and rounds it: to three bits of
    /// mantissa, at most 448
    #[arg(long, value_enum, default_value_t = KvType::Bf16)]
    pub kv_dtype: KvType,
    /// Tokens in one engine step [default: prefill 512 on a CPU, 8192 on a GPU; decode 256, with --strategy shared 2048
    /// on a CPU, 8192 on a GPU: longer prompts are cut]
    #[arg(long)]
    pub step_tokens: Option<usize>,
    /// Prompt tokens in one step of a decode worker, unless the strategy is shared [default: --step-tokens]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub chunk_tokens: Option<u32>,
    /// Sequences at once on one worker
    #[arg(long, default_value_t = 256)]
    pub max_sequences: usize,
    /// Sequences waiting on one worker before it sheds
    #[arg(long, default_value_t = 1024)]
    pub max_waiting: usize,
}

/// Element type of the KV pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvType {
    /// 16-bit brain float
    Bf16,
    /// 32-bit float; on a CPU only
    F32,
    /// 8-bit float, e4m3; on a GPU from compute capability 8.9 on; on a CPU too, slower than bf16
    Fp8,
}

impl KvType {
    /// The same as the engine calls it.
    pub fn of_engine(self) -> engine::KvDtype {
        match self {
            Self::Bf16 => engine::KvDtype::Bf16,
            Self::F32 => engine::KvDtype::F32,
            Self::Fp8 => engine::KvDtype::Fp8,
        }
    }
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
