//! A batch laid out in rows: which token sits where, and which attention tasks there are. Pure.

use super::simd::attention::{AttentionTask, queries_per_task};
use crate::{Batch, KvLayout};

/// Where one token of the batch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TokenRow {
    pub(super) token: u32,
    pub(super) position: usize,
    /// Its KV's block and place in the block.
    pub(super) block: u32,
    pub(super) slot: usize,
}

/// One step, in rows: the segments' tokens one after another.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) rows: Vec<TokenRow>,
    /// Attention over all rows.
    pub(super) tasks: Vec<AttentionTask<'a>>,
    /// Rows whose logits are wanted, with the segment's index.
    pub(super) wanted: Vec<(usize, usize)>,
    /// Attention over the wanted rows only, renumbered `0..wanted.len()`.
    pub(super) wanted_tasks: Vec<AttentionTask<'a>>,
}

impl<'a> Plan<'a> {
    /// Lays out a validated batch. `all_logits` wants every segment's last row, sampled or not.
    pub(super) fn new(batch: &Batch<'a>, layout: &KvLayout, group: usize, all_logits: bool) -> Self {
        let mut plan =
            Self { rows: Vec::new(), tasks: Vec::new(), wanted: Vec::new(), wanted_tasks: Vec::new() };
        for (index, segment) in batch.segments.iter().enumerate() {
            let first = plan.rows.len();
            plan.rows.extend(segment.tokens.iter().zip(segment.position..).map(|(&token, position)| {
                let block = segment.blocks[position / layout.block_tokens];
                TokenRow { token, position, block, slot: position % layout.block_tokens }
            }));
            let count = segment.tokens.len();
            let task = |row, position, count, kv_head| AttentionTask {
                row,
                count,
                position,
                kv_head,
                blocks: segment.blocks,
            };
            let step = queries_per_task(group);
            for start in (0..count).step_by(step) {
                plan.tasks.extend((0..layout.kv_heads).map(|kv_head| {
                    task(first + start, segment.position + start, step.min(count - start), kv_head)
                }));
            }
            if all_logits || !segment.samples.is_empty() {
                let (row, last) = (plan.wanted.len(), segment.position + count - 1);
                plan.wanted_tasks.extend((0..layout.kv_heads).map(|kv_head| task(row, last, 1, kv_head)));
                plan.wanted.push((first + count - 1, index));
            }
        }
        // The longest first, so that no thread is left alone with one at the end.
        let length = |task: &AttentionTask<'_>| std::cmp::Reverse(task.count * (task.position + task.count));
        plan.tasks.sort_by_key(length);
        plan.wanted_tasks.sort_by_key(length);
        plan
    }
}
