//! From counters to an [`Observation`]: pure.

use std::collections::HashMap;

use planner::{Observation, Profile};
use proto::v1::WorkerStatus;

/// Speeds of a worker that was seen first within so many seconds are not believed: caches are cold, kernels compile.
const WARM_UP_SECONDS: f64 = 60.0;

/// A metrics page: series → value. Lines that are no numbers are left out.
#[derive(Debug, Clone, Default)]
pub struct Page(HashMap<String, f64>);

impl Page {
    /// Reads Prometheus text.
    pub fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            let value: f64 = value.parse().ok()?;
            (!line.starts_with('#') && value.is_finite()).then(|| (series.to_owned(), value))
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// Sum over a metric's series; with `label`, over those that contain it.
    fn sum(&self, metric: &str, label: &str) -> f64 {
        let of_metric = |series: &str| series.split('{').next() == Some(metric) && series.contains(label);
        self.0.iter().filter(|(series, _)| of_metric(series)).map(|(_, value)| value).sum()
    }
}

/// What one router has counted.
#[derive(Debug, Clone, Copy, Default)]
struct Counted {
    ended: f64,
    ok: f64,
    prompt_tokens: f64,
    output_tokens: f64,
    inside: f64,
    queued: f64,
}

impl Counted {
    fn of(page: &Page) -> Self {
        let queued = page.sum("tandem_requests_queued", "");
        Self {
            ended: page.sum("tandem_requests_total", ""),
            ok: page.sum("tandem_requests_total", "outcome=\"ok\""),
            prompt_tokens: page.sum("tandem_prompt_tokens_total", ""),
            output_tokens: page.sum("tandem_output_tokens_total", ""),
            inside: page.sum("tandem_requests_running", "") + queued,
            queued,
        }
    }
}

/// What was seen last, to tell what is new.
#[derive(Debug, Default)]
pub struct Memory {
    routers: HashMap<String, Counted>,
    computed: HashMap<(String, u64), f64>,
    first_seen: HashMap<(String, u64), f64>,
    queued_tokens: f64,
}

/// Everything that a look brought.
pub struct Seen<'a> {
    /// Seconds.
    pub now: f64,
    /// Pages by router address.
    pub routers: &'a HashMap<String, Page>,
    /// A router's list.
    pub workers: &'a [WorkerStatus],
    /// Pages of prefill workers by name.
    pub prefill: &'a HashMap<String, Page>,
}

/// A counter's growth; after a restart it began at 0.
fn growth(before: f64, now: f64) -> f64 {
    if now >= before { now - before } else { now }
}

impl Memory {
    /// What is new since the last look.
    pub fn observe(&mut self, seen: &Seen<'_>, profile: &Profile) -> Observation {
        let ready = |role: &str| {
            let role = role.to_owned();
            seen.workers.iter().filter(move |w| w.role == role && w.state == "ready")
        };
        let mut out = Observation {
            now: seen.now,
            prefill_workers: ready("prefill").count(),
            decode_workers: ready("decode").count(),
            ..Observation::default()
        };
        self.routers(seen, &mut out);
        self.prefill(seen, profile, &mut out);
        for worker in seen.workers.iter().filter(|w| w.role == "decode") {
            out.running += f64::from(worker.running + worker.waiting);
            let held = worker.total_blocks.saturating_sub(worker.free_blocks);
            out.running_tokens += f64::from(held) * f64::from(worker.block_tokens);
        }
        out
    }

    fn routers(&mut self, seen: &Seen<'_>, out: &mut Observation) {
        let now: HashMap<String, Counted> =
            seen.routers.iter().map(|(address, page)| (address.clone(), Counted::of(page))).collect();
        for (address, counted) in &now {
            out.decode_waiting += counted.queued;
            // A router that is new to us has counted before we looked.
            let Some(before) = self.routers.get(address) else { continue };
            let ended = growth(before.ended, counted.ended);
            out.requests += (ended + counted.inside - before.inside).max(0.0);
            out.finished += growth(before.ok, counted.ok);
            out.finished_prompt_tokens += growth(before.prompt_tokens, counted.prompt_tokens);
            out.finished_output_tokens += growth(before.output_tokens, counted.output_tokens);
        }
        self.routers = now;
    }

