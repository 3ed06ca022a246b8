//! Which worker holds which prompt prefix, as far as the router has seen. A wrong guess costs time, never correctness: the
//! worker itself decides.
//!
//! A tree of runs: a node is a piece of a chain that all its holders hold whole, so a long prompt is a few nodes and one pass
//! over it finds every holder. A block's hash names all that is before it, so the first hash of a run finds its node, and nodes need
//! neither children nor parents. Whoever touches a node touches what is before it afterwards: the least recently touched
//! node never has another one behind it, and goes first when the bytes are used up.
//!
//! A holder is believed until its pool must have let the blocks go: a worker's stamp counts the blocks that it took, and what it took
//! a whole pool ago is gone. For the same reason a worker that leaves takes everything along by one number.

mod seats;

use std::collections::HashMap;
use std::mem::size_of;

use engine::kv::hash::BlockHash;

pub use seats::Slot;
use seats::{Holder, Seats};

/// What an index may use unless told otherwise.
pub const DEFAULT_BYTES: usize = 128 << 20;
/// Holders that one search looks at, at most.
const MAX_VISITS: usize = 1 << 16;
/// Maps by the first byte of a hash: one that grows holds up everybody for a 256th of the time.
const MAPS: usize = 256;
const NONE: u32 = u32::MAX;
/// A node without its run and holders: itself, its entry in a map that may be half empty, and two allocations' own bytes.
const NODE_BYTES: usize = size_of::<Node>() + (size_of::<(BlockHash, u32)>() + 1) * 16 / 7 + 2 * 16;

#[derive(Debug)]
struct Node {
    run: Box<[BlockHash]>,
    /// By slot.
    holders: Vec<Holder>,
    newer: u32,
    older: u32,
}

impl Node {
    fn bytes(&self) -> usize {
        NODE_BYTES + self.run.len() * size_of::<BlockHash>() + self.holders.capacity() * size_of::<Holder>()
    }
}

/// The index. See the module's documentation.
#[derive(Debug)]
pub struct PrefixIndex {
    firsts: Vec<HashMap<BlockHash, u32>>,
    nodes: Vec<Node>,
    free: Vec<u32>,
    newest: u32,
    oldest: u32,
    seats: Seats,
    bytes: usize,
    max_bytes: usize,
    path: Vec<u32>,
}

impl PrefixIndex {
    /// Uses at most so many bytes for prefixes; workers come to a few bytes each.
    pub fn new(max_bytes: usize) -> Self {
        // So that nodes are never copied to grow; what is not used costs addresses, not memory.
        let most = (max_bytes / (NODE_BYTES + size_of::<BlockHash>())).min(NONE as usize - 1);
        Self {
            firsts: vec![HashMap::new(); MAPS],
            nodes: Vec::with_capacity(most),
            free: Vec::new(),
            newest: NONE,
            oldest: NONE,
            seats: Seats::default(),
            bytes: 0,
            max_bytes,
            path: Vec::new(),
        }
    }

    /// A worker with a pool of so many blocks, all empty.
    pub fn join(&mut self, pool_blocks: usize) -> Slot {
        self.seats.join(pool_blocks)
    }

    /// The worker is gone, and its blocks with it.
    pub fn leave(&mut self, slot: Slot) {
        self.seats.leave(slot);
    }

    /// The worker now holds these blocks.
    pub fn insert(&mut self, slot: Slot, chain: &[BlockHash]) {
        if !self.seats.is_taken(slot) {
            return;
        }
        // The beginning of a prompt is what others can share.
        let most = self.max_bytes / 2 / size_of::<BlockHash>();
        let chain = &chain[..chain.len().min(most)];
        let mut path = std::mem::take(&mut self.path);
        path.clear();
        let (mut at, mut known) = (0, 0);
        while at < chain.len() {
            let node = self.node_at(&chain[at..]);
            let run = self.nodes[node as usize].run.len();
            known += if self.is_held(node, slot) { run } else { 0 };
            at += run;
            path.push(node);
        }
        let stamp = self.seats.took(slot, chain.len() - known);
        for &node in path.iter().rev() {
            self.hold(node, Holder { slot, stamp });
            self.unlink(node);
            self.link(node);
        }
        self.path = path;
        while self.bytes > self.max_bytes && self.oldest != NONE {
            self.evict();
        }
    }

