//! KV of a tile on its way from its blocks into buffers of f32; see `attention_work`.

use super::attention::TILE;
use super::attention_work::{Sizes, Work};
use super::lanes::{LANES, Lanes};
use crate::KvDtype;
use crate::kv::fp8;

impl<L: Lanes> Work<'_, L> {
    /// Where the K rows of the next tile are; those past `count` are the last one.
    ///
    /// # Safety
    /// The positions are in the table.
    #[inline(always)]
    pub(super) unsafe fn find_rows(&mut self, start: usize, count: usize) {
        let layout = self.layer.layout;
        let bytes = layout.head_dim * layout.dtype.bytes();
        let (mut key, mut block, mut slot) = (0, start / layout.block_tokens, start % layout.block_tokens);
        while key < count {
            let row = self.task.kv_head * layout.block_tokens + slot;
            let first = self.task.blocks[block] as usize * layout.block_bytes() + row * bytes;
            let run = (layout.block_tokens - slot).min(count - key);
            for i in 0..run {
                // SAFETY: inside the layer's blocks.
                self.next[key + i] = unsafe { self.layer.kv.add(first + i * bytes) };
            }
            (key, block, slot) = (key + run, block + 1, 0);
        }
        let last = self.next[count - 1];
        self.next[count..].fill(last);
    }

    /// `keys [dim, TILE]`: K transposed; columns past `count` repeat the last key.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    pub(super) unsafe fn load_keys(&mut self, count: usize) {
        let (dim, dtype) = (self.sizes.dim, self.layer.layout.dtype);
        if dtype == KvDtype::Fp8 {
            // SAFETY: the caller's.
            return unsafe { self.load_fp8_keys(count) };
        }
        let words = dim * dtype.bytes() / 4;
        let whole = words / 8 * 8;
        // SAFETY: rows of `words` words; a buffer of `dim · TILE`.
        unsafe {
            for key in (0..count).step_by(8) {
                let rows: [*const u32; 8] = std::array::from_fn(|i| self.rows[key + i].cast());
                let to = self.keys.as_mut_ptr().add(key);
                for word in (0..whole).step_by(8) {
                    let rows = rows.map(|row| row.add(word));
                    if dtype == KvDtype::Bf16 {
                        L::transpose8_pairs(&rows, to.add(2 * word * TILE), TILE);
                    } else {
                        L::transpose8(&rows, to.add(word * TILE), TILE);
                    }
                }
                for word in whole..words {
                    for (i, row) in rows.iter().enumerate() {
                        let bits = row.add(word).read_unaligned();
                        if dtype == KvDtype::Bf16 {
                            *to.add(2 * word * TILE + i) = f32::from_bits(bits << 16);
                            *to.add((2 * word + 1) * TILE + i) = f32::from_bits(bits & 0xffff_0000);
                        } else {
                            *to.add(word * TILE + i) = f32::from_bits(bits);
                        }
                    }
                }
            }
        }
    }

    /// # Safety
    /// As `load_keys`.
    unsafe fn load_fp8_keys(&mut self, count: usize) {
        let (dim, numbers) = (self.sizes.dim, &*fp8::TO_F32);
        for key in 0..count.next_multiple_of(LANES).min(TILE) {
            // SAFETY: a row of `dim` bytes.
            let row = unsafe { std::slice::from_raw_parts(self.rows[key], dim) };
            for (i, &bits) in row.iter().enumerate() {
                self.keys[i * TILE + key] = numbers[bits as usize];
            }
        }
    }

    /// `values [TILE, padded]`.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    pub(super) unsafe fn load_values(&mut self, count: usize) {
        let (Sizes { dim, padded, .. }, to_values) = (self.sizes, self.to_values());
        for key in 0..count {
            // SAFETY: rows of `dim` numbers on both sides.
            unsafe {
                let from = self.rows[key].add(to_values);
                let to = self.values.as_mut_ptr().add(key * padded);
                match self.layer.layout.dtype {
                    KvDtype::F32 => std::ptr::copy_nonoverlapping(from.cast(), to, dim),
                    KvDtype::Bf16 => {
                        let from = from.cast::<u16>();
                        let whole = dim / LANES * LANES;
                        for i in (0..whole).step_by(LANES) {
                            L::load_bf16(from.add(i)).store(to.add(i));
                        }
                        for i in whole..dim {
                            *to.add(i) = f32::from_bits(u32::from(*from.add(i)) << 16);
                        }
                    }
                    KvDtype::Fp8 => {
                        let numbers = &*fp8::TO_F32;
                        for i in 0..dim {
                            *to.add(i) = numbers[*from.add(i) as usize];
                        }
                    }
                }
            }
        }
    }
}