    /// Work that arrived is what was computed, and what more waits now.
    fn prefill(&mut self, seen: &Seen<'_>, profile: &Profile, out: &mut Observation) {
        let workers: Vec<&WorkerStatus> = seen.workers.iter().filter(|w| w.role == "prefill").collect();
        let mut computed = HashMap::new();
        let mut tokens = 0.0;
        for worker in &workers {
            let key = (worker.worker.clone(), worker.incarnation);
            let Some(page) = seen.prefill.get(&worker.worker) else { continue };
            let now = page.sum("tandem_step_tokens_total", "");
            tokens += self.computed.get(&key).map_or(0.0, |before| growth(*before, now));
            computed.insert(key, now);
        }
        let queued: f64 = workers.iter().map(|w| w.queued_tokens as f64).sum();
        let speed = self.speed(seen.now, &workers, profile);
        out.prefill_backlog = queued / speed;
        out.prefill_work = (tokens + queued - self.queued_tokens).max(0.0) / speed;
        // The pages do not tell lengths apart: as uneven as exponential ones.
        let each = if out.requests > 0.0 { out.prefill_work / out.requests } else { 0.0 };
        out.prefill_work_squared = out.requests * each * each * 2.0;
        (self.computed, self.queued_tokens) = (computed, queued);
    }

    /// Tokens a second of a warm prefill worker; the profile's where none is.
    fn speed(&mut self, now: f64, workers: &[&WorkerStatus], profile: &Profile) -> f64 {
        let key = |w: &WorkerStatus| (w.worker.clone(), w.incarnation);
        let old = std::mem::take(&mut self.first_seen);
        self.first_seen =
            workers.iter().map(|w| (key(w), old.get(&key(w)).copied().unwrap_or(now))).collect();
        let warm = |w: &&&WorkerStatus| {
            now - self.first_seen[&key(w)] >= WARM_UP_SECONDS && w.tokens_per_second > 0.0
        };
        let speeds: Vec<f64> = workers.iter().filter(warm).map(|w| w.tokens_per_second).collect();
        match speeds.is_empty() {
            true => 1.0 / profile.prefill_token_seconds.max(1e-9),
            false => speeds.iter().sum::<f64>() / speeds.len() as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn router(ended: u32, inside: u32) -> HashMap<String, Page> {
        let text = format!(
            "# TYPE tandem_requests_total counter\ntandem_requests_total{{outcome=\"ok\"}} {ended}\n\
             tandem_requests_total{{outcome=\"cancelled\"}} 0\ntandem_requests_running {inside}\ntandem_requests_queued 0\n\
             tandem_prompt_tokens_total {}\ntandem_output_tokens_total {}\nbroken line\nnan NaN\n",
            ended * 100,
            ended * 10
        );
        [("r".to_owned(), Page::parse(&text))].into()
    }

    fn worker(incarnation: u64, tokens_per_second: f64, queued_tokens: u64) -> WorkerStatus {
        WorkerStatus {
            worker: "p".into(),
            role: "prefill".into(),
            state: "ready".into(),
            incarnation,
            tokens_per_second,
            queued_tokens,
            ..WorkerStatus::default()
        }
    }

    fn page(tokens: u32) -> HashMap<String, Page> {
        [("p".to_owned(), Page::parse(&format!("tandem_step_tokens_total {tokens}\n")))].into()
    }

    #[test]
    fn only_what_is_new_counts() {
        let (mut memory, profile) = (Memory::default(), Profile::H100_8B);
        let mut look = |now, ended, inside, incarnation, tokens, queued| {
            let workers = [worker(incarnation, 500.0, queued)];
            let (routers, prefill) = (router(ended, inside), page(tokens));
            memory.observe(&Seen { now, routers: &routers, workers: &workers, prefill: &prefill }, &profile)
        };
        assert_eq!(look(0.0, 1_000_000, 5, 1, 999_999, 0).requests, 0.0, "counted before we looked");
        let seen = look(100.0, 1_000_010, 7, 1, 1_000_999, 1000);
        assert_eq!((seen.requests, seen.finished), (12.0, 10.0));
        assert_eq!((seen.finished_prompt_tokens, seen.finished_output_tokens), (1000.0, 100.0));
        // 1000 computed and 1000 more waiting, at the measured 500 tokens/s.
        assert_eq!((seen.prefill_work, seen.prefill_backlog), (4.0, 2.0));
        // The router began anew, and so did the worker.
        let seen = look(200.0, 3, 7, 2, 40, 1000);
        assert_eq!((seen.requests, seen.prefill_work), (3.0, 0.0));
    }

    #[test]
    fn a_cold_worker_is_not_believed() {
        let (mut memory, profile) = (Memory::default(), Profile::H100_8B);
        let workers = [worker(1, 3.0, 1000)];
        let (routers, prefill) = (router(0, 0), page(0));
        let mut backlog = |now| {
            let seen = Seen { now, routers: &routers, workers: &workers, prefill: &prefill };
            memory.observe(&seen, &profile).prefill_backlog
        };
        assert!(backlog(0.0) < 1.0, "by the profile");
        assert!((backlog(61.0) - 1000.0 / 3.0).abs() < 1e-9, "by what was measured");
    }
}
