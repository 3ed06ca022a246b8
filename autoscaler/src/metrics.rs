//! What the planner's process counts. The table for operators is docs/METRICS.md, kept true by a test.

use planner::{Decision, Planner, Pool, Reason};
use telemetry::{Counter, Family, Gauge};

/// Counters and gauges.
pub struct Metrics {
    /// Looks by whether the cluster could be seen.
    pub looks: Family<Counter>,
    /// Workers told to change their pool, by whether they were willing.
    pub switches: Family<Counter>,
    decisions: Family<Counter>,
    workers: Family<Gauge>,
    need: Family<Gauge>,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &telemetry::Metrics) -> Self {
        let pools = ["prefill", "decode"];
        let reasons = Reason::ALL.map(Reason::name);
        Self {
            looks: registry.counters(
                "tandem_planner_looks_total",
                "Looks at the cluster by whether it could be seen.",
                "outcome",
                &["ok", "failed"],
            ),
            decisions: registry.counters(
                "tandem_planner_decisions_total",
                "Decisions of the planner by their reason.",
                "reason",
                &reasons,
            ),
            switches: registry.counters(
                "tandem_planner_switches_total",
                "Workers told to change their pool, by whether they were willing.",
                "outcome",
                &["told", "refused"],
            ),
            workers: registry.gauges(
                "tandem_planner_workers",
                "Workers that the pool should have.",
                "pool",
                &pools,
            ),
            need: registry.gauges(
                "tandem_planner_need_workers",
                "Workers that the load of this moment needs, before damping, with the margin for shrinking.",
                "pool",
                &pools,
            ),
        }
    }

    /// A decision was taken.
    pub fn decided(&self, decision: &Decision) {
        self.decisions.of(decision.reason.name()).increment(1);
    }

    /// What stands now.
    pub fn sizes(&self, planner: &Planner, sizes: [usize; 2]) {
        for pool in [Pool::Prefill, Pool::Decode] {
            let name = pool.name();
            self.workers.of(name).set(sizes[pool as usize] as f64);
            if let Some(need) = planner.need(pool) {
                self.need.of(name).set(need.workers as f64);
            }
        }
    }
}
