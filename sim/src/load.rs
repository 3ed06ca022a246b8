//! What is asked when: lengths and the names of what prompts share. Tokens themselves are never made.

use std::sync::Arc;

use engine::kv::hash::BlockHash;
use planner::trace::{BLOCK_TOKENS, Request};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const FIRST_ID: u32 = 100;
/// Tokens of a block that a trace names.
const TRACE_BLOCK: usize = BLOCK_TOKENS as usize;

/// When requests come.
#[derive(Debug, Clone)]
pub enum Arrivals {
    /// Independently (Poisson), requests a second, for so many seconds.
    Poisson {
        /// Requests a second.
        rate: f64,
        /// Seconds.
        seconds: f64,
        /// How long they are.
        lengths: Lengths,
    },
    /// As in a trace.
    Trace {
        /// Its requests.
        requests: Vec<Request>,
        /// 2 is twice as fast.
        speed: f64,
        /// Longer prompts are cut.
        longest: usize,
    },
}

/// How long prompts and answers are. Tokens.
#[derive(Debug, Clone, Copy)]
pub struct Lengths {
    /// Mean of a prompt.
    pub prompt: usize,
    /// Mean of an answer.
    pub output: usize,
    /// Both are drawn evenly from (1 - spread) to (1 + spread) times the mean.
    pub spread: f64,
    /// Tokens at the beginning that all prompts share.
    pub shared: usize,
    /// Ids that a real prompt's tokens would be below, above 100; decides nothing but the order of draws.
    pub vocab: u32,
}

/// One request to come.
#[derive(Debug, Clone)]
pub struct Planned {
    /// When, nanoseconds.
    pub at: u64,
    /// Tokens.
    pub prompt: usize,
    /// Tokens of the answer.
    pub output: usize,
    /// What it shares with others.
    names: Names,
}

#[derive(Debug, Clone)]
enum Names {
    /// The first so many tokens are everybody's.
    Shared(usize),
    /// Names of blocks of 512 tokens, each over all before it.
    Trace(Arc<[u64]>),
}

/// The requests in the order of their times; the same for the same seed.
pub(crate) fn plan(arrivals: &Arrivals, seed: u64) -> Vec<Planned> {
    match arrivals {
        Arrivals::Poisson { rate, seconds, lengths } => {
            let mut random = StdRng::seed_from_u64(seed);
            let (mut at, mut out) = (0.0, Vec::new());
            loop {
                at += -(1.0 - random.random::<f64>()).ln() / rate;
                if at >= *seconds {
                    return out;
                }
                out.push(lengths.draw(at, &mut random));
            }
        }
        Arrivals::Trace { requests, speed, longest } => {
            let planned = |request: &Request| Planned {
                at: crate::clock::ns(request.at / speed),
                prompt: (request.prompt as usize).clamp(1, (*longest).max(1)),
                output: (request.output as usize).max(1),
                names: Names::Trace(request.blocks.iter().copied().collect()),
            };
            requests.iter().map(planned).collect()
        }
    }
}

impl Lengths {
    fn draw(&self, at: f64, random: &mut StdRng) -> Planned {
        let mut length = |mean: usize| {
            let factor = 1.0 + self.spread * (random.random::<f64>() * 2.0 - 1.0);
            ((mean as f64 * factor).round() as usize).max(1)
        };
        let (prompt, output) = (length(self.prompt), length(self.output));
        // The driver of real clusters draws a prompt's ids here: so the same seed means the same requests.
        (self.shared.min(prompt)..prompt).for_each(|_| {
            random.random_range(FIRST_ID..self.vocab);
        });
        Planned { at: crate::clock::ns(at), prompt, output, names: Names::Shared(self.shared.min(prompt)) }
    }
}

/// A name that nothing else has: of a kind, of somebody, of a place.
pub(crate) fn name(kind: u8, of: u64, index: u64) -> BlockHash {
    let mut bytes = [0u8; 16];
    bytes[..8].copy_from_slice(&of.to_le_bytes());
    bytes[8..].copy_from_slice(&(index << 8 | u64::from(kind)).to_le_bytes());
    BlockHash::from_bytes(bytes)
}

impl Planned {
    /// Names of the prompt's full blocks, as the real hashes would be equal or not.
    pub(crate) fn chain(&self, number: u32, block_tokens: usize) -> Vec<BlockHash> {
        let own = |index: usize| name(1, u64::from(number), index as u64);
        (0..self.prompt / block_tokens)
            .map(|index| {
                let end = (index + 1) * block_tokens;
                match &self.names {
                    Names::Shared(shared) if end <= *shared => name(2, 0, index as u64),
                    Names::Shared(_) => own(index),
                    Names::Trace(blocks) => match blocks.get((end - 1) / TRACE_BLOCK) {
                        // A block inside a named one has that one's name and its place in the prompt.
                        Some(hash) => name(3, *hash, index as u64),
                        None => own(index),
                    },
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_share_what_traces_share() {
        let of = |blocks: &[u64]| Planned {
            at: 0,
            prompt: 1300,
            output: 1,
            names: Names::Trace(blocks.iter().copied().collect()),
        };
        let (a, b) = (of(&[7, 8, 9]).chain(0, 64), of(&[7, 8, 10]).chain(1, 64));
        assert_eq!(a.len(), 20);
        assert_eq!(a.iter().zip(&b).take_while(|(a, b)| a == b).count(), 16);
        let unnamed = of(&[]);
        assert_ne!(unnamed.chain(0, 64)[0], unnamed.chain(1, 64)[0]);
        assert_eq!(unnamed.chain(5, 64), unnamed.chain(5, 64));
    }

    /// `tandem sim --rate` and `tandem bench serve --rate` with one seed mean the same requests.
    #[test]
    fn the_same_requests_as_the_driver_of_real_clusters() {
        use bench::serve::load::{Arrivals as Real, Shape, plan as real_plan};
        let shape = Shape { prompt: 100, output: 10, spread: 0.5, shared: 32, vocab: 32_000, longest: 1000 };
        let lengths = Lengths { prompt: 100, output: 10, spread: 0.5, shared: 32, vocab: 32_000 };
        let span = std::time::Duration::from_secs(20);
        let real = real_plan(&Real::Poisson { rate: 5.0, burst: 1 }, &shape, span, usize::MAX, 4);
        let ours = plan(&Arrivals::Poisson { rate: 5.0, seconds: 20.0, lengths }, 4);
        let real: Vec<_> =
            real.iter().map(|p| (p.at.as_micros() as u64, p.prompt.len(), p.output as usize)).collect();
        let ours: Vec<_> = ours.iter().map(|p| (p.at / 1000, p.prompt, p.output)).collect();
        assert!(real.len() > 50);
        assert_eq!(real, ours);
    }

    #[test]
    fn poisson_has_its_rate_and_its_seed() {
        let lengths = Lengths { prompt: 100, output: 10, spread: 0.5, shared: 32, vocab: 32_000 };
        let arrivals = Arrivals::Poisson { rate: 50.0, seconds: 100.0, lengths };
        let plan_of =
            |seed| plan(&arrivals, seed).iter().map(|p| (p.at, p.prompt, p.output)).collect::<Vec<_>>();
        let got = plan_of(1);
        assert!((4_700..5_300).contains(&got.len()), "{}", got.len());
        assert_eq!(got, plan_of(1));
        assert_ne!(got, plan_of(2));
        assert!(got.iter().all(|(_, p, o)| (50..=150).contains(p) && (5..=15).contains(o)));
    }
}
