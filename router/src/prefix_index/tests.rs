//! The index against a naive one, and its bounds.

use super::*;
use engine::kv::hash;
use proptest::prelude::*;

fn chain(seed: u32, blocks: usize) -> Vec<BlockHash> {
    let tokens: Vec<u32> = (0..blocks as u32 * 4).map(|t| t + seed * 1000).collect();
    hash::chain(BlockHash::root(b"test"), &tokens, 4)
}

fn hits(index: &PrefixIndex, slot: Slot, chain: &[BlockHash]) -> usize {
    index.holders(chain).into_iter().find(|(s, _)| *s == slot).map_or(0, |(_, blocks)| blocks)
}

impl PrefixIndex {
    /// Everything counted again.
    fn check(&self) {
        let mut listed = Vec::new();
        let mut at = self.newest;
        while at != NONE {
            listed.push(at);
            at = self.nodes[at as usize].older;
        }
        let mut mapped: Vec<u32> = self.firsts.iter().flat_map(HashMap::values).copied().collect();
        mapped.sort_unstable();
        let bytes: usize = listed.iter().map(|&n| self.nodes[n as usize].bytes()).sum();
        assert_eq!(bytes, self.bytes);
        assert_eq!(self.nodes.len(), listed.len() + self.free.len());
        listed.sort_unstable();
        assert_eq!(listed, mapped);
        for node in &self.nodes {
            assert!(node.holders.is_sorted_by_key(|h| h.slot));
        }
    }
}

#[test]
fn longest_prefix_per_worker() {
    let mut index = PrefixIndex::new(1 << 20);
    let (a, b) = (index.join(100), index.join(100));
    let c = chain(0, 5);
    index.insert(a, &c[..3]);
    index.insert(b, &c);
    assert_eq!(index.holders(&c), [(b, 5), (a, 3)]);
    index.leave(b);
    assert_eq!((hits(&index, a, &c), hits(&index, b, &c), index.blocks()), (3, 0, 5));
    // Who sits there next has nothing.
    let next = index.join(100);
    assert_eq!((next, hits(&index, next, &c)), (b, 0));
}

#[test]
fn any_number_of_workers_hold_what_all_share() {
    let mut index = PrefixIndex::new(16 << 20);
    let workers: Vec<Slot> = (0..1000).map(|_| index.join(1000)).collect();
    let all = chain(0, 4);
    for (number, worker) in workers.iter().enumerate() {
        let own: Vec<_> = all.iter().copied().chain(chain(number as u32 + 1, 3)).collect();
        index.insert(*worker, &own);
    }
    assert_eq!(index.holders(&all).len(), 1000);
    let own: Vec<_> = all.iter().copied().chain(chain(8, 3)).collect();
    assert_eq!(index.holders(&own)[0], (workers[7], 7));
}

#[test]
fn what_a_pool_must_have_let_go_is_not_promised() {
    let mut index = PrefixIndex::new(1 << 20);
    let worker = index.join(20);
    (0..3).for_each(|seed| index.insert(worker, &chain(seed, 10)));
    // The first may be gone by now, but need not be.
    assert_eq!(hits(&index, worker, &chain(1, 10)), 10);
    // Used again, it outlives what was not.
    index.insert(worker, &chain(1, 10));
    index.insert(worker, &chain(3, 10));
    let held = [0, 1, 2, 3].map(|seed| hits(&index, worker, &chain(seed, 10)));
    assert_eq!(held, [0, 10, 10, 10]);
    index.insert(worker, &chain(4, 10));
    let held = [1, 2, 3, 4].map(|seed| hits(&index, worker, &chain(seed, 10)));
    assert_eq!(held, [0, 0, 10, 10]);
}

#[test]
fn bounded_and_oldest_first() {
    let mut index = PrefixIndex::new(100_000);
    let worker = index.join(1 << 20);
    for seed in 0..1000 {
        index.insert(worker, &chain(seed, 10));
        assert!(index.bytes() <= 100_000);
    }
    index.check();
    let kept: Vec<bool> = (0..1000).map(|seed| hits(&index, worker, &chain(seed, 10)) == 10).collect();
    assert!(kept.is_sorted() && kept[999] && !kept[0], "the newest stay");
    assert!(kept.iter().filter(|k| **k).count() > 100, "most of the room is used");
    // A chain that is larger than everything keeps its beginning.
    index.insert(worker, &chain(2000, 100_000));
    index.check();
    assert!((1000..100_000).contains(&hits(&index, worker, &chain(2000, 100_000))));
}

