//! Cells of bf16 numbers as bytes for their journey: half of what a network carries, for a rounding whose bound is known.
//!
//! A cell is rows of numbers (of KV: what one head has of one token, K or V). A packed row is its largest magnitude `m`, which is one
//! of its numbers, as a bf16; then for each number a signed byte `q`, which stands for `q * m / 127`. So a number comes back
//! within `m / 254` of what it was, and one rounding to bf16. Zeros and the largest number come back as they were, and what came back
//! packs into the same bytes again: another journey loses nothing more. Numbers that are not finite come back as NaN, and do not
//! coarsen their neighbours.

/// Numbers in a row, at least: a shorter one would gain nothing.
const MIN_ROW: u16 = 8;
/// Bytes of a bf16.
const NUMBER: usize = 2;
/// The largest of what a byte stands for.
const STEPS: f32 = 127.0;
/// The byte for what is not a finite number.
const NOT_FINITE: i8 = i8::MIN;
/// A bf16 without its sign; as whole numbers magnitudes are in the order of what they mean.
const MAGNITUDE: u16 = 0x7fff;
/// The magnitude of infinity: those from here on are not finite.
const INFINITE: u16 = 0x7f80;
/// Below this magnitude, 2⁻¹¹⁹, `127 / m` is no number of 32 bits.
const TINY: u16 = 8 << 7;
const NAN: u16 = 0x7fc0;
/// Added to a small number it leaves the nearest whole one in the last bits, a tie at the even one.
const TO_WHOLE: f32 = 12_582_912.0;

/// How cells are packed: as eight-bit numbers, with a scale for each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    row: u16,
}

impl Packing {
    /// The only kind there is.
    pub const INT8: &'static str = "int8";

    /// For rows of so many numbers; nothing when they are too short to gain.
    pub fn int8(row: u16) -> Option<Self> {
        (row >= MIN_ROW).then_some(Self { row })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::INT8
    }

    /// What both sides must say alike: the kind in the first byte, then the row.
    pub fn code(self) -> u64 {
        1 | u64::from(self.row) << 8
    }

    /// Bytes of a packed cell; nothing when the cell is not whole rows.
    pub fn packed_bytes(self, cell_bytes: usize) -> Option<usize> {
        let row = usize::from(self.row);
        let (rows, rest) = (cell_bytes / (row * NUMBER), cell_bytes % (row * NUMBER));
        (rows > 0 && rest == 0).then_some(rows * (row + NUMBER))
    }

    /// Packs a cell into [`Packing::packed_bytes`] bytes.
    pub fn pack(self, cell: &[u8], packed: &mut [u8]) {
        let row = usize::from(self.row);
        for (from, to) in cell.chunks_exact(row * NUMBER).zip(packed.chunks_exact_mut(row + NUMBER)) {
            if let Some((scale, bytes)) = to.split_first_chunk_mut() {
                *scale = pack_row(from.as_chunks().0, bytes).to_le_bytes();
            }
        }
    }

    /// The cell that was packed. Whatever the bytes are, they are some numbers.
    pub fn unpack(self, packed: &[u8], cell: &mut [u8]) {
        let row = usize::from(self.row);
        for (from, to) in packed.chunks_exact(row + NUMBER).zip(cell.chunks_exact_mut(row * NUMBER)) {
            if let Some((scale, bytes)) = from.split_first_chunk() {
                unpack_row(u16::from_le_bytes(*scale), bytes, to.as_chunks_mut().0);
            }
        }
    }
}

fn wide(number: u16) -> f32 {
    f32::from_bits(u32::from(number) << 16)
}

/// The bytes of a row; yields its largest magnitude.
fn pack_row(row: &[[u8; 2]], bytes: &mut [u8]) -> u16 {
    // Signed, since every processor compares those at once.
    let largest = row.iter().fold(0_i16, |most, number| most.max(i16::from_le_bytes(*number) & i16::MAX));
    let largest = largest.unsigned_abs();
    if largest == 0 {
        bytes.fill(0);
        return 0;
    }
    if !(TINY..INFINITE).contains(&largest) {
        return pack_odd_row(row, bytes);
    }
    let steps = STEPS / wide(largest);
    for (number, byte) in row.iter().zip(bytes) {
        let whole = wide(u16::from_le_bytes(*number)) * steps + TO_WHOLE;
        *byte = whole.to_bits() as u8;
    }
    largest
}

/// The same for numbers that are almost nothing, or not finite: slow and exact.
fn pack_odd_row(row: &[[u8; 2]], bytes: &mut [u8]) -> u16 {
    let magnitudes = row.iter().map(|number| u16::from_le_bytes(*number) & MAGNITUDE);
    let largest = magnitudes.filter(|magnitude| *magnitude < INFINITE).max().unwrap_or(0);
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
    largest
}

fn unpack_row(largest: u16, bytes: &[u8], row: &mut [[u8; 2]]) {
    let step = wide(largest) / STEPS;
    for (byte, number) in bytes.iter().zip(row) {
        let byte = byte.cast_signed();
        let exact = (f32::from(byte) * step).to_bits();
        // To the nearest bf16, a tie to the even one.
        let rounded = exact.wrapping_add(0x7fff + (exact >> 16 & 1)) >> 16;
        *number = (if byte == NOT_FINITE { NAN } else { rounded as u16 }).to_le_bytes();
    }
}

#[cfg(test)]
#[path = "packing_tests.rs"]
mod tests;
