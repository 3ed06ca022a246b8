//! `roofline` and `sim`: what is worked out and not run.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// Settings of `roofline`.
#[derive(Debug, Args)]
pub struct RooflineArgs {
    /// The network: smollm2, llama-1b, llama-8b, llama-70b, llama-70b-layer, qwen3-8b, or a model folder (its shape only)
    #[arg(long, default_value = "llama-70b")]
    pub shape: String,
    /// h100, h100-pcie, h200, b200, a100, l40s, or zen4-2
    #[arg(long, default_value = "h100")]
    pub device: String,
    /// Devices that share one copy of the network; 0: the fewest that leave a fifth of their memory to KV
    #[arg(long, default_value_t = 0)]
    pub devices: u16,
    /// Numbers of the weights, and of activations in products
    #[arg(long, value_enum, default_value_t = NumberType::Bf16)]
    pub weights: NumberType,
    /// Numbers of the KV
    #[arg(long, value_enum, default_value_t = NumberType::Bf16)]
    pub kv: NumberType,
    /// Rates as measured by us, where they are, instead of the maker's
    #[arg(long)]
    pub reached: bool,
    /// Tokens of a prompt
    #[arg(long, default_value_t = 2048)]
    pub prompt: usize,
    /// Tokens that a decoding sequence has behind it
    #[arg(long, default_value_t = 2048)]
    pub context: usize,
    /// Links for the table of transfers, comma-separated: nvlink4, ndr-x8, pcie5, ndr, roce-200, eth-100, eth-25, eth-10 [default: all]
    #[arg(long, value_delimiter = ',')]
    pub link: Vec<String>,
    /// One JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NumberType {
    /// 32-bit float
    F32,
    /// 16-bit brain float
    Bf16,
    /// 8-bit integer
    Int8,
    /// 8-bit float
    Fp8,
}

/// Settings of `sim`.
#[derive(Debug, Args)]
pub struct SimArgs {
    /// Workers of the prefill pool; strategies without one have as many workers in all
    #[arg(long, default_value_t = 1)]
    pub prefill: usize,
    /// Workers of the decode pool
    #[arg(long, default_value_t = 1)]
    pub decode: usize,
    /// Strategies, one after the other
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "shared,chunked,priority,disaggregated,adaptive"
    )]
    pub policy: Vec<StrategyChoice>,
    /// The network: smollm2, llama-1b, llama-8b, llama-70b, qwen3-8b, or a model folder (its shape only)
    #[arg(long, default_value = "llama-8b")]
    pub shape: String,
    /// What a worker runs on: h100, h100-fp8, cpu, h100x4 (four share a copy), or a JSON file
    #[arg(long, default_value = "h100")]
    pub profile: String,
    /// Link between workers, as in `tandem roofline`, at 80 % of its rate [default: the profile's]
    #[arg(long)]
    pub link: Option<String>,
    /// The link's rate as reached, GB/s, instead
    #[arg(long, conflicts_with = "link")]
    pub link_gb_per_second: Option<f64>,
    /// Decode workers compare landed KV on their engine's thread, as they do where the pool is in host memory (on CPUs)
    #[arg(long)]
    pub host_seals: bool,
    /// Requests a second, arriving independently (Poisson); several are run one after the other
    #[arg(long, value_delimiter = ',', conflicts_with = "trace")]
    pub rate: Vec<f64>,
    /// Virtual seconds of each rate
    #[arg(long, default_value_t = 120.0)]
    pub seconds: f64,
    /// Virtual seconds at the beginning that do not count
    #[arg(long, default_value_t = 20.0)]
    pub warm_up: f64,
    /// Tokens of a prompt, on average
    #[arg(long, default_value_t = 1024)]
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
    /// As of `tandem bench serve`, which with the same seed sends the same requests
    #[arg(long, default_value_t = 32_000, value_parser = clap::value_parser!(u32).range(200..))]
    pub vocab: u32,
    /// Requests of a file: Mooncake's JSON lines (hash_ids become shared prefixes) or Azure's CSV
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// The trace faster (2) or slower (0.5)
    #[arg(long, default_value_t = 1.0)]
    pub speed: f64,
    /// Every request of the trace that many times, with nothing in common
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub load: u32,
    /// Prompts of a trace are cut to so many tokens
    #[arg(long, default_value_t = 131_072)]
    pub longest_prompt: usize,
    /// Tokens of a KV block
    #[arg(long, default_value_t = 16)]
    pub block_tokens: usize,
    /// KV pool of a worker, GiB [default: what the weights leave of nine tenths of the profile's memory]
    #[arg(long)]
    pub kv_gib: Option<f64>,
    /// Tokens of a prefill worker's step
    #[arg(long, default_value_t = 8192)]
    pub prefill_step_tokens: usize,
    /// Tokens of a step in which a decode worker prefills too
    #[arg(long, default_value_t = 512)]
    pub chunk_tokens: usize,
    /// Sequences at once on one worker
    #[arg(long, default_value_t = 256)]
    pub max_sequences: usize,
    /// Sequences waiting on one worker before it sheds
    #[arg(long, default_value_t = 1024)]
    pub max_waiting: usize,
    /// Requests at once in the router, and behind them once more [default: what all workers can run]
    #[arg(long)]
    pub max_running: Option<usize>,
    /// Longest wait for room, seconds
    #[arg(long, default_value_t = 30.0)]
    pub queue_seconds: f64,
    /// Time to first token that counts as good, ms
    #[arg(long, default_value_t = 2000.0)]
    pub slo_ttft_ms: f64,
    /// Mean time between tokens that counts as good, ms; `priority` bounds its steps by it
    #[arg(long, default_value_t = 50.0)]
    pub slo_itl_ms: f64,
    /// Same seed, same result
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// A JSON array instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Who prefills where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StrategyChoice {
    /// Whole prompts beside decoding sequences, on every worker
    Shared,
    /// Prompts in chunks beside them
    Chunked,
    /// Chunks only in what --slo-itl-ms leaves of a step
    Priority,
    /// Every prompt on the prefill pool
    Disaggregated,
    /// The router decides for each prompt
    Adaptive,
}
