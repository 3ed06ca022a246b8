//! A batch laid out for the device: one list of numbers that a single copy brings over. Pure.

use crate::{Batch, KvLayout, Segment};

/// One step's inputs, and where each list begins in `numbers`.
///
/// Every list of rows has `rows` entries, so that a captured graph finds them at the same place in every step of
/// its size. Rows beyond the batch's tokens are padding: token 0, no slot, no attention.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Plan {
    pub(super) numbers: Vec<i32>,
    /// Rows that are computed, padding included.
    pub(super) rows: usize,
    /// Single tokens, attended by the decode kernel.
    pub(super) decodes: usize,
    /// Chunks, attended by the prefill kernel: `(row, count, position, table)` each.
    pub(super) tasks: usize,
    /// Rows whose logits are wanted, in the segments' order.
    pub(super) wanted: Vec<i32>,
    /// Index of `wanted` → segment.
    pub(super) wanted_segments: Vec<usize>,
    /// Blocks that chunks attend to, if they are to be widened, each once.
    pub(super) widened: Vec<i32>,
    /// Blocks that the step writes, each once.
    pub(super) written: Vec<i32>,
}

/// Where a list begins, in entries.
#[derive(Debug, Clone, Copy)]
pub(super) enum List {
    Tokens,
    Positions,
    Slots,
    /// Where a row's block table begins in the tables.
    TableOfRow,
    /// Rows of single tokens; −1 in padding.
    DecodeRows,
    Wanted,
    Tasks,
    Tables,
    Widened,
    Written,
}

/// Rows of chunks that one block of the prefill kernel takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiling {
    pub(super) queries: usize,
    /// Chunks of one token go to the decode kernel.
    pub(super) singles_apart: bool,
    /// Chunks attend to KV that is made bf16 first.
    pub(super) widens: bool,
}

impl Plan {
    /// Lays out a validated batch in at least `rows` rows. `all_logits` wants every segment's last row.
    pub(super) fn new(
        batch: &Batch<'_>,
        layout: &KvLayout,
        tiling: Tiling,
        rows: usize,
        all_logits: bool,
    ) -> Self {
        let rows = rows.max(batch.tokens());
        let mut plan = Self { rows, ..Self::default() };
        let mut lists: [Vec<i32>; 6] = Default::default();
        let (mut tasks, mut tables): (Vec<[i32; 4]>, Vec<i32>) = (Vec::new(), Vec::new());
        for (index, segment) in batch.segments.iter().enumerate() {
            let first = lists[0].len();
            let table = tables.len() as i32;
            push_rows(&mut lists, segment, layout, table);
            let used = layout.blocks_for(segment.position + segment.tokens.len());
            let blocks = segment.blocks[..used].iter().map(|&block| block as i32);
            plan.written.extend(blocks.clone().skip(segment.position / layout.block_tokens));
            let count = segment.tokens.len();
            if tiling.widens && count > 1 {
                plan.widened.extend(blocks.clone());
            }
            tables.extend(blocks);
            if count == 1 && tiling.singles_apart {
                lists[List::DecodeRows as usize].push(first as i32);
                plan.decodes += 1;
            } else {
                for start in (0..count).step_by(tiling.queries) {
                    let take = tiling.queries.min(count - start);
                    let (row, position) = ((first + start) as i32, (segment.position + start) as i32);
                    tasks.push([row, take as i32, position, table]);
                }
            }
            if all_logits || !segment.samples.is_empty() {
                plan.wanted.push((first + count - 1) as i32);
                plan.wanted_segments.push(index);
            }
        }
        plan.tasks = tasks.len();
        // The longest first, so that no multiprocessor is left alone with one at the end.
        tasks.sort_by_key(|task| std::cmp::Reverse(task[2] + task[1]));
        lists[List::Wanted as usize].clone_from(&plan.wanted);
        for (list, padding) in lists.iter_mut().zip([0, 0, -1, 0, -1, 0]) {
            list.resize(rows, padding);
            plan.numbers.append(list);
        }
        plan.numbers.extend(tasks.iter().flatten());
        plan.numbers.append(&mut tables);
        plan.widened.sort_unstable();
        plan.widened.dedup();
        plan.numbers.extend(&plan.widened);
        plan.numbers.extend(&plan.written);
        plan
    }

    /// The shape of a step of `size` single tokens, for capture: the numbers come later.
    pub(super) fn decode_of(size: usize) -> Self {
        let wanted = (0..size as i32).collect();
        Self { rows: size, decodes: size, wanted, ..Self::default() }
    }

