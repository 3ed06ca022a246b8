//! What a run brought.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::{Slo, Strategy};

/// A distribution in ms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// Of ten the slowest begins here.
    pub p90: f64,
    /// Of a hundred.
    pub p99: f64,
    /// Of a thousand.
    pub p999: f64,
    /// The slowest.
    pub max: f64,
}

/// One run. The same settings and seed give the same bytes.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The strategy.
    pub strategy: Strategy,
    /// Prefill and decode workers; without two pools all do both.
    pub workers: [usize; 2],
    /// The profile.
    pub profile: String,
    /// Devices of one worker.
    pub devices: usize,
    /// The seed.
    pub seed: u64,
    /// What good was.
    pub slo: Slo,
    /// Requests of the load.
    pub requests: usize,
    /// Answered, of those that were counted.
    pub ok: usize,
    /// Refused, of those that were counted.
    pub shed: usize,
    /// Virtual seconds from the first counted arrival to the last token.
    pub seconds: f64,
    /// Requests a second within the limits.
    pub goodput: f64,
    /// Share of the counted requests that were.
    pub within_slo: f64,
    /// Output tokens a second.
    pub output_tokens_per_second: f64,
    /// Prompt tokens a second of answered requests.
    pub prompt_tokens_per_second: f64,
    /// Arrival until the first token.
    pub ttft_ms: Quantiles,
    /// Between two tokens.
    pub itl_ms: Quantiles,
    /// Mean between tokens, of each request.
    pub tpot_ms: Quantiles,
    /// Arrival until the end.
    pub e2e_ms: Quantiles,
    /// Prompts prefilled on the decode worker, and on the prefill pool.
    pub local_remote: [u64; 2],
    /// Why, by the router's count.
    pub reasons: BTreeMap<&'static str, u64>,
    /// Share of prompt tokens that the worker which prefills had cached.
    pub prefix_hit_rate: f64,
    /// Blocks of remote prompts, and those that were not sent since the decode worker had them.
    pub remote_blocks: u64,
    /// See `remote_blocks`.
    pub saved_blocks: u64,
    /// Tries that found a worker full.
    pub retries: u64,
    /// Sequences that gave their blocks back.
    pub preemptions: u64,
    /// Share of the time that workers of each pool computed.
    pub busy: [f64; 2],
    /// Largest decode batch of any worker.
    pub largest_batch: usize,
    /// Events of the run.
    pub events: u64,
}

impl Report {
    /// Head of [`Report::row`].
    pub fn head() -> String {
        let first = "| strategy | workers | ok / shed | goodput req/s (share) | tok/s out | TTFT p50 / p99 ms | ITL p50 / p99 ms | prefix hits | blocks not sent | busy |";
        format!("{first}\n{}", "|---".repeat(10) + "|")
    }

    /// One line of a table.
    pub fn row(&self) -> String {
        let saved = match self.remote_blocks {
            0 => "-".to_owned(),
            all => format!("{:.1} % of {all}", self.saved_blocks as f64 / all as f64 * 100.0),
        };
        let busy = match self.strategy.has_two_pools() {
            true => format!("{:.0} % + {:.0} %", self.busy[0] * 100.0, self.busy[1] * 100.0),
            false => format!("{:.0} %", self.busy[1] * 100.0),
        };
        let workers = match self.strategy.has_two_pools() {
            true => format!("{}+{}", self.workers[0], self.workers[1]),
            false => self.workers[1].to_string(),
        };
        format!(
            "| {} | {workers} | {} / {} | {:.2} ({:.1} %) | {:.0} | {:.1} / {:.1} | {:.2} / {:.2} | {:.1} % | {saved} | {busy} |",
            self.strategy.name(),
            self.ok,
            self.shed,
            self.goodput,
            self.within_slo * 100.0,
            self.output_tokens_per_second,
            self.ttft_ms.p50,
            self.ttft_ms.p99,
            self.itl_ms.p50,
            self.itl_ms.p99,
            self.prefix_hit_rate * 100.0,
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.row())
    }
}
