//! Clients of a router: `generate`, `status`, `top`, `drain`, `undrain` and `role`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use cluster::Role;

use super::{ApiKeyArgs, EngineArgs, ModelChoice, PlacementArgs, TransportArgs};

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
    #[command(flatten)]
    pub api_key: ApiKeyArgs,
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
    /// File with prompts: [{"id", "request_id", "messages" | "text" | "token_ids"}]
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

/// Settings of `role`.
#[derive(Debug, Args)]
pub struct RoleArgs {
    /// The worker's name, as `tandem status` shows it; it was started with `--role auto`
    pub worker: String,
    /// Its new pool: prefill or decode
    #[arg(value_parser = Role::from_str)]
    pub role: Role,
    /// Router of the cluster, host:port
    #[arg(long, default_value = "127.0.0.1:50051")]
    pub addr: String,
    #[command(flatten)]
    pub dial: DialArgs,
    /// Even when it is the last of its pool
    #[arg(long)]
    pub force: bool,
    /// Return once it takes requests in its new pool, at most after that many seconds
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
