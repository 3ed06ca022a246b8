//! A row as e4m3 numbers (four bits of exponent, three of mantissa, no infinity): one stands for `q * m / 448`, where `m` is the row's
//! largest magnitude and 448 the largest number there is.

use super::{INFINITE, MAGNITUDE, NAN, to_bf16, wide};

/// The largest number, and its byte.
const MOST: f32 = 448.0;
const MOST_BYTE: u32 = 0x7e;
/// The byte for what is not a finite number, and the bits of a byte beside its sign.
const NOT_FINITE: u8 = 0x7f;
const SIGN: u8 = 0x80;
/// From here on, 2⁻⁶, mantissas have a leading one.
const NORMAL: f32 = 1.0 / 64.0;
/// The distance of the smaller numbers, 2⁻⁹.
const STEP: f32 = 1.0 / 512.0;
/// What a byte shifted to the exponent and mantissa of 32 bits lacks: the difference of their biases, 127 and 7.
const BIAS: u32 = 120 << 23;
/// Mantissa bits of 32-bit numbers that have no place.
const LOST: u32 = 20;

#[inline(always)]
pub(super) fn pack_row(row: &[[u8; 2]], largest: u16, bytes: &mut [u8]) {
    let scale = MOST / wide(largest);
    for (number, byte) in row.iter().zip(bytes) {
        let number = u16::from_le_bytes(*number);
        *byte = encode(wide(number & MAGNITUDE) * scale) | sign(number);
    }
}

/// The same for numbers that are almost nothing, or not finite.
pub(super) fn pack_odd_row(row: &[[u8; 2]], largest: u16, bytes: &mut [u8]) {
    for (number, byte) in row.iter().zip(bytes) {
        let number = u16::from_le_bytes(*number);
        *byte = match number & MAGNITUDE {
            INFINITE.. => NOT_FINITE,
            0 => sign(number),
            magnitude => {
                let share = f64::from(wide(magnitude)) / f64::from(wide(largest));
                encode((share * f64::from(MOST)) as f32) | sign(number)
            }
        };
    }
}

#[inline(always)]
pub(super) fn unpack_row(largest: u16, bytes: &[u8], row: &mut [[u8; 2]]) {
    let largest = wide(largest);
    for (byte, number) in bytes.iter().zip(row) {
        let exact = decode(byte & !SIGN) * (1.0 / MOST) * largest;
        let rounded = to_bf16(exact) | u16::from(byte & SIGN) << 8;
        *number = (if byte & !SIGN == NOT_FINITE { NAN } else { rounded }).to_le_bytes();
    }
}

#[inline(always)]
fn sign(number: u16) -> u8 {
    (number >> 8) as u8 & SIGN
}

/// The nearest e4m3 to a magnitude of at most [`MOST`], a tie to the even one.
#[inline(always)]
fn encode(magnitude: f32) -> u8 {
    let bits = magnitude.to_bits();
    let rounded = bits + ((1 << (LOST - 1)) - 1) + (bits >> LOST & 1);
    let normal = (rounded >> LOST).wrapping_sub(BIAS >> LOST);
    // The last bits of a sum in which they count steps.
    let small = (magnitude + STEP * 8_388_608.0).to_bits() & 0xf;
    (if magnitude < NORMAL { small } else { normal }).min(MOST_BYTE) as u8
}

#[inline(always)]
fn decode(byte: u8) -> f32 {
    let normal = f32::from_bits((u32::from(byte) << LOST) + BIAS);
    if byte < 8 { f32::from(byte) * STEP } else { normal }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the format's definition.
    fn number(byte: u8) -> f32 {
        let (exponent, mantissa) = (i32::from(byte >> 3), f32::from(byte & 7));
        if exponent == 0 {
            mantissa / 8.0 * 2_f32.powi(-6)
        } else {
            (1.0 + mantissa / 8.0) * 2_f32.powi(exponent - 7)
        }
    }

    #[test]
    fn every_number_is_its_own_byte_and_what_lies_between_goes_to_the_nearer_one() {
        for byte in 0..NOT_FINITE {
            assert_eq!((decode(byte), encode(number(byte))), (number(byte), byte));
            if byte + 1 == NOT_FINITE {
                break;
            }
            let (low, high) = (number(byte), number(byte + 1));
            let even = if byte % 2 == 0 { byte } else { byte + 1 };
            assert_eq!(encode(f32::midpoint(low, high)), even, "between {low} and {high}");
            assert_eq!(encode(f32::midpoint(low, high).next_down()), byte);
            assert_eq!(encode(f32::midpoint(low, high).next_up()), byte + 1);
        }
        assert_eq!((decode(0x7e), encode(MOST.next_up())), (MOST, 0x7e));
    }
}
