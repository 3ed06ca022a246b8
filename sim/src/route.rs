//! The router: its real placement and prefix index over a picture of the workers as of their last steps.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::kv::hash::BlockHash;
use rand::Rng;
use rand::rngs::StdRng;
use router::placement::{self, Candidate, Demand, Model, Policy};
use router::prefix_index::{PrefixIndex, Slot};
use router::shortlist::shortlist;

use crate::Strategy;
use crate::clock::{Ns, ms};

/// Where a request goes.
pub(crate) struct Placed {
    pub(crate) decode: u32,
    pub(crate) prefill: Option<u32>,
    pub(crate) local_max: usize,
    /// To compute on the decode worker if the prompt is prefilled there, as far as the router knows.
    pub(crate) local_tokens: usize,
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
    slots: Vec<Slot>,
    /// Whose number in the index is whose; somebody else's is none.
    by_slot: Vec<Option<usize>>,
}

impl Side {
    fn new(letter: char, count: usize, block_tokens: usize, blocks: u32, index: &mut PrefixIndex) -> Self {
        let compat: Arc<str> = "sim".into();
        let candidate = |number: usize| Candidate {
            worker: format!("{letter}{number}").into(),
            compat_hash: compat.clone(),
            cached_tokens: 0,
            queued_tokens: 0,
            sequences: 0,
            running: 0,
            free_blocks: blocks as usize,
            block_tokens,
            tokens_per_second: 0.0,
            churn: 0.0,
        };
        let slots: Vec<Slot> = (0..count).map(|_| index.join(blocks as usize)).collect();
        let mut by_slot = vec![None; slots.iter().map(|slot| slot.index() + 1).max().unwrap_or(0)];
        slots.iter().enumerate().for_each(|(number, slot)| by_slot[slot.index()] = Some(number));
        Self {
            candidates: (0..count).map(candidate).collect(),
            assigned: vec![(0, 0); count],
            reported: vec![(0, 0); count],
            slots,
            by_slot,
        }
    }

    /// As the router's fleet does it: holders of the prompt and a sample.
    fn look(&self, index: &PrefixIndex, holders: &[(Slot, usize)], random: &mut StdRng) -> Vec<Candidate> {
        let own = |&(slot, blocks): &(Slot, usize)| Some(((*self.by_slot.get(slot.index())?)?, blocks));
        let holders = holders.iter().filter_map(own).collect();
        let candidate = |(number, blocks): (usize, usize)| {
            let (assigned, reported) = (self.assigned[number], self.reported[number]);
            let known = &self.candidates[number];
            Candidate {
                cached_tokens: blocks * known.block_tokens,
                queued_tokens: assigned.0.max(reported.0),
                sequences: assigned.1.max(reported.1),
                running: reported.1,
                churn: index.churn(self.slots[number]),
                ..known.clone()
            }
        };
        shortlist(self.candidates.len(), holders, random).into_iter().map(candidate).collect()
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
        let mut index = PrefixIndex::new(router::prefix_index::DEFAULT_BYTES);
        Self {
            prefill: Side::new('p', workers[0], block_tokens, blocks, &mut index),
            decode: Side::new('d', workers[1], block_tokens, blocks, &mut index),
            index,
            model: Model::FIRST_GUESS,
            policy,
            random,
            reasons: BTreeMap::new(),
        }
    }

    /// Chooses; `None` when there is nobody.
    pub(crate) fn place(&mut self, prompt: usize, chain: &[BlockHash]) -> Option<Placed> {
        let holders = self.index.holders(chain);
        let decode = self.decode.look(&self.index, &holders, &mut self.random);
        let prefill = match self.policy {
            Policy::Local => Vec::new(),
            _ => self.prefill.look(&self.index, &holders, &mut self.random),
        };
        let demand = Demand { prompt_tokens: prompt, salt: self.random.random::<u32>() as usize };
        let placed = placement::place(&demand, &prefill, &decode, self.policy, &self.model).ok()?;
        *self.reasons.entry(placed.reason).or_default() += 1;
        let number = |name: &str| name[1..].parse::<u32>().ok();
        Some(Placed {
            decode: number(&placed.decode)?,
            prefill: placed.prefill.as_deref().and_then(number),
            local_max: placed.local_prefill_max_tokens as usize,
            local_tokens: placed.expected.local_tokens,
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
        let slot = self.side(pool).slots[worker as usize];
        self.index.insert(slot, chain);
    }

    /// What a remote prefill cost beside queueing and computing, and how fast it was; as the router learns it.
    pub(crate) fn learn(&mut self, whole: Ns, queue: Ns, compute: Ns, computed: usize) {
        self.model.learn_remote(computed, ms(compute), ms(whole) - ms(queue) - ms(compute));
    }

    /// What a prefill on a decode worker took, from placement to the first token.
    pub(crate) fn learn_local(&mut self, tokens: usize, took: Ns) {
        self.model.learn_local(tokens, ms(took));
    }
}
