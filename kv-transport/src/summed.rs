//! A copy that makes the checksum of what it writes on the way, at nearly the price of the copy alone.
//!
//! A checksum after the copy would read everything once more, from memory when it is long. So on x86-64 each line is loaded once: its
//! words go through the processor's CRC-32C instruction and, past the caches, to their place. That instruction takes three cycles and
//! begins every cycle, so three lanes of a strip run at once; their sums are joined as for bytes that follow each other. The next strip
//! is prefetched in order, since three lanes in turn are not what the hardware expects. What is written is what was summed, even where
//! the source changes meanwhile.

/// Copies `len` bytes and yields the CRC-32C of what it wrote.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes, and they must not overlap. The source may change meanwhile;
/// nobody else may touch the target.
pub(crate) unsafe fn copy_summed(from: *const u8, to: *mut u8, len: usize) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if to.addr().is_multiple_of(16)
        && std::arch::is_x86_feature_detected!("sse4.2")
        && std::arch::is_x86_feature_detected!("pclmulqdq")
    {
        // SAFETY: the processor has the instructions, the target is aligned as they want it; the rest is the caller's word.
        return unsafe { x86::copy_summed(from, to, len) };
    }
    // SAFETY: the caller's word.
    unsafe { copy_in_pieces(from, to, len) }
}

/// Bytes that are copied and then summed while the first cache has them.
const PIECE: usize = 8 << 10;

unsafe fn copy_in_pieces(from: *const u8, to: *mut u8, len: usize) -> u32 {
    let mut sum = 0;
    for at in (0..len).step_by(PIECE) {
        let piece = PIECE.min(len - at);
        // SAFETY: within both, which do not overlap; nobody else touches the target.
        let written = unsafe {
            std::ptr::copy_nonoverlapping(from.add(at), to.add(at), piece);
            std::slice::from_raw_parts(to.add(at), piece)
        };
        sum = crc32c::crc32c_append(sum, written);
    }
    sum
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Bytes of a lane; a strip has three.
    const LANE: usize = 1024;
    const STRIP: usize = 3 * LANE;
    /// Bytes of a cache line.
    const LINE: usize = 64;

    /// x to that power, modulo the polynomial, lowest power in the highest bit.
    const fn power(exponent: usize) -> u32 {
        let (mut power, mut at) = (0x8000_0000_u32, 0);
        while at < exponent {
            power = (power >> 1) ^ (if power & 1 == 1 { 0x82F6_3B78 } else { 0 });
            at += 1;
        }
        power
    }

    /// What a sum is multiplied with for so many zero bytes behind it; 33 powers come from the product and its reduction.
    const BEHIND_ONE: u32 = power(8 * LANE - 33);
    const BEHIND_TWO: u32 = power(16 * LANE - 33);

    /// # Safety
    /// As [`super::copy_summed`]; `to` must be aligned to 16 bytes.
    #[target_feature(enable = "sse4.2,pclmulqdq")]
    pub(super) unsafe fn copy_summed(from: *const u8, to: *mut u8, len: usize) -> u32 {
        let (mut sum, mut at) = (u64::from(u32::MAX), 0);
        while len - at >= STRIP {
            let (mut second, mut third) = (0, 0);
            for i in (at..at + LANE).step_by(LINE) {
                // SAFETY: a line of each lane, inside the strip, which is inside both.
                unsafe {
                    sum = line(from.add(i), to.add(i), sum);
                    second = line(from.add(i + LANE), to.add(i + LANE), second);
                    third = line(from.add(i + 2 * LANE), to.add(i + 2 * LANE), third);
                }
                let next = from.wrapping_add(at + STRIP + 3 * (i - at)).cast();
                // A hint only, wherever it points.
                _mm_prefetch::<_MM_HINT_T0>(next);
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(LINE));
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(2 * LINE));
            }
            sum = behind(sum, BEHIND_TWO) ^ behind(second, BEHIND_ONE) ^ third;
            at += STRIP;
        }
        while len - at >= LINE {
            // SAFETY: a line that is inside both.
            sum = unsafe { line(from.add(at), to.add(at), sum) };
            at += LINE;
        }
        while at < len {
            // SAFETY: a byte that is inside both.
            let byte = unsafe { from.add(at).read() };
            // SAFETY: as above.
            unsafe { to.add(at).write(byte) };
            sum = u64::from(_mm_crc32_u8(sum as u32, byte));
            at += 1;
        }
        // Stores past the caches are ordered by this alone: whoever is told of the cell must find it.
        _mm_sfence();
        !(sum as u32)
    }

    /// Copies a line and goes on with its sum.
    ///
    /// # Safety
    /// `from` must be valid for reads and `to`, aligned to 16 bytes, for writes of a line.
    #[inline]
    #[target_feature(enable = "sse4.2,pclmulqdq")]
    unsafe fn line(from: *const u8, to: *mut u8, mut sum: u64) -> u64 {
        let (from, to) = (from.cast::<__m128i>(), to.cast::<__m128i>());
        for i in 0..LINE / size_of::<__m128i>() {
            // SAFETY: the caller's word.
            let words = unsafe { _mm_loadu_si128(from.add(i)) };
            // SAFETY: the caller's word.
            unsafe { _mm_stream_si128(to.add(i), words) };
            sum = _mm_crc32_u64(sum, _mm_cvtsi128_si64(words).cast_unsigned());
            sum = _mm_crc32_u64(sum, _mm_extract_epi64::<1>(words).cast_unsigned());
        }
        sum
    }

    /// The sum as if zeros followed, as many as the power stands for.
    #[inline]
    #[target_feature(enable = "sse4.2,pclmulqdq")]
    fn behind(sum: u64, power: u32) -> u64 {
        let sum = _mm_cvtsi64_si128(sum.cast_signed());
        let product = _mm_clmulepi64_si128::<0>(sum, _mm_cvtsi32_si128(power.cast_signed()));
        _mm_crc32_u64(0, _mm_cvtsi128_si64(product).cast_unsigned())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_what_was_read_and_its_sum(
            len in prop_oneof![0_usize..200, 2900_usize..3300, 0_usize..40_000],
            (skip, shift) in (0_usize..20, 0_usize..20),
            seed in any::<u32>(),
        ) {
            let mut state = seed;
            let bytes: Vec<u8> = (0..skip + len).map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            }).collect();
            let mut target = vec![0xA5_u8; len + 64];
            let start = target.as_ptr().align_offset(16) + shift;
            type Copy = unsafe fn(*const u8, *mut u8, usize) -> u32;
            for copy in [copy_summed as Copy, copy_in_pieces as Copy] {
                target.fill(0xA5);
                // SAFETY: `start + len` is at most 15 + 19 more than `len`.
                let sum = unsafe { copy(bytes[skip..].as_ptr(), target.as_mut_ptr().add(start), len) };
                prop_assert_eq!(sum, crc32c::crc32c(&bytes[skip..]));
                prop_assert_eq!(&target[start..start + len], &bytes[skip..]);
                prop_assert!(target[..start].iter().chain(&target[start + len..]).all(|byte| *byte == 0xA5));
            }
        }
    }
}
