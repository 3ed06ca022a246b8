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
    Written,
}

/// Rows of chunks that one block of the prefill kernel takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiling {
    pub(super) queries: usize,
    /// Chunks of one token go to the decode kernel.
    pub(super) singles_apart: bool,
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
            tables.extend(blocks);
            let count = segment.tokens.len();
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
