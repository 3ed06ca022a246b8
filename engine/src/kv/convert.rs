//! KV of one layout as another one's: blocks of another size, elements of another type.
//!
//! Both layouts are `[2 (K, V), kv_heads, block_tokens, head_dim]` within a block of a layer ([`KvLayout`]), so what a head
//! has of consecutive tokens is consecutive in both. A target block is made of the source blocks that hold its tokens.

use std::ops::Range;

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::fp8;
use super::layout::{KvDtype, KvLayout};

/// Elements converted at once, on the stack.
const PIECE: usize = 256;

/// Two layouts that hold different KV, whatever is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {from} here and {to} there")]
pub struct Unlike {
    what: &'static str,
    from: usize,
    to: usize,
}

/// How to make blocks of one layout from those of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conversion {
    from: KvLayout,
    to: KvLayout,
}

impl Conversion {
    /// Layers, heads and their size must be the same; block sizes, types and pool sizes need not.
    pub fn between(from: KvLayout, to: KvLayout) -> Result<Self, Unlike> {
        let same = |what, from, to| if from == to { Ok(()) } else { Err(Unlike { what, from, to }) };
        same("layers", from.layers, to.layers)?;
        same("KV heads", from.kv_heads, to.kv_heads)?;
        same("head size", from.head_dim, to.head_dim)?;
        for layout in [&from, &to] {
            if layout.block_tokens == 0 {
                return Err(Unlike { what: "block size", from: from.block_tokens, to: to.block_tokens });
            }
        }
        Ok(Self { from, to })
    }

    /// The layout of what is made.
    pub fn to(&self) -> &KvLayout {
        &self.to
    }

    /// The sequence's source blocks that target block `at` is made of, when the sequence has `tokens` tokens.
    pub fn sources(&self, at: usize, tokens: usize) -> Range<usize> {
        let held = self.held(at, tokens);
        held.start / self.from.block_tokens..held.end.div_ceil(self.from.block_tokens)
    }

    /// Tokens of the sequence in target block `at`.
    fn held(&self, at: usize, tokens: usize) -> Range<usize> {
        let start = at * self.to.block_tokens;
        start..(start + self.to.block_tokens).min(tokens).max(start)
    }

    /// Writes target block `at` of a layer to `out`, of [`KvLayout::block_bytes`] bytes. `source` gives the bytes of the sequence's
    /// source blocks of that layer, those that [`Conversion::sources`] names. Room behind the last token is zeroed.
    pub fn fill<'a>(&self, at: usize, tokens: usize, source: impl Fn(usize) -> &'a [u8], out: &mut [u8]) {
        let (from, to) = (&self.from, &self.to);
        let held = self.held(at, tokens);
        for (head, out) in out.chunks_exact_mut(to.block_tokens * to.head_dim * to.dtype.bytes()).enumerate()
        {
            let row_bytes = to.head_dim * to.dtype.bytes();
            let (rows, room) = out.split_at_mut(held.len() * row_bytes);
            room.fill(0);
            let mut token = held.start;
            while token < held.end {
                let (block, within) = (token / from.block_tokens, token % from.block_tokens);
                let run = (from.block_tokens - within).min(held.end - token);
                let start = (head * from.block_tokens + within) * from.head_dim * from.dtype.bytes();
                let bytes = run * from.head_dim * from.dtype.bytes();
                let there = (token - held.start) * row_bytes;
                convert(
                    &source(block)[start..start + bytes],
                    from.dtype,
                    &mut rows[there..there + run * row_bytes],
                    to.dtype,
                );
                token += run;
            }
        }
    }
}

