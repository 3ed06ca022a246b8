//! `roofline` and `sim`: what is worked out and not run.

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
