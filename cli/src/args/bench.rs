//! What `bench` measures, and how.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use kv_transport::verbs::DeviceSelector;

use super::{ClusterTlsArgs, Device, DialArgs, KvType, KvWireKind, Quantize};

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
    /// Load on a running cluster or any OpenAI endpoint: TTFT, ITL, goodput, for one load or several
    Serve(BenchServeArgs),
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
    /// Through shared memory; both sides on this host
    #[arg(long, conflicts_with = "rdma")]
    pub shm: bool,
    /// Beside each row another one of bf16 that goes as this, in heads of 128; block sizes are multiples of 256 then
    #[arg(long, value_enum, default_value_t = KvWireKind::Plain, conflicts_with_all = ["rdma", "shm"])]
    pub kv_wire: KvWireKind,
    /// RDMA devices to use, as device, device:port or device:port:gid, comma-separated [default: every active port]
    #[arg(long, value_delimiter = ',')]
    pub rdma_device: Vec<DeviceSelector>,
    #[command(flatten)]
    pub cluster_tls: ClusterTlsArgs,
    /// One JSON object instead of a table
    #[arg(long)]
    pub json: bool,
    /// Stop when standard input ends
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// Settings of `bench serve`.
#[derive(Debug, Args)]
pub struct BenchServeArgs {
    /// Who is asked, host:port; with --api openai also http://host:port
    #[arg(long, default_value = "127.0.0.1:50051")]
    pub addr: String,
    #[command(flatten)]
    pub dial: DialArgs,
    /// How: Tandem's gRPC, or POST /v1/completions of any server, with token ids as the prompt
    #[arg(long, value_enum, default_value_t = Api::Grpc)]
    pub api: Api,
    /// Name of the model, for --api openai
    #[arg(long, default_value = "")]
    pub model: String,
    /// Open loop: requests a second, arriving independently (Poisson); several are measured one after the other
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["concurrency", "trace"])]
    pub rate: Vec<f64>,
    /// Requests that arrive together, with --rate
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub burst: u32,
    /// Closed loop: requests at a time, each followed by the next; several are measured one after the other
    #[arg(long, value_delimiter = ',', conflicts_with = "trace")]
    pub concurrency: Vec<usize>,
    /// Requests of a file at their times: Mooncake's JSON lines (hash_ids become shared prefixes) or Azure's CSV
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// The trace faster (2) or slower (0.5)
    #[arg(long, default_value_t = 1.0)]
    pub speed: f64,
    /// Seconds of each load, warm-up included
    #[arg(long, default_value_t = 30.0)]
    pub seconds: f64,
    /// Seconds at each load's beginning that do not count
    #[arg(long, default_value_t = 5.0)]
    pub warm_up: f64,
    /// Requests of one load, at most
    #[arg(long, default_value_t = 100_000)]
    pub requests: usize,
    /// Requests at a time, at most; those that are due meanwhile wait, and their waiting counts
    #[arg(long, default_value_t = 4096)]
    pub in_flight: usize,
    /// Tokens of a prompt, on average
    #[arg(long, default_value_t = 512)]
    pub prompt_tokens: usize,
    /// Tokens of an answer, on average
    #[arg(long, default_value_t = 128)]
    pub output_tokens: usize,
    /// Lengths vary evenly by this share around the average, 0 to 1
    #[arg(long, default_value_t = 0.0)]
    pub spread: f64,
    /// Tokens at the beginning that all prompts share
    #[arg(long, default_value_t = 0)]
    pub shared_prefix: usize,
    /// Prompts of a trace are cut to so many tokens
    #[arg(long, default_value_t = 131_072)]
    pub longest_prompt: usize,
    /// Token ids are drawn from 100 up to this; below the model's vocabulary
    #[arg(long, default_value_t = 32_000, value_parser = clap::value_parser!(u32).range(200..))]
    pub vocab: u32,
    /// Time to first token that counts as good, ms
    #[arg(long, default_value_t = 2000.0)]
    pub slo_ttft_ms: f64,
    /// Mean time between tokens that counts as good, ms
    #[arg(long, default_value_t = 100.0)]
    pub slo_itl_ms: f64,
    /// Same seed, same requests at the same times
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Also write a page with plots
    #[arg(long)]
    pub html: Option<PathBuf>,
    /// One JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// How an endpoint is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Api {
    /// tandem.v1.Inference
    Grpc,
    /// OpenAI's completions over HTTP
    Openai,
}

/// Settings of `bench engine`.
#[derive(Debug, Args)]
pub struct BenchEngineArgs {
    /// The network: smollm2, llama-1b, llama-8b, llama-70b, llama-70b-layer, qwen3-8b, or a model folder (its shape only)
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
    /// Lengths of the prompts of the prefill table instead of its own, none longer than --max-prompt
    #[arg(long, value_delimiter = ',')]
    pub prompts: Vec<usize>,
    /// Tokens that a decoding sequence has behind it
    #[arg(long, default_value_t = 1200)]
    pub context: usize,
    /// Round the layers' weights, and activations in every step
    #[arg(long, value_enum)]
    pub quantize: Option<Quantize>,
    /// Element type of the KV pool
    #[arg(long, value_enum, default_value_t = KvType::Bf16)]
    pub kv_dtype: KvType,
    /// Write where the time of some steps goes, for chrome://tracing or Perfetto
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// Measure what the simulator needs, and write it as a profile for `tandem sim --profile` and --sim-profile; no tables then
    #[arg(long, value_name = "FILE")]
    pub write_profile: Option<PathBuf>,
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
    /// Decode of 1, 2 and 4 sequences by one kernel for all layers, and by kernels apart
    Megakernel,
    /// Decode with and without CUDA graphs
    Graphs,
    /// 128 decoding sequences with a prompt beside them, in chunks of several sizes
    Chunk,
    /// Eight bits against bf16: a prompt of 2048 tokens, decode batches of 1 and 128
    Int8,
    /// Decode steps that draw greedily, with a temperature, filters, penalties, log-probabilities
    Draw,
    /// KV between a GPU and its host side, beside plain copies; and a prompt with and without it
    Copies,
    /// Where the time of a prefill and of decode steps goes, by part of the network
    Profile,
}
