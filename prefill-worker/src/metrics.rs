//! What a prefill worker counts besides what every worker does. The table for operators is docs/METRICS.md.

use telemetry::{Counter, Gauge, Metrics};
use worker::metrics::Steps;

/// Counted by the engine's loop.
pub(crate) struct LoopMetrics {
    pub steps: Steps,
    /// Prompts dropped since their deadline passed.
    pub expired: Counter,
    /// Started prompts that gave way to others.
    pub gave_way: Counter,
    /// Tokens that a step may have now.
    pub budget: Gauge,
}

/// Of prompts whose KV was converted.
pub(crate) fn converted(m: &Metrics) -> Counter {
    m.counter(
        "tandem_kv_converted_blocks_total",
        "KV blocks made for decode workers whose blocks have another size or element type.",
    )
}

impl LoopMetrics {
    pub fn new(m: &Metrics) -> Self {
        Self {
            steps: Steps::new(m),
            expired: m.counter(
                "tandem_expired_prompts_total",
                "Prompts that were dropped since their deadline passed before they were computed.",
            ),
            gave_way: m.counter(
                "tandem_chunk_preemptions_total",
                "Times that a prompt under way gave way to others between two chunks.",
            ),
            budget: m.gauge(
                "tandem_step_budget_tokens",
                "Tokens that a step may have: --step-tokens, or the compute knee while several prompts wait.",
            ),
        }
    }
}
