//! A row as signed bytes: one stands for `q * m / 127`, where `m` is the row's largest magnitude.

use super::{INFINITE, MAGNITUDE, NAN, to_bf16, wide};

/// The largest of what a byte stands for.
const STEPS: f32 = 127.0;
/// The byte for what is not a finite number.
const NOT_FINITE: i8 = i8::MIN;
/// Added to a small number it leaves the nearest whole one in the last bits, a tie at the even one.
const TO_WHOLE: f32 = 12_582_912.0;

#[inline(always)]
pub(super) fn pack_row(row: &[[u8; 2]], largest: u16, bytes: &mut [u8]) {
    let steps = STEPS / wide(largest);
    for (number, byte) in row.iter().zip(bytes) {
        let whole = wide(u16::from_le_bytes(*number)) * steps + TO_WHOLE;
        *byte = whole.to_bits() as u8;
    }
}

/// The same for numbers that are almost nothing, or not finite: slow and exact.
pub(super) fn pack_odd_row(row: &[[u8; 2]], largest: u16, bytes: &mut [u8]) {
    for (number, byte) in row.iter().zip(bytes) {
        let number = u16::from_le_bytes(*number);
        let step = match number & MAGNITUDE {
            INFINITE.. => NOT_FINITE,
            0 => 0,
            _ => {
                let share = f64::from(wide(number)) / f64::from(wide(largest));
                (share * f64::from(STEPS)).round_ties_even() as i8
            }
        };
        *byte = step.cast_unsigned();
    }
}

#[inline(always)]
pub(super) fn unpack_row(largest: u16, bytes: &[u8], row: &mut [[u8; 2]]) {
    let step = wide(largest) / STEPS;
    for (byte, number) in bytes.iter().zip(row) {
        let byte = byte.cast_signed();
        let rounded = to_bf16(f32::from(byte) * step);
        *number = (if byte == NOT_FINITE { NAN } else { rounded }).to_le_bytes();
    }
}
