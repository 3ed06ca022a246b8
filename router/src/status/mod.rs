//! What an operator sees: the fleet now, the last ten minutes, the slowest requests. Bounded, in memory.

mod history;
pub mod json;
mod page;
mod slow;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::v1;

use crate::admission::Admission;
use crate::fleet::Fleet;
use history::History;
pub use page::routes;
use slow::Slow;

/// How far back it goes.
const SPAN: Duration = Duration::from_secs(600);
/// Pairs of workers that are told apart; more than a fleet of dozens by dozens has at a time.
const MAX_PAIRS: usize = 4096;

/// Latency limits that a good request keeps.
#[derive(Debug, Clone, Copy)]
pub struct Slo {
    /// Received to first text. Default 2 s.
    pub ttft: Duration,
    /// Mean gap between tokens. Default 100 ms.
    pub itl: Duration,
}

impl Default for Slo {
    fn default() -> Self {
        Self { ttft: Duration::from_secs(2), itl: Duration::from_millis(100) }
    }
}

impl Slo {
    /// Whether a request kept both limits.
    pub fn is_met(&self, timeline: &v1::Timeline) -> bool {
        timeline.ttft_ms <= self.ttft.as_secs_f64() * 1e3
            && timeline.itl_mean_ms <= self.itl.as_secs_f64() * 1e3
    }
}

/// Clones share.
#[derive(Clone)]
pub struct Board {
    model: String,
    started: Instant,
    slo: Slo,
    fleet: Fleet,
    admission: Admission,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    history: History,
    slow: Slow,
    pairs: BTreeMap<(String, String), v1::Pair>,
}

impl Board {
    /// An empty one.
    pub fn new(model: String, slo: Slo, fleet: Fleet, admission: Admission) -> Self {
        Self { model, started: Instant::now(), slo, fleet, admission, seen: Arc::default() }
    }

    /// The limits.
    pub fn slo(&self) -> Slo {
        self.slo
    }

    /// A request ended well.
    pub fn note_ended(&self, complete: &v1::Complete) {
        let now = Instant::now();
        let met = complete.timeline.as_ref().is_some_and(|timeline| self.slo.is_met(timeline));
        let mut seen = self.seen.lock();
        seen.history.now(now).add(complete, met);
        seen.slow.add(now, complete);
        seen.note_pair(complete);
    }

    /// A request failed.
    pub fn note_failed(&self) {
        self.seen.lock().history.now(Instant::now()).failed += 1;
    }

    /// Everything, now.
    pub fn status(&self) -> v1::ClusterStatus {
        let now = Instant::now();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut seen = self.seen.lock();
        v1::ClusterStatus {
            model: self.model.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            registry_connected: self.fleet.is_connected(),
            running: count(self.admission.running()),
            queued: count(self.admission.queued()),
            slo_ttft_ms: self.slo.ttft.as_secs_f64() * 1e3,
            slo_itl_ms: self.slo.itl.as_secs_f64() * 1e3,
            workers: self.fleet.statuses(),
            history: seen.history.moments(now),
            slow: seen.slow.list(now),
            pairs: seen.pairs.values().cloned().collect(),
        }
    }
}

impl Seen {
    fn note_pair(&mut self, complete: &v1::Complete) {
        let (Some(kv), Some(timeline)) = (&complete.kv, &complete.timeline) else { return };
        if kv.bytes == 0 {
            return;
        }
        let key = (timeline.prefill_worker.clone(), timeline.decode_worker.clone());
        if self.pairs.len() >= MAX_PAIRS && !self.pairs.contains_key(&key) {
            return;
        }
        let (from, to) = key.clone();
        let pair = self.pairs.entry(key).or_insert_with(|| v1::Pair { from, to, ..v1::Pair::default() });
        pair.requests += 1;
        pair.bytes += kv.bytes;
        pair.transport.clone_from(&kv.transport);
        pair.exposed_ms += (timeline.exposed_transfer_ms - pair.exposed_ms) / pair.requests as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete(id: u32, ttft_ms: f64, itl_mean_ms: f64) -> v1::Complete {
        v1::Complete {
            request_id: id.to_string(),
            usage: Some(v1::Usage { prompt_tokens: 10, output_tokens: 5, cached_tokens: 2 }),
            timeline: Some(v1::Timeline {
                ttft_ms,
                itl_mean_ms,
                prefill_worker: "p".into(),
                decode_worker: "d".into(),
                ..Default::default()
            }),
            kv: Some(v1::KvTransfer { bytes: 100, transport: "tcp".into(), ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn sums_are_those_of_the_requests() {
        let board = Board::new("m".into(), Slo::default(), Fleet::default(), Admission::new(1, 1));
        for (id, ttft, itl) in [(0, 100.0, 10.0), (1, 3000.0, 10.0), (2, 200.0, 500.0)] {
            board.note_ended(&complete(id, ttft, itl));
        }
        board.note_failed();
        let status = board.status();
        let sum = |of: fn(&v1::Moment) -> u64| status.history.iter().map(of).sum::<u64>();
        assert_eq!(sum(|m| m.ended.into()), 3);
        assert_eq!((sum(|m| m.failed.into()), sum(|m| m.met.into())), (1, 1));
        assert_eq!((sum(|m| m.prompt_tokens), sum(|m| m.output_tokens), sum(|m| m.kv_bytes)), (30, 15, 300));
        let slow: Vec<&str> = status.slow.iter().map(|passed| passed.request_id.as_str()).collect();
        assert_eq!(slow, ["1", "2", "0"]);
        assert_eq!((status.pairs.len(), status.pairs[0].requests, status.pairs[0].bytes), (1, 3, 300));
    }
}
