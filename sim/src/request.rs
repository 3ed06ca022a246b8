//! A request on its way through the simulated cluster.

use std::rc::Rc;

use decode_worker::outlook::Expected;
use engine::kv::hash::BlockHash;
use engine::kv::pool::Block;

use crate::clock::Ns;

/// What is known of it while it lives.
pub(crate) struct Live {
    pub(crate) prompt: usize,
    pub(crate) output: usize,
    /// Names of the prompt's full blocks.
    pub(crate) chain: Rc<[BlockHash]>,
    pub(crate) arrived: Ns,
    /// When it was placed last.
    pub(crate) placed: Ns,
    /// It waits for room from here on.
    pub(crate) looking_since: Ns,
    /// Pause before the next try.
    pub(crate) pause: Ns,
    pub(crate) is_admitted: bool,
    /// Indices of its workers.
    pub(crate) decode: u32,
    pub(crate) prefill: Option<u32>,
    /// The router counts the prompt towards its prefill worker.
    pub(crate) is_assigned: bool,
    /// The decode worker prefills up to so many uncached tokens itself.
    pub(crate) local_max: usize,
    /// What the router expected to be computed there then.
    pub(crate) local_tokens: usize,
    /// On the decode worker: what was there, and what is reserved.
    pub(crate) cached: Vec<Block>,
    pub(crate) reserved: Vec<Block>,
    /// What the decode worker expects of it until its KV has landed.
    pub(crate) expected: Option<Expected>,
    /// On the prefill worker, while a push may read them.
    pub(crate) source: Vec<Block>,
    pub(crate) prefill_queue: Ns,
    pub(crate) prefill_compute: Ns,
    pub(crate) prefill_cached: usize,
}

/// How it went.
pub(crate) struct Ended {
    pub(crate) arrived: Ns,
    pub(crate) first: Ns,
    pub(crate) last: Ns,
    pub(crate) prompt: usize,
    pub(crate) output: usize,
}
