//! The workers that come into question for a prompt, with what each of them holds of it.

use cluster::{Member, Role};
use engine::kv::hash::BlockHash;
use rand::Rng;

use super::{Fleet, Worker};
use crate::placement::Candidate;
use crate::shortlist::shortlist;

/// One prompt's hash chains, each made once per compatibility hash and block size.
#[derive(Default)]
pub struct Chains {
    made: Vec<(String, u32, Vec<BlockHash>)>,
}

impl Chains {
    /// The prompt's chain as this member names it.
    pub fn of(&mut self, prompt: &[u32], member: &Member) -> &[BlockHash] {
        let is_known = |(c, b, _): &(String, u32, _)| *c == member.compat_hash && *b == member.block_tokens;
        let at = self.made.iter().position(is_known).unwrap_or_else(|| {
            let root = BlockHash::root(member.compat_hash.as_bytes());
            let chain = engine::kv::hash::chain(root, prompt, member.block_tokens.max(1) as usize);
            self.made.push((member.compat_hash.clone(), member.block_tokens, chain));
            self.made.len() - 1
        });
        &self.made[at].2
    }
}

impl Fleet {
    /// The worker holds the prompt's blocks now.
    pub fn note_prefix(&self, name: &str, prompt: &[u32], chains: &mut Chains) {
        // The lock is kept, so that the number stays that worker's.
        let workers = self.inner.workers.read();
        let Some(worker) = workers.get(name) else { return };
        let chain = chains.of(prompt, &worker.member);
        self.inner.prefixes.write().insert(worker.slot, chain);
    }

    /// Bytes that the prefix index uses and may use.
    pub fn prefix_bytes(&self) -> (usize, usize) {
        let prefixes = self.inner.prefixes.read();
        (prefixes.bytes(), prefixes.max_bytes())
    }

    /// Workers of a pool that take requests: all of a small one, a [`shortlist`] of a large one. Those that the request lost
    /// already, and those that are gone from the registry, come into question only when there is nobody else.
    pub fn candidates(
        &self,
        role: Role,
        prompt: &[u32],
        chains: &mut Chains,
        lost: &[String],
        random: &mut impl Rng,
    ) -> Vec<Candidate> {
        let workers = self.inner.workers.read();
        let open = || workers.values().filter(|w| w.member.role == role && w.load.is_open());
        let good = |w: &&Worker| w.is_good() && !lost.contains(&w.member.worker);
        let mut pool: Vec<&Worker> = open().filter(good).collect();
        if pool.is_empty() {
            pool = open().collect();
        }
        let mut candidates = Vec::new();
        // Only equal versions are paired: each has a list of its own.
        for alike in alike(pool) {
            let chain = chains.of(prompt, &alike[0].member);
            let holders = self.holders(&alike, chain);
            let listed = shortlist(alike.len(), holders, random);
            let prefixes = self.inner.prefixes.read();
            let candidate = |(at, blocks): (usize, usize)| {
                let worker = alike[at];
                worker.candidate(blocks, prefixes.churn(worker.slot))
            };
            candidates.extend(listed.into_iter().map(candidate));
        }
        candidates
    }

    /// Who of these holds how many blocks of the chain's beginning, by position.
    fn holders(&self, workers: &[&Worker], chain: &[BlockHash]) -> Vec<(usize, usize)> {
        let found = self.inner.prefixes.read().holders(chain);
        let Some(most) = found.iter().map(|(slot, _)| slot.index()).max() else { return Vec::new() };
        let mut places = vec![None; most + 1];
        for (at, worker) in workers.iter().enumerate() {
            if let Some(place) = places.get_mut(worker.slot.index()) {
                *place = Some(at);
            }
        }
        found.into_iter().filter_map(|(slot, blocks)| Some((places[slot.index()]?, blocks))).collect()
    }
}

/// The pool by version.
fn alike(pool: Vec<&Worker>) -> Vec<Vec<&Worker>> {
    let mut versions: Vec<Vec<&Worker>> = Vec::new();
    for worker in pool {
        let is_alike = |others: &&mut Vec<&Worker>| {
            others[0].compat == worker.compat && others[0].member.block_tokens == worker.member.block_tokens
        };
        match versions.iter_mut().find(is_alike) {
            Some(others) => others.push(worker),
            None => versions.push(vec![worker]),
        }
    }
    versions
}

impl Worker {
    fn candidate(&self, cached_blocks: usize, churn: f64) -> Candidate {
        let block_tokens = self.member.block_tokens.max(1) as usize;
        let assigned = self.assigned.lock();
        Candidate {
            worker: self.name.clone(),
            compat_hash: self.compat.clone(),
            cached_tokens: cached_blocks * block_tokens,
            queued_tokens: assigned.tokens.max(self.load.queued_tokens as usize),
            sequences: assigned.sequences.max((self.load.running + self.load.waiting) as usize),
            running: self.load.running as usize,
            free_blocks: self.load.free_blocks as usize,
            block_tokens,
            tokens_per_second: self.load.tokens_per_second,
            churn,
        }
    }
}
