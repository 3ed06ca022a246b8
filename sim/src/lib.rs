//! A cluster in virtual time: hours of a trace on a thousand workers in minutes, the same bytes for the same seed.
//!
//! Real are the values that decide: the router's fair queue, prefix index and placement, both workers' schedulers, block
//! pools with their ownership, reservations and prefix caches. Modelled are time (steps by a profile, links by bandwidth and
//! latency, hops), the tokens, and the processes around those values: no threads, sockets, text or failures.

mod choice;
mod clock;
mod decode;
mod load;
mod prefill;
mod record;
mod report;
mod request;
mod route;
mod world;

pub use load::{Arrivals, Lengths, Planned};
pub use report::{Quantiles, Report};

use engine::model::ModelConfig;
use engine::sim::Profile;
use serde::Serialize;

/// Who prefills where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Every worker does both; a prompt is one step, however long.
    Shared,
    /// Every worker does both; prompts come in chunks beside the decoding sequences.
    Chunked,
    /// Every worker does both; chunks take what the ITL limit leaves of a step.
    Priority,
    /// Two pools; every prompt goes to the prefill pool.
    Disaggregated,
    /// Two pools; the router decides for each prompt.
    Adaptive,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Shared, Self::Chunked, Self::Priority, Self::Disaggregated, Self::Adaptive];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Chunked => "chunked",
            Self::Priority => "priority",
            Self::Disaggregated => "disaggregated",
            Self::Adaptive => "adaptive",
        }
    }

    /// Whether there is a prefill pool.
    pub fn has_two_pools(self) -> bool {
        matches!(self, Self::Disaggregated | Self::Adaptive)
    }
}

/// What good is. Milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Slo {
    /// To the first token.
    pub ttft_ms: f64,
    /// Between tokens: the mean of a request, for goodput; a step's bound, for `priority`.
    pub itl_ms: f64,
}

/// A cluster and its rules.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// The network.
    pub shape: ModelConfig,
    /// What every worker runs on.
    pub profile: Profile,
    /// Strategy.
    pub strategy: Strategy,
    /// Workers of the prefill pool; without two pools these do both, like the others.
    pub prefill: usize,
    /// Workers of the decode pool.
    pub decode: usize,
    /// Tokens of a KV block.
    pub block_tokens: usize,
    /// Blocks of a worker's pool.
    pub blocks: u32,
    /// Tokens of a prefill worker's step.
    pub prefill_step_tokens: usize,
    /// Tokens of a step in which a decode worker prefills.
    pub chunk_tokens: usize,
    /// Sequences at once on a worker.
    pub max_sequences: usize,
    /// Sequences waiting on a worker before it sheds.
    pub max_waiting: usize,
    /// Requests at once in the router; behind them as many wait.
    pub max_running: usize,
    /// Longest wait for room, seconds.
    pub patience_seconds: f64,
    /// Landed KV is compared on the engine's thread before its first step, as decode workers do it.
    pub seals: bool,
    /// What good is.
    pub slo: Slo,
}

/// Why nothing was simulated.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// A setting cannot be.
    #[error("{0}")]
    Setting(String),
    /// A value broke its rule: a bug.
    #[error("the simulation broke an invariant: {0}")]
    Broken(String),
}

/// Runs the requests to their end. `progress` hears how many ended, of how many, and the virtual time in seconds.
pub fn run(
    cluster: &Cluster,
    arrivals: &Arrivals,
    seed: u64,
    warm_up_seconds: f64,
    progress: &mut dyn FnMut(usize, usize, f64),
) -> Result<Report, SimError> {
    check(cluster)?;
    let plan = load::plan(arrivals, seed);
    if plan.is_empty() {
        return Err(SimError::Setting("the load has no requests".into()));
    }
    world::World::new(cluster.clone(), plan, seed, warm_up_seconds).run(progress)
}

fn check(cluster: &Cluster) -> Result<(), SimError> {
    let wrong = |why: &str| Err(SimError::Setting(why.into()));
    if cluster.decode == 0 || (cluster.strategy.has_two_pools() && cluster.prefill == 0) {
        return wrong("at least one worker in each pool that the strategy has");
    }
    if cluster.prefill + cluster.decode > 100_000 {
        return wrong("at most 100000 workers");
    }
    if cluster.block_tokens == 0 || cluster.blocks < 2 || cluster.max_sequences == 0 {
        return wrong("KV blocks, their tokens and sequences at once must be above 0");
    }
    if cluster.chunk_tokens < cluster.block_tokens || cluster.prefill_step_tokens < cluster.block_tokens {
        return wrong("a step must have room for a block");
    }
    Ok(())
}
