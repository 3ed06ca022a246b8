//! From needs to decisions, without flapping: quick up, slow down, never on one look alone.
//!
//! ```text
//!   need > target   on two looks in a row (one, when work waits already) ──► up to the need
//!   need < target   on every look of `down_window`, with `margin` more load, `cooldown` after the last change ──► down,
//!                   at most by half
//! ```

use std::collections::VecDeque;

use serde::Serialize;

use crate::Pool;
use crate::need::{self, Need, Reason, Slo};
use crate::observe::{History, Observation};
use crate::profile::Profile;

/// Fewest and most workers of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bounds {
    /// Fewest; 0 lets an idle pool go away.
    pub min: usize,
    /// Most.
    pub max: usize,
}

/// How decisions are damped. Times in seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Policy {
    /// What clients are promised.
    pub slo: Slo,
    /// The prefill pool.
    pub prefill: Bounds,
    /// The decode pool.
    pub decode: Bounds,
    /// How long fewer workers must have been enough.
    pub down_window: f64,
    /// How long after a change nothing goes down.
    pub cooldown: f64,
    /// More load than seen that fewer workers must bear, 0.2 is a fifth.
    pub margin: f64,
    /// Looks after the start that decide nothing: rates are not known yet.
    pub warm_up_looks: usize,
    /// Without a request for so long, a pool whose minimum is 0 goes away.
    pub idle: f64,
}

impl Policy {
    /// The defaults for a promise.
    pub fn new(slo: Slo, prefill: Bounds, decode: Bounds) -> Self {
        Self {
            slo,
            prefill,
            decode,
            down_window: 300.0,
            cooldown: 600.0,
            margin: 0.2,
            warm_up_looks: 2,
            idle: 600.0,
        }
    }
}

/// A pool's size changes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Decision {
    /// When.
    pub at: f64,
    /// Which pool.
    pub pool: Pool,
    /// From.
    pub from: usize,
    /// To.
    pub to: usize,
    /// Why.
    pub reason: Reason,
}

/// The planner of one cluster.
#[derive(Debug, Clone)]
pub struct Planner {
    policy: Policy,
    profile: Profile,
    history: History,
    pools: [Damper; 2],
}

/// One pool's memory.
#[derive(Debug, Clone)]
struct Damper {
    pool: Pool,
    bounds: Bounds,
    target: usize,
    /// Needs of the last looks, with margin.
    needs: VecDeque<(f64, Need)>,
    looks_above: usize,
    changed: f64,
}

impl Planner {
    /// Plans for a fleet that has `prefill` and `decode` workers now.
    pub fn new(policy: Policy, profile: Profile, prefill: usize, decode: usize) -> Self {
        let damper = |pool, bounds: Bounds, now: usize| Damper {
            pool,
            bounds,
            target: now.clamp(bounds.min, bounds.max.max(bounds.min)),
            needs: VecDeque::new(),
            looks_above: 0,
            changed: f64::NEG_INFINITY,
        };
        let pools =
            [damper(Pool::Prefill, policy.prefill, prefill), damper(Pool::Decode, policy.decode, decode)];
        let keep = policy.down_window.max(policy.idle).max(300.0) + 60.0;
        Self { history: History::new(keep), policy, profile, pools }
    }

    /// What each pool should have now.
    pub fn target(&self, pool: Pool) -> usize {
        self.pools[pool as usize].target
    }

    /// The newest need of a pool, before damping; with the margin for going down.
    pub fn need(&self, pool: Pool) -> Option<Need> {
        self.pools[pool as usize].needs.back().map(|(_, need)| *need)
    }

    /// Takes a look and decides.
    pub fn look(&mut self, seen: Observation) -> Vec<Decision> {
        self.history.add(seen);
        if self.history.len() <= self.policy.warm_up_looks {
            return Vec::new();
        }
        let (policy, history, profile) = (&self.policy, &self.history, &self.profile);
        let (calm, slo) = (1.0 + policy.margin, policy.slo);
        let needs = [
            (need::prefill(history, profile, slo, 1.0), need::prefill(history, profile, slo, calm)),
            (need::decode(history, profile, slo, 1.0), need::decode(history, profile, slo, calm)),
        ];
        let idle = history.idle_seconds() >= policy.idle;
        let decide = |(damper, (now, calm)): (&mut Damper, (Need, Need))| {
            damper.look(seen.now, policy, now, calm, idle)
        };
        self.pools.iter_mut().zip(needs).filter_map(decide).collect()
    }
}

impl Damper {
    fn look(&mut self, at: f64, policy: &Policy, now: Need, calm: Need, idle: bool) -> Option<Decision> {
        let now = self.bound(now, idle);
        self.needs.push_back((at, self.bound(calm, idle)));
        while self.needs.front().is_some_and(|(then, _)| *then < at - policy.down_window) {
            self.needs.pop_front();
        }
        if now.workers > self.target {
            self.looks_above += 1;
            let urgent = matches!(now.reason, Reason::Backlog | Reason::Waiting);
            return (urgent || self.looks_above >= 2).then(|| self.change(at, now));
        }
        self.looks_above = 0;
        let oldest = self.needs.front().map_or(at, |(then, _)| *then);
        // The window has to be full: after a start, or a long silence, nothing is known.
        let full = at - oldest >= policy.down_window * 0.9;
        let enough = self.needs.iter().map(|(_, need)| *need).max_by_key(|need| need.workers)?;
        if enough.workers >= self.target || !full || at - self.changed < policy.cooldown {
            return None;
        }
        let workers = enough.workers.max(self.target / 2);
        Some(self.change(at, Need { workers, reason: enough.reason }))
    }

    fn bound(&self, need: Need, idle: bool) -> Need {
        let least = match self.bounds.min {
            // A pool that may go away stays until nothing has come for long.
            0 if !idle => 1,
            min => min,
        };
        let workers = need.workers.clamp(least, self.bounds.max.max(least));
        let reason = if workers == need.workers { need.reason } else { Reason::Bounds };
        Need { workers, reason: if need.reason == Reason::Idle { Reason::Idle } else { reason } }
    }

    fn change(&mut self, at: f64, need: Need) -> Decision {
        let from = std::mem::replace(&mut self.target, need.workers);
        self.changed = at;
        self.looks_above = 0;
        Decision { at, pool: self.pool, from, to: need.workers, reason: need.reason }
    }
}
