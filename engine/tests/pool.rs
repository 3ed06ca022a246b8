//! The block pool against a naive model: no block in two hands, nothing lost, least recently used goes first.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use engine::kv::hash::BlockHash;
use engine::kv::pool::{Block, BlockPool, BlockState, OutOfBlocks};
use proptest::prelude::*;

const BLOCKS: u32 = 6;

#[derive(Debug, Clone)]
enum Op {
    Alloc(usize, BlockState),
    Clone(usize),
    Drop(usize),
    DropAllOf(usize),
    Publish(usize, u8),
    Lookup(Vec<u8>),
    SetState(usize, BlockState),
    Clear,
}

fn state() -> impl Strategy<Value = BlockState> {
    prop_oneof![Just(BlockState::Running), Just(BlockState::Reserved), Just(BlockState::Quarantined)]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0usize..4, state()).prop_map(|(n, s)| Op::Alloc(n, s)),
        2 => any::<usize>().prop_map(Op::Clone),
        6 => any::<usize>().prop_map(Op::Drop),
        1 => any::<usize>().prop_map(Op::DropAllOf),
        4 => (any::<usize>(), 0u8..10).prop_map(|(i, h)| Op::Publish(i, h)),
        3 => proptest::collection::vec(0u8..10, 0..4).prop_map(Op::Lookup),
        1 => (any::<usize>(), state()).prop_map(|(i, s)| Op::SetState(i, s)),
        1 => Just(Op::Clear),
    ]
}

fn hash(name: u8) -> BlockHash {
    BlockHash::root(&[name])
}

/// What the pool should know, kept in the plainest way.
#[derive(Default)]
struct Model {
    owners: BTreeMap<u32, usize>,
    states: BTreeMap<u32, BlockState>,
    published: BTreeMap<u8, u32>,
    /// Cached blocks with the tick at which they were released.
    cached: BTreeMap<u32, usize>,
    /// Allocs and lookups so far: blocks released between two of them are equally old.
    ticks: usize,
}

impl Model {
    fn add(&mut self, id: u32, state: BlockState) {
        self.cached.remove(&id);
        if *self.owners.entry(id).and_modify(|n| *n += 1).or_insert(1) == 1 {
            self.states.insert(id, state);
        }
    }

    fn remove(&mut self, id: u32) {
        let owners = self.owners.get_mut(&id).expect("owned");
        *owners -= 1;
        if *owners == 0 {
            self.owners.remove(&id);
            self.states.remove(&id);
            if self.published.values().any(|&b| b == id) {
                self.cached.insert(id, self.ticks);
            }
        }
    }

    fn count(&self, state: BlockState) -> usize {
        self.states.values().filter(|&&s| s == state).count()
    }
}

fn run(ops: Vec<Op>) -> Result<(), TestCaseError> {
    let pool = BlockPool::new(BLOCKS);
    let mut hands: Vec<Block> = Vec::new();
    let mut model = Model::default();
    for op in ops {
        match op {
            Op::Alloc(n, state) => alloc(&pool, &mut hands, &mut model, n, state)?,
            Op::Clone(i) if !hands.is_empty() => {
                let block = hands[i % hands.len()].clone();
                model.add(block.id(), BlockState::Running);
                hands.push(block);
            }
            Op::Drop(i) if !hands.is_empty() => {
                let block = hands.swap_remove(i % hands.len());
                model.remove(block.id());
            }
            Op::DropAllOf(i) if !hands.is_empty() => {
                let id = hands[i % hands.len()].id();
                hands.retain(|b| b.id() != id);
                while model.owners.contains_key(&id) {
                    model.remove(id);
                }
            }
            Op::Publish(i, name) if !hands.is_empty() => {
                let block = &hands[i % hands.len()];
                pool.publish(block, hash(name));
                if !model.published.contains_key(&name) && !model.published.values().any(|&b| b == block.id())
                {
                    model.published.insert(name, block.id());
                }
            }
            Op::Lookup(names) => {
                let want: Vec<u32> = names.iter().map_while(|n| model.published.get(n).copied()).collect();
                let hashes: Vec<BlockHash> = names.iter().map(|&n| hash(n)).collect();
                prop_assert_eq!(pool.peek(&hashes), want.len());
                model.ticks += 1;
                let found = pool.lookup(&hashes);
                prop_assert_eq!(found.iter().map(Block::id).collect::<Vec<_>>(), want.clone());
                want.iter().for_each(|&id| model.add(id, BlockState::Running));
                hands.extend(found);
            }
            Op::SetState(i, state) if !hands.is_empty() => {
                let block = &hands[i % hands.len()];
                block.set_state(state);
                model.states.insert(block.id(), state);
            }
            Op::Clear => {
                pool.clear_cache();
                model.published.clear();
                model.cached.clear();
            }
            _ => {}
        }
        agree(&pool, &hands, &model)?;
    }
    drop(hands);
    pool.clear_cache();
    prop_assert_eq!(pool.counts().free, BLOCKS as usize);
    prop_assert_eq!(pool.check(), Ok(()));
    Ok(())
}

