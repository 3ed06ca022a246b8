//! The whole world of one hand-off as a value: router, decode worker with one KV block, prefill worker, network.

use std::collections::{BTreeMap, BTreeSet};

use kv_transport::fence::Fence;
use kv_transport::landing_state::LandingState;
use kv_transport::push_state::PushState;

/// What a memory cell holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Content {
    /// KV of this attempt. Attempts stand for different prompts: KV of another one is somebody else's.
    Of(u32),
    /// Flipped on the way.
    Garbage,
}

/// A message on its way. The set of them may be delivered in any order, twice, or never: one that is lost is one that stays in the set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Message {
    /// Router to prefill worker.
    Prefill(Fence),
    /// Prefill worker, in this life, to decode worker.
    Attach(Fence, u8),
    Write {
        fence: Fence,
        life: u8,
        seq: u32,
        cell: usize,
        content: Content,
    },
    Commit(Fence, u8),
    Abort(Fence, u8),
    /// Decode worker to prefill worker.
    Attached(Fence, u8),
    Acked {
        fence: Fence,
        life: u8,
        seq: u32,
        bad: bool,
    },
    Committed(Fence, u8),
    Refused {
        fence: Fence,
        life: u8,
        of_commit: bool,
    },
}

/// How the request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    Done,
    Failed,
    Cancelled,
}

/// A reservation in the receiver's table.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reservation {
    pub state: LandingState,
    /// Life of the prefill worker that attached.
    pub sender: Option<u8>,
}

/// A write into the decode worker's memory that began; it can no longer be called back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Write {
    /// The landing that let it begin.
    pub landing: Fence,
    /// The ticket it came with: the checksum is that of this attempt.
    pub ticket: Fence,
    pub life: u8,
    pub seq: u32,
    pub cell: usize,
    pub content: Content,
}

/// A frame whose bytes are being read from the prefill worker's block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Read {
    pub fence: Fence,
    pub seq: u32,
    pub cell: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    // Router.
    pub attempts: u32,
    /// The attempt that runs.
    pub current: Option<Fence>,
    pub outcome: Option<Outcome>,
    pub ends: u8,
    /// A token was made from anything but the verified KV of its own attempt.
    pub wrong_token: bool,
    // Decode worker.
    pub incarnation: u64,
    pub generation: u64,
    pub landings: BTreeMap<Fence, Reservation>,
    pub ended: BTreeMap<Fence, bool>,
    pub writes: Vec<Write>,
    pub memory: Vec<Option<Content>>,
    pub free: bool,
    pub running: Option<Fence>,
    // Prefill worker.
    pub life: u8,
    pub pushes: BTreeMap<Fence, PushState>,
    pub seen: BTreeSet<Fence>,
    pub computed: usize,
    pub source: Option<Content>,
    pub reads: Vec<Read>,
    // Network, and what may still go wrong.
    pub network: BTreeSet<Message>,
    pub faults: u8,
}

impl World {
    pub fn new(cells: usize, faults: u8) -> Self {
        Self {
            attempts: 0,
            current: None,
            outcome: None,
            ends: 0,
            wrong_token: false,
            incarnation: 0,
            generation: 0,
            landings: BTreeMap::new(),
            ended: BTreeMap::new(),
            writes: Vec::new(),
            memory: vec![None; cells],
            free: true,
            running: None,
            life: 0,
            pushes: BTreeMap::new(),
            seen: BTreeSet::new(),
            computed: 0,
            source: None,
            reads: Vec::new(),
            network: BTreeSet::new(),
            faults,
        }
    }

    /// The decode worker's block is in exactly one hand, and only that hand's writes are in flight.
    pub fn one_hand(&self) -> bool {
        let hands = self.landings.len() + usize::from(self.running.is_some()) + usize::from(self.free);
        hands == 1 && self.writes.iter().all(|write| self.landings.contains_key(&write.landing))
    }

    /// The prefill worker's block is in one hand, and only its owner reads it.
    pub fn one_source(&self) -> bool {
        self.pushes.len() <= 1 && self.reads.iter().all(|read| self.pushes.contains_key(&read.fence))
    }

    /// Everything is over and everything is back, whatever messages may still come.
    pub fn at_rest(&self) -> bool {
        self.outcome.is_some()
            && self.current.is_none()
            && self.free
            && self.landings.is_empty()
            && self.writes.is_empty()
            && self.running.is_none()
            && self.pushes.is_empty()
            && self.reads.is_empty()
    }
}
