//! The router: its real placement and prefix index over a picture of the workers as of their last steps.

use std::collections::BTreeMap;

use engine::kv::hash::BlockHash;
use rand::Rng;
use rand::rngs::StdRng;
use router::placement::{self, Candidate, Demand, Model, Policy};
use router::prefix_index::PrefixIndex;

use crate::Strategy;
use crate::clock::{Ns, ms};

/// Blocks that the prefix index remembers, as in the router.
const INDEX_BLOCKS: usize = 1 << 20;
/// Weight of the newest sample in the learned speeds, as in the router.
const LEARN: f64 = 0.1;

/// Where a request goes.
pub(crate) struct Placed {
    pub(crate) decode: u32,
    pub(crate) prefill: Option<u32>,
    pub(crate) local_max: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pool {
    Prefill,
    Decode,
}

/// One pool's workers as the router sees them.
struct Side {
    candidates: Vec<Candidate>,
    /// Tokens and sequences on their way, which a worker's own load may not show yet.
    assigned: Vec<(usize, usize)>,
    reported: Vec<(usize, usize)>,
}

impl Side {
    fn new(letter: char, count: usize, block_tokens: usize, blocks: u32) -> Self {
        let candidate = |number: usize| Candidate {
            worker: format!("{letter}{number}"),
            compat_hash: "sim".into(),
            cached_tokens: 0,
            queued_tokens: 0,
            sequences: 0,
            running: 0,
            free_blocks: blocks as usize,
            block_tokens,
            tokens_per_second: 0.0,
        };
        Self {
            candidates: (0..count).map(candidate).collect(),
            assigned: vec![(0, 0); count],
            reported: vec![(0, 0); count],
        }
    }

    fn look(&mut self, index: &PrefixIndex, chain: &[BlockHash]) {
        for (number, candidate) in self.candidates.iter_mut().enumerate() {
            let (assigned, reported) = (self.assigned[number], self.reported[number]);
            candidate.cached_tokens = index.hits(&candidate.worker, chain) * candidate.block_tokens;
            candidate.queued_tokens = assigned.0.max(reported.0);
            candidate.sequences = assigned.1.max(reported.1);
            candidate.running = reported.1;
        }
    }
}

pub(crate) struct Router {
    prefill: Side,
    decode: Side,
    index: PrefixIndex,
    model: Model,
    policy: Policy,
    random: StdRng,
    pub(crate) reasons: BTreeMap<&'static str, u64>,
}

impl Router {
    pub(crate) fn new(
        strategy: Strategy,
        workers: [usize; 2],
        block_tokens: usize,
        blocks: u32,
        random: StdRng,
    ) -> Self {
        let policy = match strategy {
            Strategy::Disaggregated => Policy::Remote,
            Strategy::Adaptive => Policy::Adaptive,
            _ => Policy::Local,
        };
        Self {
            prefill: Side::new('p', workers[0], block_tokens, blocks),
            decode: Side::new('d', workers[1], block_tokens, blocks),
            index: PrefixIndex::new(INDEX_BLOCKS),
            // What the router begins with.
            model: Model { remote_overhead_ms: 15.0, default_tokens_per_second: 500.0 },
            policy,
            random,
            reasons: BTreeMap::new(),
        }
    }

    /// Chooses; `None` when there is nobody.
    pub(crate) fn place(&mut self, prompt: usize, chain: &[BlockHash]) -> Option<Placed> {
        self.decode.look(&self.index, chain);
        if self.policy != Policy::Local {
            self.prefill.look(&self.index, chain);
        }
        let demand = Demand { prompt_tokens: prompt, salt: self.random.random::<u32>() as usize };
        let (prefill, decode) = (&self.prefill.candidates, &self.decode.candidates);
        let placed = placement::place(&demand, prefill, decode, self.policy, &self.model).ok()?;
        *self.reasons.entry(placed.reason).or_default() += 1;
        let number = |name: &str| name[1..].parse::<u32>().ok();
        Some(Placed {
            decode: number(&placed.decode)?,
            prefill: placed.prefill.as_deref().and_then(number),
            local_max: placed.local_prefill_max_tokens as usize,
        })
    }

    fn side(&mut self, pool: Pool) -> &mut Side {
        match pool {
            Pool::Prefill => &mut self.prefill,
            Pool::Decode => &mut self.decode,
        }
    }

    /// Counts a request towards a worker until [`Router::unassign`].
    pub(crate) fn assign(&mut self, pool: Pool, worker: u32, tokens: usize) {
        let assigned = &mut self.side(pool).assigned[worker as usize];
        assigned.0 += tokens;
        assigned.1 += 1;
    }

    pub(crate) fn unassign(&mut self, pool: Pool, worker: u32, tokens: usize) {
        let assigned = &mut self.side(pool).assigned[worker as usize];
        assigned.0 -= tokens;
        assigned.1 -= 1;
    }

    /// A worker's own word: queued tokens, sequences, speed; free blocks.
    pub(crate) fn report(&mut self, pool: Pool, worker: u32, load: (usize, usize, f64), free: usize) {
        let side = self.side(pool);
        side.reported[worker as usize] = (load.0, load.1);
        let candidate = &mut side.candidates[worker as usize];
        candidate.tokens_per_second = load.2;
        candidate.free_blocks = free;
    }

    /// The worker holds these blocks now.
    pub(crate) fn holds(&mut self, pool: Pool, worker: u32, chain: &[BlockHash]) {
        let name = self.side(pool).candidates[worker as usize].worker.clone();
        self.index.insert(&name, chain);
    }

    /// What a remote prefill cost beside queueing and computing, and how fast it was; as the router learns it.
    pub(crate) fn learn(&mut self, whole: Ns, queue: Ns, compute: Ns, computed: usize) {
        let overhead = ms(whole) - ms(queue) - ms(compute);
        let learn = |old: &mut f64, new: f64| *old += (new - *old) * LEARN;
        learn(&mut self.model.remote_overhead_ms, overhead.clamp(0.0, 10_000.0));
        if compute > 0 && computed >= 64 {
            learn(&mut self.model.default_tokens_per_second, computed as f64 / ms(compute) * 1e3);
        }
    }
}