fn alloc(
    pool: &Arc<BlockPool>,
    hands: &mut Vec<Block>,
    model: &mut Model,
    n: usize,
    state: BlockState,
) -> Result<(), TestCaseError> {
    let available = BLOCKS as usize - model.owners.len();
    match pool.alloc(n, state) {
        Err(refused) => {
            prop_assert!(n > available);
            prop_assert_eq!(refused, OutOfBlocks { wanted: n, available });
        }
        Ok(blocks) => {
            prop_assert_eq!(blocks.len(), n);
            let taken: BTreeSet<u32> = blocks.iter().map(Block::id).collect();
            prop_assert_eq!(taken.len(), n, "a block twice");
            prop_assert!(taken.iter().all(|id| !model.owners.contains_key(id)), "a live block handed out");
            let evicted: Vec<u32> =
                taken.iter().copied().filter(|id| model.cached.contains_key(id)).collect();
            if !evicted.is_empty() {
                let free = available - model.cached.len();
                prop_assert_eq!(n - evicted.len(), free, "evicted while free blocks were left");
                let newest = evicted.iter().map(|id| model.cached[id]).max();
                let kept =
                    model.cached.iter().filter(|(id, _)| !taken.contains(id)).map(|(_, &age)| age).min();
                prop_assert!(kept.is_none() || newest <= kept, "evicted a younger block than one it kept");
            }
            for id in taken {
                model.published.retain(|_, &mut b| b != id);
                model.add(id, state);
            }
            model.ticks += 1;
            hands.extend(blocks);
        }
    }
    Ok(())
}

fn agree(pool: &Arc<BlockPool>, hands: &[Block], model: &Model) -> Result<(), TestCaseError> {
    prop_assert_eq!(pool.check(), Ok(()));
    let counts = pool.counts();
    prop_assert!(counts.balanced());
    prop_assert_eq!(counts.running, model.count(BlockState::Running));
    prop_assert_eq!(counts.reserved, model.count(BlockState::Reserved));
    prop_assert_eq!(counts.quarantined, model.count(BlockState::Quarantined));
    prop_assert_eq!(counts.cached, model.cached.len());
    prop_assert_eq!(counts.free + counts.cached, BLOCKS as usize - model.owners.len());
    for block in hands {
        prop_assert_eq!(block.owners() as usize, model.owners[&block.id()]);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn behaves_like_the_model(ops in proptest::collection::vec(op(), 1..120)) {
        run(ops)?;
    }
}

#[test]
fn a_dropped_chain_is_evicted_from_its_end() {
    let pool = BlockPool::new(4);
    let blocks = pool.alloc(4, BlockState::Running).unwrap();
    let ids: Vec<u32> = blocks.iter().map(Block::id).collect();
    let hashes: Vec<BlockHash> = (0..4).map(hash).collect();
    blocks.iter().zip(&hashes).for_each(|(block, &h)| pool.publish(block, h));
    drop(blocks); // front to back, all in one tick
    assert_eq!(pool.counts().cached, 4);
    let one = pool.alloc(1, BlockState::Reserved).unwrap();
    assert_eq!(one[0].id(), ids[3]);
    assert_eq!(pool.peek(&hashes), 3);
    // A hit refreshes: the prefix outlives a chain that was released later but never asked for again.
    drop(pool.lookup(&hashes[..2]));
    let two = pool.alloc(1, BlockState::Reserved).unwrap();
    assert_eq!(two[0].id(), ids[2]);
    assert_eq!(pool.peek(&hashes), 2);
}

#[test]
fn handles_may_be_dropped_on_any_thread() {
    let pool = BlockPool::new(64);
    std::thread::scope(|scope| {
        for worker in 0..4u8 {
            let pool = Arc::clone(&pool);
            scope.spawn(move || {
                for round in 0..200u32 {
                    if let Ok(blocks) = pool.alloc(1 + (round % 20) as usize, BlockState::Running) {
                        pool.publish(&blocks[0], BlockHash::root(&[worker, (round % 7) as u8]));
                        let shared = blocks.clone();
                        drop(blocks);
                        drop(shared);
                    }
                }
            });
        }
    });
    assert_eq!(pool.check(), Ok(()));
    let counts = pool.counts();
    assert_eq!(counts.free + counts.cached, 64);
}
