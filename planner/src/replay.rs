//! A trace through a simulated fleet under some controller: what was promised, what was kept, what it cost.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::fleet::{Fleet, Job};
use crate::naive::Controller;
use crate::trace::{BLOCK_TOKENS, Request};
use crate::{Decision, Pool, Profile, Slo};

/// Seconds of one simulated step.
const TICK: f64 = 0.025;
/// Seconds between two looks of a controller.
pub const LOOK_SECONDS: f64 = 15.0;
/// After the last request the fleet may take so long; what is not done then counts as failed.
const PATIENCE: f64 = 1800.0;
/// A change back within so many seconds is flapping.
const FLAP_SECONDS: f64 = 600.0;

/// How a replay went.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Requests of the trace.
    pub requests: usize,
    /// Share of them that met both limits.
    pub attained: f64,
    /// Seconds to the first token: median, 99th percentile.
    pub ttft: [f64; 2],
    /// Mean seconds between a request's tokens: median, 99th percentile.
    pub tpot: [f64; 2],
    /// Hours of prefill and decode workers that existed.
    pub worker_hours: [f64; 2],
    /// Decisions in an hour.
    pub decisions_per_hour: f64,
    /// Decisions that took back the one before, in the same pool, within ten minutes.
    pub reversals: usize,
    /// All of them.
    pub decisions: Vec<Decision>,
}

impl Outcome {
    /// Hours of all workers.
    pub fn cost(&self) -> f64 {
        self.worker_hours[0] + self.worker_hours[1]
    }
}

/// Replays `requests` on a fleet that begins with `start` prefill and decode workers.
pub fn replay(
    requests: &[Request],
    profile: &Profile,
    slo: Slo,
    start: [usize; 2],
    control: &mut dyn Controller,
) -> Outcome {
    let mut fleet = Fleet::new(profile.clone(), start[0], start[1]);
    let mut cache = Prefixes::default();
    let end = requests.last().map_or(0.0, |r| r.at);
    let (mut next, mut ticks) = (0, 0u64);
    let (mut decisions, mut done) = (Vec::new(), Vec::new());
    let mut worker_seconds = [0.0; 2];
    let per_look = (LOOK_SECONDS / TICK) as u64;
    loop {
        let now = ticks as f64 * TICK;
        while let Some(request) = requests.get(next).filter(|r| r.at <= now) {
            let room = (fleet.prefill_ready().max(1) as f64 * profile.kv_tokens / BLOCK_TOKENS) as usize;
            let cached = cache.hit(&request.blocks, room).min(request.prompt - 1.0);
            let service = profile.prefill_seconds(request.prompt, cached);
            fleet.arrive(Job { at: request.at, prompt: request.prompt, output: request.output, service });
            next += 1;
        }
        if ticks.is_multiple_of(per_look) {
            for decision in control.look(&fleet.look()) {
                fleet.resize(decision.pool, decision.to);
                decisions.push(decision);
            }
            done.extend(fleet.take_done());
        }
        if now >= end && (fleet.is_empty() || now > end + PATIENCE) {
            break;
        }
        fleet.tick(TICK);
        ticks += 1;
        if now <= end {
            worker_seconds = fleet.worker_seconds;
        }
    }
    done.extend(fleet.take_done());
    let met = done.iter().filter(|d| d.ttft <= slo.ttft && d.tpot <= slo.itl).count();
    let during: Vec<Decision> = decisions.iter().copied().filter(|d| d.at <= end).collect();
    Outcome {
        requests: requests.len(),
        attained: met as f64 / requests.len().max(1) as f64,
        ttft: percentiles(done.iter().map(|d| d.ttft)),
        tpot: percentiles(done.iter().map(|d| d.tpot)),
        worker_hours: worker_seconds.map(|s| s / 3600.0),
        decisions_per_hour: during.len() as f64 / (end / 3600.0).max(1.0 / 60.0),
        reversals: reversals(&during),
        decisions: during,
    }
}

fn percentiles(values: impl Iterator<Item = f64>) -> [f64; 2] {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get(((values.len() as f64 - 1.0) * share) as usize).copied().unwrap_or(0.0);
    [at(0.5), at(0.99)]
}

fn reversals(decisions: &[Decision]) -> usize {
    let of = |pool: Pool| decisions.iter().filter(move |d| d.pool == pool);
    let back = |pool: Pool| {
        let pairs = of(pool).zip(of(pool).skip(1));
        pairs.filter(|(a, b)| (a.to > a.from) != (b.to > b.from) && b.at - a.at < FLAP_SECONDS).count()
    };
    back(Pool::Prefill) + back(Pool::Decode)
}

/// Which prompt blocks the prefill pool still has: least recently used ones go.
#[derive(Default)]
struct Prefixes {
    stamps: HashMap<u64, u64>,
    order: BTreeMap<u64, u64>,
    clock: u64,
}

impl Prefixes {
    /// Tokens of the prompt's longest known prefix; all its blocks are known from now on.
    fn hit(&mut self, blocks: &[u64], room: usize) -> f64 {
        let known = blocks.iter().take_while(|b| self.stamps.contains_key(b)).count();
        for block in blocks {
            self.clock += 1;
            if let Some(old) = self.stamps.insert(*block, self.clock) {
                self.order.remove(&old);
            }
            self.order.insert(self.clock, *block);
        }
        while self.stamps.len() > room.max(1) {
            let Some((_, block)) = self.order.pop_first() else { break };
            self.stamps.remove(&block);
        }
        known as f64 * BLOCK_TOKENS
    }
}

/// The cheapest fixed fleet that attains `share`, at most `most` workers in a pool; the largest when none does.
pub fn cheapest_static(
    requests: &[Request],
    profile: &Profile,
    slo: Slo,
    share: f64,
    most: usize,
) -> ([usize; 2], Outcome) {
    let run = |fleet: [usize; 2]| replay(requests, profile, slo, fleet, &mut crate::naive::Static);
    let good = |fleet: [usize; 2]| run(fleet).attained >= share;
    // Attainment grows with either pool, so each can be searched with the other at its largest, then both together.
    let search = |fits: &dyn Fn(usize) -> bool| {
        let (mut low, mut high) = (1, most);
        while low < high {
            let middle = (low + high) / 2;
            if fits(middle) { high = middle } else { low = middle + 1 }
        }
        low
    };
    let prefill = search(&|n| good([n, most]));
    let decode = search(&|n| good([prefill, n]));
    let fleet = [prefill, decode];
    (fleet, run(fleet))
}
