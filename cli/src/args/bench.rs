//! What `bench` measures, and how.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use kv_transport::verbs::DeviceSelector;

use super::{Device, Quantize};

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