    /// Who holds how many blocks of the chain's beginning; those that hold most come first.
    pub fn holders(&self, chain: &[BlockHash]) -> Vec<(Slot, usize)> {
        let (mut path, mut at) = (Vec::new(), 0);
        while at < chain.len() {
            let Some(node) = self.find(&chain[at]) else { break };
            let run = &self.nodes[node as usize].run;
            let common = common(run, &chain[at..]);
            at += common;
            path.push((node, at));
            if common < run.len() {
                break;
            }
        }
        let mut seen = vec![false; self.seats.len()];
        let mut found = Vec::new();
        let mut visits = 0;
        for (node, blocks) in path.into_iter().rev() {
            if visits > MAX_VISITS {
                break;
            }
            let holders = &self.nodes[node as usize].holders;
            visits += holders.len();
            for holder in holders.iter().filter(|h| self.seats.holds(h)) {
                if !std::mem::replace(&mut seen[holder.slot.index()], true) {
                    found.push((holder.slot, blocks));
                }
            }
        }
        found
    }

    /// How often the worker's pool is taken anew while the average pool is once; 0 for one that is new.
    pub fn churn(&self, slot: Slot) -> f64 {
        self.seats.churn(slot)
    }

    /// What it uses.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What it may use.
    pub fn max_bytes(&self) -> usize {
        self.max_bytes
    }

    /// Blocks remembered, whoever holds them.
    pub fn blocks(&self) -> usize {
        self.firsts.iter().flat_map(HashMap::values).map(|&n| self.nodes[n as usize].run.len()).sum()
    }

    fn find(&self, first: &BlockHash) -> Option<u32> {
        self.firsts[usize::from(first.as_bytes()[0])].get(first).copied()
    }

    /// The node whose run the rest of a chain begins with; made, or cut to that length, if need be.
    fn node_at(&mut self, rest: &[BlockHash]) -> u32 {
        let Some(node) = self.find(&rest[0]) else { return self.add(rest.into(), Vec::new()) };
        let run = &self.nodes[node as usize].run;
        let common = common(run, rest);
        if common == run.len() {
            return node;
        }
        // The node keeps its end, and what is behind it; a new one is its beginning.
        let (begin, end): (Box<[_]>, Box<[_]>) = (run[..common].into(), run[common..].into());
        let holders = self.nodes[node as usize].holders.clone();
        self.bytes -= common * size_of::<BlockHash>();
        self.firsts[usize::from(end[0].as_bytes()[0])].insert(end[0], node);
        self.nodes[node as usize].run = end;
        self.add(begin, holders)
    }

    fn add(&mut self, run: Box<[BlockHash]>, holders: Vec<Holder>) -> u32 {
        let first = run[0];
        let node = Node { run, holders, newer: NONE, older: NONE };
        self.bytes += node.bytes();
        let id = match self.free.pop() {
            Some(id) => {
                self.nodes[id as usize] = node;
                id
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as u32
            }
        };
        self.firsts[usize::from(first.as_bytes()[0])].insert(first, id);
        self.link(id);
        id
    }

    fn is_held(&self, node: u32, slot: Slot) -> bool {
        let holders = &self.nodes[node as usize].holders;
        let at = holders.binary_search_by_key(&slot, |h| h.slot);
        at.is_ok_and(|at| self.seats.holds(&holders[at]))
    }

    fn hold(&mut self, node: u32, holder: Holder) {
        let Self { nodes, seats, bytes, .. } = self;
        let holders = &mut nodes[node as usize].holders;
        match holders.binary_search_by_key(&holder.slot, |h| h.slot) {
            Ok(at) => holders[at] = holder,
            Err(at) => {
                *bytes -= holders.capacity() * size_of::<Holder>();
                let at = if holders.len() == holders.capacity() {
                    holders.retain(|h| seats.holds(h));
                    holders.partition_point(|h| h.slot < holder.slot)
                } else {
                    at
                };
                holders.insert(at, holder);
                *bytes += holders.capacity() * size_of::<Holder>();
            }
        }
    }

    fn link(&mut self, node: u32) {
        let newest = std::mem::replace(&mut self.newest, node);
        (self.nodes[node as usize].older, self.nodes[node as usize].newer) = (newest, NONE);
        match newest {
            NONE => self.oldest = node,
            newest => self.nodes[newest as usize].newer = node,
        }
    }

    fn unlink(&mut self, node: u32) {
        let Node { newer, older, .. } = self.nodes[node as usize];
        match newer {
            NONE => self.newest = older,
            newer => self.nodes[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.nodes[older as usize].newer = newer,
        }
    }

    fn evict(&mut self) {
        let id = self.oldest;
        self.unlink(id);
        let node = &mut self.nodes[id as usize];
        self.bytes -= node.bytes();
        let run = std::mem::take(&mut node.run);
        node.holders = Vec::new();
        let firsts = &mut self.firsts[usize::from(run[0].as_bytes()[0])];
        if firsts.get(&run[0]) == Some(&id) {
            firsts.remove(&run[0]);
        }
        self.free.push(id);
    }
}

fn common(a: &[BlockHash], b: &[BlockHash]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests;
