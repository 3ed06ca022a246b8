//! What is asked when: a plan made before the first request, the same for the same seed. Pure.

use std::time::Duration;

use planner::trace::{BLOCK_TOKENS, Request};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// When requests come.
#[derive(Debug, Clone, PartialEq)]
pub enum Arrivals {
    /// Open loop: independent arrivals (Poisson), requests a second; `burst` come at once.
    Poisson {
        /// Requests a second on average.
        rate: f64,
        /// Requests of one arrival.
        burst: u32,
    },
    /// Closed loop: so many at a time, each followed by the next.
    Closed {
        /// Requests at a time.
        concurrency: usize,
    },
    /// Open loop, as in a trace.
    Trace {
        /// Its requests.
        requests: Vec<Request>,
        /// 2 is twice as fast.
        speed: f64,
    },
}

/// How long prompts and answers are, where no trace says so. Tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Mean of a prompt.
    pub prompt: usize,
    /// Mean of an answer.
    pub output: usize,
    /// Both are drawn evenly from (1 - spread) to (1 + spread) times the mean.
    pub spread: f64,
    /// Tokens at the beginning that all prompts share.
    pub shared: usize,
    /// Token ids are drawn from 100 up to this.
    pub vocab: u32,
    /// Longest prompt of a trace that is sent; longer ones are cut.
    pub longest: usize,
}

/// One request to come.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// When, from the start; all at 0 in a closed loop.
    pub at: Duration,
    /// Token ids.
    pub prompt: Vec<u32>,
    /// Tokens of the answer.
    pub output: u32,
}

const FIRST_ID: u32 = 100;

/// The requests of `span`, in the order of their times; `most` at most.
pub fn plan(arrivals: &Arrivals, shape: &Shape, span: Duration, most: usize, seed: u64) -> Vec<Planned> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut out = Vec::new();
    match arrivals {
        Arrivals::Closed { .. } => {
            out.extend((0..most).map(|_| shape.draw(Duration::ZERO, &mut random)));
        }
        Arrivals::Poisson { rate, burst } => {
            let mut at = 0.0;
            loop {
                // Inverse of the exponential distribution; 1 - u is never 0.
                at += -(1.0 - random.random::<f64>()).ln() / rate * f64::from(*burst);
                if at >= span.as_secs_f64() || out.len() >= most {
                    break;
                }
                for _ in 0..*burst {
                    out.push(shape.draw(Duration::from_secs_f64(at), &mut random));
                }
            }
        }
        Arrivals::Trace { requests, speed } => {
            let in_time = requests.iter().take_while(|r| r.at / speed < span.as_secs_f64());
            out.extend(in_time.take(most).map(|r| shape.of_trace(r, *speed, &mut random)));
        }
    }
    out.truncate(most);
    out
}

impl Shape {
    fn draw(&self, at: Duration, random: &mut StdRng) -> Planned {
        let mut length = |mean: usize| {
            let factor = 1.0 + self.spread * (random.random::<f64>() * 2.0 - 1.0);
            ((mean as f64 * factor).round() as usize).max(1)
        };
        let (prompt, output) = (length(self.prompt), length(self.output));
        let mut ids = self.block(0, self.shared.min(prompt));
        ids.extend((ids.len()..prompt).map(|_| random.random_range(FIRST_ID..self.vocab)));
        Planned { at, prompt: ids, output: u32::try_from(output).unwrap_or(u32::MAX) }
    }

    /// A block's hash stands for its tokens, so prompts share what they share in the trace.
    fn of_trace(&self, request: &Request, speed: f64, random: &mut StdRng) -> Planned {
        let length = (request.prompt as usize).clamp(1, self.longest.max(1));
        let mut ids = Vec::with_capacity(length);
        for hash in &request.blocks {
            let room = length - ids.len();
            ids.extend(self.block(hash + 1, room.min(BLOCK_TOKENS as usize)));
        }
        ids.extend((ids.len()..length).map(|_| random.random_range(FIRST_ID..self.vocab)));
        let at = Duration::from_secs_f64(request.at / speed);
        Planned { at, prompt: ids, output: (request.output as u32).max(1) }
    }

    fn block(&self, hash: u64, tokens: usize) -> Vec<u32> {
        let mut random = StdRng::seed_from_u64(hash);
        (0..tokens).map(|_| random.random_range(FIRST_ID..self.vocab)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape =
        Shape { prompt: 100, output: 20, spread: 0.5, shared: 30, vocab: 30_000, longest: 1000 };
    const LONG: Duration = Duration::from_secs(1000);

    #[test]
    fn poisson_has_its_rate_its_spread_and_its_seed() {
        let arrivals = Arrivals::Poisson { rate: 10.0, burst: 1 };
        let plan_of = |seed| plan(&arrivals, &SHAPE, LONG, usize::MAX, seed);
        let got = plan_of(1);
        assert!((9_700..10_300).contains(&got.len()), "{}", got.len());
        assert_eq!(got[..50], plan_of(1)[..50]);
        assert_ne!(got[..50], plan_of(2)[..50]);
        // Gaps of a Poisson process vary as much as they are long.
        let gaps: Vec<f64> = got.windows(2).map(|w| (w[1].at - w[0].at).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "{mean} {variance}");
        assert!(got.iter().all(|r| (50..=150).contains(&r.prompt.len()) && (10..=30).contains(&r.output)));
        assert!(
            got.iter()
                .all(|r| r.prompt[..30] == got[0].prompt[..30] && r.prompt[30..40] != got[0].prompt[30..40]
                    || r == &got[0])
        );
    }

    #[test]
    fn bursts_keep_the_rate() {
        let got = plan(&Arrivals::Poisson { rate: 10.0, burst: 8 }, &SHAPE, LONG, usize::MAX, 1);
        assert!((9_000..11_000).contains(&got.len()), "{}", got.len());
        assert_eq!(got[0].at, got[7].at);
        assert_ne!(got[7].at, got[8].at);
    }

    #[test]
    fn a_trace_shares_what_its_hashes_share() {
        let request =
            |at, blocks: &[u64]| Request { at, prompt: 700.0, output: 5.0, blocks: blocks.to_vec() };
        let requests = vec![request(0.0, &[1, 2]), request(4.0, &[1, 3]), request(9.0, &[4, 2])];
        let trace = Arrivals::Trace { requests, speed: 2.0 };
        let got = plan(&trace, &SHAPE, LONG, 10, 1);
        assert_eq!(got[1].at, Duration::from_secs(2));
        assert_eq!(got[0].prompt[..512], got[1].prompt[..512]);
        assert_ne!(got[0].prompt[512..], got[1].prompt[512..]);
        assert_eq!(got[0].prompt[512..], got[2].prompt[512..]);
        assert!(got.iter().all(|r| r.prompt.len() == 700));
        assert_eq!(plan(&trace, &SHAPE, Duration::from_secs(3), 10, 1).len(), 2, "the time is over");
    }
}