/// Elements of one type as another one's; rounds to the nearest, as every store of bf16 KV does.
fn convert(from: &[u8], from_dtype: KvDtype, to: &mut [u8], to_dtype: KvDtype) {
    match (from_dtype, to_dtype) {
        (KvDtype::F32, KvDtype::Bf16) => {
            let (mut wide, mut narrow) = ([0_f32; PIECE], [bf16::ZERO; PIECE]);
            for (from, to) in from.chunks(PIECE * 4).zip(to.chunks_mut(PIECE * 2)) {
                let n = from.len() / 4;
                for (number, bytes) in wide.iter_mut().zip(from.as_chunks().0) {
                    *number = f32::from_le_bytes(*bytes);
                }
                narrow[..n].convert_from_f32_slice(&wide[..n]);
                for (bytes, number) in to.as_chunks_mut().0.iter_mut().zip(&narrow) {
                    *bytes = number.to_le_bytes();
                }
            }
        }
        (KvDtype::Bf16, KvDtype::F32) => {
            for (from, to) in from.as_chunks().0.iter().zip(to.as_chunks_mut().0) {
                *to = bf16::from_le_bytes(*from).to_f32().to_le_bytes();
            }
        }
        (KvDtype::Bf16, KvDtype::Fp8) => {
            let table = &**fp8::FROM_BF16;
            for (from, to) in from.as_chunks().0.iter().zip(to) {
                *to = table[u16::from_le_bytes(*from) as usize];
            }
        }
        (KvDtype::F32, KvDtype::Fp8) => {
            for (from, to) in from.as_chunks().0.iter().zip(to) {
                *to = fp8::from_f32(f32::from_le_bytes(*from));
            }
        }
        (KvDtype::Fp8, KvDtype::Bf16) => {
            let table = &*fp8::TO_F32;
            for (from, to) in from.iter().zip(to.as_chunks_mut().0) {
                *to = bf16::from_f32(table[*from as usize]).to_le_bytes();
            }
        }
        (KvDtype::Fp8, KvDtype::F32) => {
            let table = &*fp8::TO_F32;
            for (from, to) in from.iter().zip(to.as_chunks_mut().0) {
                *to = table[*from as usize].to_le_bytes();
            }
        }
        (KvDtype::Bf16, KvDtype::Bf16) | (KvDtype::F32, KvDtype::F32) | (KvDtype::Fp8, KvDtype::Fp8) => {
            to.copy_from_slice(from)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(block_tokens: usize, dtype: KvDtype) -> KvLayout {
        KvLayout { layers: 1, blocks: 64, kv_heads: 2, block_tokens, head_dim: 4, dtype }
    }

    /// A number that names its place, nearly, and is exact in all types.
    fn number(side: usize, head: usize, token: usize, element: usize) -> f32 {
        let bits = (side * 2 + head) * 57 + (token * 4 + element) % 53;
        fp8::TO_F32[if bits < 0x7f { bits } else { bits + 1 }]
    }

    /// A sequence's blocks as this layout has them; 9 where no token is.
    fn blocks(layout: &KvLayout, tokens: usize, rest: f32) -> Vec<Vec<u8>> {
        let element = |index: usize| {
            let (element, row) = (index % layout.head_dim, index / layout.head_dim);
            let (token, row) = (row % layout.block_tokens, row / layout.block_tokens);
            let (head, row) = (row % layout.kv_heads, row / layout.kv_heads);
            (row % 2, head, token, element)
        };
        let bytes = |number: f32| match layout.dtype {
            KvDtype::F32 => number.to_le_bytes().to_vec(),
            KvDtype::Bf16 => bf16::from_f32(number).to_le_bytes().to_vec(),
            KvDtype::Fp8 => vec![fp8::from_f32(number)],
        };
        let block = |at: usize| {
            let numbers = (0..layout.block_bytes() / layout.dtype.bytes()).map(|index| {
                let (side, head, token, element) = element(index);
                let token = at * layout.block_tokens + token;
                if token < tokens { number(side, head, token, element) } else { rest }
            });
            numbers.flat_map(bytes).collect()
        };
        (0..layout.blocks_for(tokens)).map(block).collect()
    }

    fn dtype() -> impl Strategy<Value = KvDtype> {
        prop_oneof![Just(KvDtype::Bf16), Just(KvDtype::F32), Just(KvDtype::Fp8)]
    }

    proptest! {
        #[test]
        fn every_layout_becomes_every_other(
            from in 1_usize..40, to in 1_usize..40, tokens in 1_usize..150, a in dtype(), b in dtype(),
        ) {
            let (from, to) = (layout(from, a), layout(to, b));
            let conversion = Conversion::between(from, to).unwrap();
            let have = blocks(&from, tokens, 9.0);
            for (at, wanted) in blocks(&to, tokens, 0.0).iter().enumerate() {
                let sources = conversion.sources(at, tokens);
                let mut made = vec![0xff; to.block_bytes()];
                conversion.fill(at, tokens, |block| {
                    assert!(sources.contains(&block), "{block} is not in {sources:?}");
                    &have[block]
                }, &mut made);
                prop_assert_eq!(&made, wanted, "block {}", at);
            }
        }
    }

    #[test]
    fn other_models_are_refused() {
        let from = layout(16, KvDtype::F32);
        let why = |to| Conversion::between(from, to).unwrap_err().to_string();
        assert_eq!(why(KvLayout { kv_heads: 3, ..from }), "KV heads: 2 here and 3 there");
        assert_eq!(why(KvLayout { head_dim: 8, ..from }), "head size: 4 here and 8 there");
        assert_eq!(why(KvLayout { layers: 2, ..from }), "layers: 1 here and 2 there");
        assert_eq!(why(KvLayout { block_tokens: 0, ..from }), "block size: 16 here and 0 there");
    }
}
