//! What is counted while time runs.

use hdrhistogram::Histogram;

use crate::Slo;
use crate::clock::{Ns, ms};
use crate::report::Quantiles;
use crate::request::Ended;

/// Microseconds, three digits, up to a day.
struct Times(Histogram<u64>);

impl Times {
    fn new() -> Self {
        Self(
            Histogram::new_with_bounds(1, 86_400_000_000, 3).unwrap_or_else(|_| unreachable!("fixed bounds")),
        )
    }

    fn add(&mut self, ns: Ns) {
        self.0.saturating_record((ns / 1000).max(1));
    }

    fn quantiles(&self) -> Quantiles {
        if self.0.is_empty() {
            return Quantiles::default();
        }
        let at = |q| self.0.value_at_quantile(q) as f64 / 1e3;
        Quantiles {
            mean: self.0.mean() / 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: self.0.max() as f64 / 1e3,
        }
    }
}

/// Counts of one run.
pub(crate) struct Record {
    slo: Slo,
    warm_up: Ns,
    ttft: Times,
    itl: Times,
    tpot: Times,
    e2e: Times,
    pub(crate) ok: usize,
    pub(crate) shed: usize,
    pub(crate) good: usize,
    pub(crate) prompt_tokens: u64,
    pub(crate) output_tokens: u64,
    /// First counted arrival, last end.
    pub(crate) span: (Ns, Ns),
    pub(crate) local: u64,
    pub(crate) remote: u64,
    /// Prompt tokens that were asked for on some worker, and those of them that its cache had.
    pub(crate) wanted_tokens: u64,
    pub(crate) hit_tokens: u64,
    /// Blocks of prompts prefilled remotely, and those that the decode worker had already.
    pub(crate) remote_blocks: u64,
    pub(crate) saved_blocks: u64,
    pub(crate) retries: u64,
}

impl Record {
    pub(crate) fn new(slo: Slo, warm_up: Ns) -> Self {
        let [ttft, itl, tpot, e2e] = [(); 4].map(|()| Times::new());
        Self {
            slo,
            warm_up,
            ttft,
            itl,
            tpot,
            e2e,
            ok: 0,
            shed: 0,
            good: 0,
            prompt_tokens: 0,
            output_tokens: 0,
            span: (Ns::MAX, 0),
            local: 0,
            remote: 0,
            wanted_tokens: 0,
            hit_tokens: 0,
            remote_blocks: 0,
            saved_blocks: 0,
            retries: 0,
        }
    }

    fn counts(&self, arrived: Ns) -> bool {
        arrived >= self.warm_up
    }

    /// A gap between two tokens of a request.
    pub(crate) fn gap(&mut self, arrived: Ns, gap: Ns) {
        if self.counts(arrived) {
            self.itl.add(gap);
        }
    }

    pub(crate) fn first(&mut self, arrived: Ns, at: Ns) {
        if self.counts(arrived) {
            self.ttft.add(at - arrived);
        }
    }

    pub(crate) fn shed(&mut self, arrived: Ns) {
        self.shed += usize::from(self.counts(arrived));
    }

    pub(crate) fn ended(&mut self, ended: &Ended) {
        if !self.counts(ended.arrived) {
            return;
        }
        self.ok += 1;
        self.prompt_tokens += ended.prompt as u64;
        self.output_tokens += ended.output as u64;
        self.span = (self.span.0.min(ended.arrived), self.span.1.max(ended.last));
        self.e2e.add(ended.last - ended.arrived);
        let gaps = (ended.output as u64).saturating_sub(1);
        let tpot = (ended.last - ended.first).checked_div(gaps).unwrap_or(0);
        if gaps > 0 {
            self.tpot.add(tpot);
        }
        let in_time = ms(ended.first - ended.arrived) <= self.slo.ttft_ms;
        self.good += usize::from(in_time && ms(tpot) <= self.slo.itl_ms);
    }

    /// TTFT, ITL, TPOT, E2E.
    pub(crate) fn quantiles(&self) -> [Quantiles; 4] {
        [&self.ttft, &self.itl, &self.tpot, &self.e2e].map(Times::quantiles)
    }
}