    /// Where a list begins in `numbers`.
    pub(super) fn start(&self, list: List) -> usize {
        match list {
            List::Tasks => 6 * self.rows,
            List::Tables => 6 * self.rows + 4 * self.tasks,
            List::Widened => self.numbers.len() - self.written.len() - self.widened.len(),
            List::Written => self.numbers.len() - self.written.len(),
            rows => rows as usize * self.rows,
        }
    }
}

fn push_rows(lists: &mut [Vec<i32>; 6], segment: &Segment<'_>, layout: &KvLayout, table: i32) {
    for (&token, position) in segment.tokens.iter().zip(segment.position..) {
        let block = segment.blocks[position / layout.block_tokens] as usize;
        let slot = block * layout.block_tokens + position % layout.block_tokens;
        lists[List::Tokens as usize].push(token as i32);
        lists[List::Positions as usize].push(position as i32);
        lists[List::Slots as usize].push(slot as i32);
        lists[List::TableOfRow as usize].push(table);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KvDtype, SampleRequest, SamplingParams};

    const LAYOUT: KvLayout =
        KvLayout { layers: 1, blocks: 64, kv_heads: 1, block_tokens: 4, head_dim: 8, dtype: KvDtype::Bf16 };
    const TILING: Tiling = Tiling { queries: 4, singles_apart: true, widens: true };

    fn list(plan: &Plan, which: List, count: usize) -> Vec<i32> {
        plan.numbers[plan.start(which)..][..count].to_vec()
    }

    /// A chunk of six tokens from position 2, and a single one at position 5.
    #[test]
    fn chunks_and_single_tokens_lie_where_the_kernels_look() {
        let params = SamplingParams::default();
        let draw = [SampleRequest {
            params: &params,
            prompt: &[],
            output: &[],
            banned: &[],
            constraint: None,
            choice: 0,
        }];
        let chunk = Segment { tokens: &[1, 2, 3, 4, 5, 6], position: 2, blocks: &[9, 7, 0], samples: &[] };
        let single = Segment { tokens: &[8], position: 5, blocks: &[20, 21], samples: &draw };
        let plan = Plan::new(&Batch { segments: vec![chunk, single] }, &LAYOUT, TILING, 0, false);
        assert_eq!((plan.rows, plan.tasks, plan.decodes), (7, 2, 1));
        assert_eq!(list(&plan, List::Tokens, 7), [1, 2, 3, 4, 5, 6, 8]);
        assert_eq!(list(&plan, List::Positions, 7), [2, 3, 4, 5, 6, 7, 5]);
        assert_eq!(list(&plan, List::Slots, 7), [38, 39, 28, 29, 30, 31, 85]);
        assert_eq!(list(&plan, List::TableOfRow, 7), [0, 0, 0, 0, 0, 0, 2]);
        assert_eq!(list(&plan, List::DecodeRows, 1), [6]);
        // The task with the most keys first.
        assert_eq!(list(&plan, List::Tasks, 8), [4, 2, 6, 0, 0, 4, 2, 0]);
        assert_eq!(list(&plan, List::Tables, 4), [9, 7, 20, 21]);
        assert_eq!(list(&plan, List::Widened, 2), [7, 9]);
        assert_eq!(list(&plan, List::Written, 3), [9, 7, 21]);
        assert_eq!((plan.wanted, plan.wanted_segments), (vec![6], vec![1]));
    }

    /// A graph for four rows runs three sequences: the fourth writes nothing and attends to nothing.
    #[test]
    fn padding_does_nothing() {
        let single =
            |block: &'static [u32]| Segment { tokens: &[5], position: 0, blocks: block, samples: &[] };
        let segments = vec![single(&[1]), single(&[2]), single(&[3])];
        let plan = Plan::new(&Batch { segments }, &LAYOUT, TILING, 4, true);
        let captured = Plan::decode_of(4);
        assert_eq!(plan.rows, captured.rows);
        assert_eq!(plan.start(List::Tables), captured.start(List::Tables));
        assert_eq!(list(&plan, List::Slots, 4), [4, 8, 12, -1]);
        assert_eq!(list(&plan, List::DecodeRows, 4), [0, 1, 2, -1]);
        assert_eq!(list(&plan, List::Wanted, 4), [0, 1, 2, 0]);
    }
}
