//! KV heads that are spread over several pools: what each source pool sends to each target pool when the two sides are split otherwise.
//!
//! Within a block of a layer a pool holds `[2 (K, V), heads of its shard, tokens of a block, head_dim]`, so a few neighbouring heads of K, or
//! of V, are consecutive. Both pools are looked at in *units* of so many heads that every unit belongs to one source and one target: a
//! pool's grid with smaller cells, of which a block of a layer is a row. A route then only says which unit goes where, and a push of
//! units needs nothing but the transport as it is: no copy, and a checksum for each unit.

use std::ops::Range;

use crate::Grid;

/// Which of a model's KV heads a pool holds: those of one of several equal shards. With more shards than heads each head is held by
/// several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// KV heads of the model.
    heads: u32,
    /// Shards of its side.
    of: u32,
    /// Which one this is.
    at: u32,
}

impl Shard {
    /// Shard `at` of `of`; nothing when so many do not share so many heads evenly.
    pub fn new(heads: u32, of: u32, at: u32) -> Option<Self> {
        let even = heads > 0 && of > 0 && (heads.is_multiple_of(of) || of.is_multiple_of(heads));
        (even && at < of).then_some(Self { heads, of, at })
    }

    /// Its heads.
    pub fn held(&self) -> Range<u32> {
        let count = self.count();
        let first = self.at / self.copies() * count;
        first..first + count
    }

    /// How many heads it has.
    fn count(&self) -> u32 {
        (self.heads / self.of).max(1)
    }

    /// Shards that hold the same heads.
    fn copies(&self) -> u32 {
        (self.of / self.heads).max(1)
    }
}

/// What a source shard sends to a target shard: planned once for the pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Heads in a unit.
    unit: u32,
    /// Units of K, or of V, in a block of the source and of the target.
    units: [u32; 2],
    /// The first unit that is sent, on both sides.
    first: [u32; 2],
    /// How many are sent.
    count: u32,
}

impl Route {
    /// Nothing when the source has no head for the target, or another shard that holds the same sends it: of several the target's
    /// number picks one, so that all of them send.
    pub fn between(from: Shard, to: Shard) -> Option<Self> {
        let shared = from.held().start.max(to.held().start)..from.held().end.min(to.held().end);
        let is_chosen = from.at % from.copies() == to.at % from.copies();
        if from.heads != to.heads || shared.is_empty() || !is_chosen {
            return None;
        }
        // Both counts divide the heads, and shards begin at their multiples.
        let unit = greatest_common(from.count(), to.count());
        let sides = [from, to];
        Some(Self {
            unit,
            units: sides.map(|side| side.count() / unit),
            first: sides.map(|side| (shared.start - side.held().start) / unit),
            count: (shared.end - shared.start) / unit,
        })
    }

    /// The source pool in units, or nothing when its cells are not whole ones.
    pub fn source_grid(&self, pool: &Grid) -> Option<Grid> {
        fine(pool, 2 * self.units[0])
    }

    /// The target pool in units.
    pub fn target_grid(&self, pool: &Grid) -> Option<Grid> {
        fine(pool, 2 * self.units[1])
    }

    /// The slots of one block on every plane: those of the source block, each with that of the target block it goes to.
    pub fn slots(&self, source_block: u32, target_block: u32) -> impl Iterator<Item = (u32, u32)> {
        let Self { units: [from, to], first: [first_from, first_to], count, .. } = *self;
        (0..2).flat_map(move |side| {
            let source = (source_block * 2 + side) * from + first_from;
            let target = (target_block * 2 + side) * to + first_to;
            (0..count).map(move |unit| (source + unit, target + unit))
        })
    }
}

/// The same memory in cells of a part of the size.
fn fine(pool: &Grid, parts: u32) -> Option<Grid> {
    let whole =
        pool.cell_bytes.is_multiple_of(parts) && pool.plane_stride.is_multiple_of(pool.cell_bytes.into());
    whole.then(|| Grid { cell_bytes: pool.cell_bytes / parts, ..*pool })
}

fn greatest_common(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common(b, a % b) }
}

#[cfg(test)]
#[path = "shards_tests.rs"]
mod tests;
