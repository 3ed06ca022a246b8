//! Who is next, among clients: deficit round robin (Shreedhar and Varghese 1995). Pure.
//!
//! Every client key has a queue of its own. The keys take turns; a turn is worth a quantum of tokens, saved up until
//! the first in the queue can be paid for. So a client that sends a thousand requests delays one that sends one by a
//! turn, and not by a thousand, and long requests do not count like short ones.

use std::collections::{HashMap, VecDeque};

/// Tokens that one turn is worth.
const QUANTUM: usize = 1024;
/// No request costs more turns than this.
const MAX_COST: usize = 64 * QUANTUM;

/// Queues by client key.
#[derive(Debug)]
pub struct FairQueue<T> {
    flows: HashMap<u64, Flow<T>>,
    /// Keys in turn; the first one's turn is now.
    turns: VecDeque<u64>,
    len: usize,
}

#[derive(Debug)]
struct Flow<T> {
    waiting: VecDeque<(usize, T)>,
    saved: usize,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self { flows: HashMap::new(), turns: VecDeque::new(), len: 0 }
    }
}

impl<T> FairQueue<T> {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many of this key wait.
    pub fn len_of(&self, key: u64) -> usize {
        self.flows.get(&key).map_or(0, |flow| flow.waiting.len())
    }

    /// The last in its key's queue.
    pub fn push(&mut self, key: u64, cost: usize, item: T) {
        let flow = self.flows.entry(key).or_insert_with(|| {
            self.turns.push_back(key);
            Flow { waiting: VecDeque::new(), saved: 0 }
        });
        flow.waiting.push_back((cost.min(MAX_COST), item));
        self.len += 1;
    }

    /// The next in turn.
    pub fn pop(&mut self) -> Option<T> {
        loop {
            let key = *self.turns.front()?;
            let flow = self.flows.get_mut(&key)?;
            match flow.waiting.front() {
                Some((cost, _)) if *cost > flow.saved => {
                    flow.saved += QUANTUM;
                    self.turns.rotate_left(1);
                }
                _ => {
                    let next = flow.waiting.pop_front();
                    flow.saved -= next.as_ref().map_or(0, |(cost, _)| *cost);
                    self.len -= usize::from(next.is_some());
                    self.forget_if_empty(key);
                    return next.map(|(_, item)| item);
                }
            }
        }
    }

    /// Takes one out of its key's queue.
    pub fn remove(&mut self, key: u64, mut is_it: impl FnMut(&T) -> bool) -> Option<T> {
        let flow = self.flows.get_mut(&key)?;
        let at = flow.waiting.iter().position(|(_, item)| is_it(item))?;
        let (_, item) = flow.waiting.remove(at)?;
        self.len -= 1;
        self.forget_if_empty(key);
        Some(item)
    }

    /// The newest of the longest queue: who gives way when there is no room for a shorter one's.
    pub fn pop_longest(&mut self) -> Option<T> {
        let key = *self.flows.iter().max_by_key(|(key, flow)| (flow.waiting.len(), **key))?.0;
        let (_, item) = self.flows.get_mut(&key)?.waiting.pop_back()?;
        self.len -= 1;
        self.forget_if_empty(key);
        Some(item)
    }

    /// How long the longest queue is.
    pub fn longest(&self) -> usize {
        self.flows.values().map(|flow| flow.waiting.len()).max().unwrap_or(0)
    }

    fn forget_if_empty(&mut self, key: u64) {
        if self.len_of(key) == 0 {
            self.flows.remove(&key);
            self.turns.retain(|other| *other != key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_flood_delays_others_by_a_turn() {
        let mut queue = FairQueue::default();
        (0..1000).for_each(|i| queue.push(1, QUANTUM, (1, i)));
        queue.push(2, QUANTUM, (2, 0));
        let first: Vec<_> = (0..3).filter_map(|_| queue.pop()).collect();
        assert!(first.contains(&(2, 0)), "{first:?}");
        assert_eq!(queue.len(), 998);
    }

    #[test]
    fn long_requests_cost_more_turns() {
        let mut queue = FairQueue::default();
        (0..10).for_each(|_| queue.push(1, 4 * QUANTUM, 1));
        (0..40).for_each(|_| queue.push(2, QUANTUM, 2));
        let first: Vec<u8> = (0..25).filter_map(|_| queue.pop()).collect();
        let of_one = first.iter().filter(|key| **key == 1).count();
        assert!((4..=6).contains(&of_one), "{first:?}");
    }

    proptest! {
        /// Nothing is lost, order within a key holds, and while two keys wait neither gets ahead by more than a
        /// turn's worth and one request.
        #[test]
        fn fair_and_complete(raw in proptest::collection::vec((0u64..4, 1usize..3000), 0..80)) {
            let mut queue = FairQueue::default();
            for (number, &(key, cost)) in raw.iter().enumerate() {
                queue.push(key, cost, (key, cost, number));
            }
            let mut paid: HashMap<u64, usize> = HashMap::new();
            let mut last: HashMap<u64, usize> = HashMap::new();
            let mut count = 0;
            while let Some((key, cost, number)) = queue.pop() {
                prop_assert!(last.insert(key, number).is_none_or(|before| before < number));
                *paid.entry(key).or_default() += cost;
                count += 1;
                let waiting: Vec<u64> = (0..4).filter(|k| queue.len_of(*k) > 0).collect();
                for a in &waiting {
                    for b in &waiting {
                        let (a, b) = (paid.get(a).unwrap_or(&0), paid.get(b).unwrap_or(&0));
                        prop_assert!(a.abs_diff(*b) <= 2 * (QUANTUM + 3000), "{paid:?}");
                    }
                }
            }
            prop_assert_eq!(count, raw.len());
            prop_assert!(queue.is_empty() && queue.flows.is_empty() && queue.turns.is_empty());
        }
    }
}
