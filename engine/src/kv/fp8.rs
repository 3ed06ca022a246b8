//! KV in e4m3: four bits of exponent, three of mantissa, largest number 448, no infinities (OCP 8-bit Floating Point
//! Specification 1.0, section 5). No scale, as in
//! vLLM without calibration: a number is off by a sixteenth of itself at most, by 1/1024 where it is below 1/64, and what is beyond 448 is
//! cut. What that costs a real model is in bench/RESULTS-H100.md.

use std::sync::LazyLock;

use float8::F8E4M3;
use half::bf16;

/// The nearest number, ties to even; what is beyond the largest becomes the largest.
pub fn from_f32(number: f32) -> u8 {
    F8E4M3::from_f32(number).to_bits()
}

/// Every number, by its bits.
pub static TO_F32: LazyLock<[f32; 256]> =
    LazyLock::new(|| std::array::from_fn(|bits| F8E4M3::from_bits(bits as u8).to_f32()));

/// [`from_f32`] of every bf16 number, by its bits: what converts whole pools.
pub static FROM_BF16: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..=u16::MAX).map(|bits| from_f32(bf16::from_bits(bits).to_f32())).collect());

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition: the nearest of the 254 finite numbers, the even one of two.
    fn nearest(number: f32) -> u8 {
        let value = |bits: u8| {
            let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
            let size = if exponent == 0 {
                mantissa / 512.0
            } else {
                (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7)
            };
            if bits & 0x80 != 0 { -size } else { size }
        };
        let sign = if number.is_sign_negative() { 0x80 } else { 0 };
        let distance = |bits: &u8| f64::from(value(*bits | sign)) - f64::from(number);
        let best = (0..0x7f).min_by(|a, b| {
            let (off, other) = (distance(a).abs(), distance(b).abs());
            off.total_cmp(&other).then((a & 1).cmp(&(b & 1)))
        });
        best.unwrap() | sign
    }

    #[test]
    fn every_number_is_itself() {
        for bits in (0..=255_u8).filter(|bits| bits & 0x7f != 0x7f) {
            let number = TO_F32[bits as usize];
            assert_eq!((from_f32(number), nearest(number)), (bits, bits), "{number}");
        }
        assert!(TO_F32[0x7f].is_nan() && from_f32(f32::NAN) & 0x7f == 0x7f);
        assert_eq!([from_f32(1e9), from_f32(-1e9), from_f32(f32::INFINITY)], [0x7e, 0xfe, 0x7e]);
    }

    proptest! {
        #[test]
        fn rounding_is_to_the_nearest(number in prop_oneof![-600.0f32..600.0, -0.05f32..0.05, (-200i32..200).prop_map(|n| n as f32 / 64.0)]) {
            prop_assert_eq!(from_f32(number), nearest(number), "{}", number);
        }
    }
}
