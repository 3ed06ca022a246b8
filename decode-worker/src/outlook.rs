//! What the accepted requests will still need, and whether one more fits: KV blocks by the length that outputs
//! have had so far, and sequences by the ITL limit. Refusing early beats preempting late: the router then asks elsewhere.

use std::sync::Arc;

use engine::pace::{StepModel, StepShape};
use parking_lot::Mutex;

use crate::scheduler::{LocalPrefill, Rules};

/// Output tokens expected before any request has ended.
const FIRST_GUESS: f64 = 128.0;
/// Weight of the newest output in the mean.
const LEARN: f64 = 0.05;

/// Why one more request does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoRoom {
    /// Its blocks, and those that the running sequences will want, are more than there are.
    KvGrowth,
    /// A step with one more sequence would exceed the ITL limit.
    ItlLimit,
}

impl NoRoom {
    /// Every name.
    pub const ALL: [&'static str; 2] = ["kv_growth", "itl_limit"];

    /// In metrics.
    pub fn name(self) -> &'static str {
        match self {
            NoRoom::KvGrowth => "kv_growth",
            NoRoom::ItlLimit => "itl_limit",
        }
    }

    /// For whoever asked.
    pub fn why(self) -> &'static str {
        match self {
            NoRoom::KvGrowth => {
                "out of KV blocks on this decode worker, counting what its sequences are expected to grow"
            }
            NoRoom::ItlLimit => "this decode worker is at its ITL limit (--slo-itl-ms)",
        }
    }
}

/// What is wanted for a request.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Choices.
    pub sequences: usize,
    /// Blocks at once, for what is not cached.
    pub blocks: usize,
    /// Output tokens of each choice, at most.
    pub max_tokens: usize,
}

#[derive(Debug)]
struct State {
    sequences: usize,
    /// Tokens that accepted sequences are expected to grow by.
    growth: usize,
    expected: f64,
    most_sequences: usize,
}

/// Shared by the service, which asks, and the engine's loop, which knows. Clones share.
#[derive(Debug, Clone)]
pub struct Outlook {
    state: Arc<Mutex<State>>,
    block_tokens: usize,
}

impl Outlook {
    /// Nothing runs, nothing is known.
    pub fn new(block_tokens: usize) -> Self {
        let state = State { sequences: 0, growth: 0, expected: FIRST_GUESS, most_sequences: usize::MAX };
        Self { state: Arc::new(Mutex::new(state)), block_tokens }
    }

    /// Counts a request in until the guard goes, if it fits among `available` blocks. An idle worker refuses nothing.
    pub fn admit(&self, wanted: &Wanted, available: usize) -> Result<Expected, NoRoom> {
        let mut state = self.state.lock();
        let growth = wanted.sequences * wanted.max_tokens.min(state.expected.ceil() as usize);
        if state.sequences > 0 {
            if state.sequences + wanted.sequences > state.most_sequences {
                return Err(NoRoom::ItlLimit);
            }
            if wanted.blocks + (state.growth + growth).div_ceil(self.block_tokens) > available {
                return Err(NoRoom::KvGrowth);
            }
        }
        state.sequences += wanted.sequences;
        state.growth += growth;
        Ok(Expected { outlook: self.clone(), sequences: wanted.sequences, left: Mutex::new(growth) })
    }

    /// A step of that shape ran: how many such sequences keep the ITL limit, where there is one to keep.
    pub fn ran(&self, shape: &StepShape, model: &StepModel, rules: &Rules) {
        if rules.prefill == LocalPrefill::Priority && model.is_fitted() && shape.sequences > 0 {
            let each = shape.kv_tokens as f64 / shape.sequences as f64;
            self.set_most_sequences(model.most_sequences(each, rules.itl_limit_ms));
        }
    }

    fn set_most_sequences(&self, most: usize) {
        self.state.lock().most_sequences = most;
    }

    /// An output ended with that many tokens.
    pub fn ended(&self, tokens: usize) {
        let mut state = self.state.lock();
        state.expected += (tokens as f64 - state.expected) * LEARN;
    }

    /// Blocks that the accepted sequences are expected to grow by, and the sequences that the ITL limit allows, if it bounds them.
    pub fn numbers(&self) -> (usize, Option<usize>) {
        let state = self.state.lock();
        let most = (state.most_sequences < usize::MAX).then_some(state.most_sequences);
        (state.growth.div_ceil(self.block_tokens), most)
    }
}

/// An accepted request's share of the outlook; ends when dropped.
#[derive(Debug)]
pub struct Expected {
    outlook: Outlook,
    sequences: usize,
    left: Mutex<usize>,
}

impl Expected {
    /// It has grown by that many tokens.
    pub fn grew(&self, tokens: usize) {
        let mut left = self.left.lock();
        let tokens = tokens.min(*left);
        *left -= tokens;
        self.outlook.state.lock().growth -= tokens;
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut state = self.outlook.state.lock();
        state.sequences -= self.sequences;
        state.growth -= *self.left.lock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted { sequences: 1, blocks: 4, max_tokens: 100 };

    #[test]
    fn what_runs_is_expected_to_grow() {
        let outlook = Outlook::new(16);
        // Nothing runs: it is taken however little room there is.
        let first = outlook.admit(&WANTED, 4).unwrap();
        // 4 blocks now, and 200 tokens of growth are 13.
        assert_eq!(outlook.admit(&WANTED, 16).unwrap_err(), NoRoom::KvGrowth);
        let second = outlook.admit(&WANTED, 17).unwrap();
        first.grew(90);
        assert_eq!(outlook.numbers().0, 7);
        first.grew(90);
        drop(first);
        drop(second);
        assert_eq!(outlook.numbers(), (0, None));
    }

    #[test]
    fn outputs_teach_and_the_limit_bounds() {
        let outlook = Outlook::new(16);
        (0..200).for_each(|_| outlook.ended(16));
        let running = outlook.admit(&WANTED, 100).unwrap();
        assert!(outlook.numbers().0 <= 2, "short outputs are expected to be short");
        outlook.set_most_sequences(2);
        let _second = outlook.admit(&WANTED, 100).unwrap();
        assert_eq!(outlook.admit(&WANTED, 100).unwrap_err(), NoRoom::ItlLimit);
        drop(running);
        assert!(outlook.admit(&WANTED, 100).is_ok());
    }
}