/// What a pool holds, the slow way: for each worker, when each block was taken.
#[derive(Default)]
struct Naive {
    held: HashMap<usize, HashMap<BlockHash, u64>>,
    taken: HashMap<usize, u64>,
}

impl Naive {
    fn holds(&self, worker: usize, hash: &BlockHash, room: u64) -> bool {
        let held = self.held.get(&worker).and_then(|blocks| blocks.get(hash));
        held.is_some_and(|stamp| self.taken[&worker] - stamp < room)
    }

    fn insert(&mut self, worker: usize, chain: &[BlockHash], room: u64) {
        let new = chain.iter().filter(|hash| !self.holds(worker, hash, room)).count() as u64;
        let taken = self.taken.entry(worker).or_default();
        *taken += new;
        self.held.entry(worker).or_default().extend(chain.iter().map(|hash| (*hash, *taken)));
    }

    fn hits(&self, worker: usize, chain: &[BlockHash], room: u64) -> usize {
        chain.iter().take_while(|hash| self.holds(worker, hash, room)).count()
    }
}

#[derive(Debug, Clone)]
enum Deed {
    Insert(usize, Vec<u32>),
    Renew(usize),
    Ask(Vec<u32>),
}

fn prompt() -> impl Strategy<Value = Vec<u32>> {
    // Few tokens: prompts part at every place.
    proptest::collection::vec(0u32..2, 1..9)
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        4 => (0usize..6, prompt()).prop_map(|(worker, tokens)| Deed::Insert(worker, tokens)),
        1 => (0usize..6).prop_map(Deed::Renew),
        3 => prompt().prop_map(Deed::Ask),
    ]
}

proptest! {
    #[test]
    fn as_a_naive_index_says(deeds in proptest::collection::vec(deed(), 1..120), room in 4u64..40) {
        let mut index = PrefixIndex::new(1 << 20);
        let mut naive = Naive::default();
        let mut slots: Vec<Slot> = (0..6).map(|_| index.join(room as usize)).collect();
        let of = |tokens: &[u32]| hash::chain(BlockHash::root(b"p"), tokens, 1);
        for deed in deeds {
            match deed {
                Deed::Insert(worker, tokens) => {
                    index.insert(slots[worker], &of(&tokens));
                    naive.insert(worker, &of(&tokens), room);
                }
                Deed::Renew(worker) => {
                    index.leave(slots[worker]);
                    slots[worker] = index.join(room as usize);
                    naive.held.remove(&worker);
                }
                Deed::Ask(tokens) => {
                    let chain = of(&tokens);
                    let found = index.holders(&chain);
                    prop_assert!(found.is_sorted_by(|a, b| a.1 >= b.1));
                    for (worker, slot) in slots.iter().enumerate() {
                        let got = found.iter().find(|(s, _)| s == slot).map_or(0, |f| f.1);
                        prop_assert_eq!(got, naive.hits(worker, &chain, room));
                    }
                }
            }
            index.check();
        }
    }

    /// With too little room it forgets, but never says more than there was, and never more than its bytes.
    #[test]
    fn never_more_than_was_there(deeds in proptest::collection::vec(deed(), 1..120), kib in 1usize..4) {
        let mut index = PrefixIndex::new(kib << 10);
        let mut naive = Naive::default();
        let slots: Vec<Slot> = (0..6).map(|_| index.join(1 << 20)).collect();
        for deed in deeds {
            match deed {
                Deed::Insert(worker, tokens) => {
                    let chain = hash::chain(BlockHash::root(b"p"), &tokens, 1);
                    index.insert(slots[worker], &chain);
                    naive.insert(worker, &chain, u64::MAX);
                    prop_assert!(index.bytes() <= kib << 10);
                    index.check();
                }
                Deed::Ask(tokens) => {
                    let chain = hash::chain(BlockHash::root(b"p"), &tokens, 1);
                    for (slot, blocks) in index.holders(&chain) {
                        prop_assert!(blocks <= naive.hits(slot.index(), &chain, u64::MAX));
                    }
                }
                Deed::Renew(_) => {}
            }
        }
    }
}
