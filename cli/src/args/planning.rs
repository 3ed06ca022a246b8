//! `plan` and `planner`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::{ClusterTlsArgs, DialArgs};

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
    /// Seconds that fewer workers must have been enough before a pool shrinks
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub shrink_after_seconds: u32,
    /// Seconds after a pool's size changed before it may shrink
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(0..=86_400))]
    pub cooldown_seconds: u32,
}

/// Settings of `planner`.
#[derive(Debug, Args)]
pub struct PlannerArgs {
    /// Routers, host:port; every address that the name has is looked at (Kubernetes: a headless Service)
    #[arg(long)]
    pub routers: String,
    #[command(flatten)]
    pub dial: DialArgs,
    #[command(flatten)]
    pub cluster_tls: ClusterTlsArgs,
    /// Address for KEDA (gRPC), /metrics and /health, host:port
    #[arg(long, default_value = "0.0.0.0:50081")]
    pub listen: SocketAddr,
    /// Seconds between two looks
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub look_seconds: u64,
    /// Move workers that were started with `worker --role auto` to the pool that needs them, one at a time. For a fleet of a
    /// fixed size; where an autoscaler changes the pools, leave it away
    #[arg(long)]
    pub switch_roles: bool,
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
