//! Causal attention over paged KV: tiles of 64 keys from position 0, online softmax, grouped queries.
//!
//! A task is one key/value head and up to some tens of queries of one segment; the group's heads share each
//! tile. Every query walks the same tiles in the same order with the same arithmetic, alone (decode) or among
//! others (prefill): a tile that a query cannot see leaves its sums as they are.
//!
//! A tile of bf16 KV is 256 bytes per element of a head (16 KiB at 64). For each of the task's rows it takes 128 multiply-adds per
//! element (8 instructions of 16 lanes), and 64 exponentials of some 25 instructions per vector; for all of them together, K is
//! transposed: 12 shuffles per element. So a prompt's rows are bound by multiply-adds, and one sequence's decode by memory up to about
//! four heads in the group, by multiply-adds above. Memory comes late to a tile that computes on nothing else: V is fetched while K is
//! multiplied, the next tile's K while V is.

use std::cell::RefCell;

use super::Kernels;
use super::attention_work::{Sizes, Work};
use super::lanes::{LANES, Lanes};
use crate::KvLayout;

/// Keys per tile. Part of the arithmetic: changing it changes roundings.
pub(super) const TILE: usize = 64;
/// Rows (queries × heads of the group) of a task, about.
const TASK_ROWS: usize = 96;

/// What all tasks of a layer share.
pub(crate) struct AttentionLayer<'a> {
    pub(crate) layout: &'a KvLayout,
    /// The layer's blocks: `[blocks, 2, kv_heads, block_tokens, head_dim]`.
    pub(crate) kv: *const u8,
    /// Query heads per key/value head.
    pub(crate) group: usize,
    /// Positions seen, the token's own included.
    pub(crate) window: Option<usize>,
    /// `[tokens, .., heads, head_dim]`, scaled, rows `ldq` apart.
    pub(crate) q: *const f32,
    pub(crate) ldq: usize,
    /// `[tokens, heads · head_dim]`, rows `ldo` apart.
    pub(crate) out: *mut f32,
    pub(crate) ldo: usize,
}

// SAFETY: tasks read KV and q, and write disjoint parts of `out`.
unsafe impl Sync for AttentionLayer<'_> {}

/// Some queries of one segment and one key/value head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionTask<'a> {
    /// First query's row in `q` and `out`.
    pub(crate) row: usize,
    /// Queries, at consecutive rows and positions.
    pub(crate) count: usize,
    /// Position of the first.
    pub(crate) position: usize,
    pub(crate) kv_head: usize,
    /// The sequence's block table.
    pub(crate) blocks: &'a [u32],
}

/// Queries per task for a group size.
pub(crate) fn queries_per_task(group: usize) -> usize {
    (TASK_ROWS / group).max(1)
}

/// One cache line; keeps every buffer of the scratch aligned.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

thread_local! {
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// # Safety
/// Pointers valid as the fields say; every block of the table up to the last query holds KV; nobody writes
/// those or the task's part of `out` now; the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn run<L: Lanes>(kernels: &Kernels, layer: &AttentionLayer<'_>, task: &AttentionTask<'_>) {
    // Taken out and put back: a closure would be compiled without the instructions of `L`.
    let mut scratch = SCRATCH.take();
    let sizes = Sizes::of(layer, task);
    let lines = sizes.total().div_ceil(LANES);
    if scratch.len() < lines {
        scratch.resize(lines, Line([0.0; LANES]));
    }
    // SAFETY: the caller's.
    unsafe { Work::<L>::new(kernels, layer, task, sizes, bytemuck::cast_slice_mut(&mut scratch)).run() };
    SCRATCH.set(scratch);
}
