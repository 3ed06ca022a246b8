//! Cells of bf16 numbers as bytes for their journey: half of what a network carries, for a rounding whose bound is known.
//!
//! A cell is rows of numbers (of KV: what one head has of one token, K or V). A packed row is its largest magnitude `m`, which is one
//! of its numbers, as a bf16; then a byte for each number. As int8 a number comes back within `m / 254` of what it was, as fp8
//! (e4m3) within a 16th of itself, or `m / 458752` where that is more; and one rounding to bf16. Zeros and the largest number come
//! back as they were, and what came back comes back unchanged: another journey loses nothing more. Numbers that are not finite come
//! back as NaN, and do not coarsen their neighbours.

mod fp8;
mod int8;

/// Numbers in a row, at least: a shorter one would gain nothing.
const MIN_ROW: u16 = 8;
/// Bytes of a bf16.
const NUMBER: usize = 2;
/// A bf16 without its sign; as whole numbers magnitudes are in the order of what they mean.
const MAGNITUDE: u16 = 0x7fff;
/// The magnitude of infinity: those from here on are not finite.
const INFINITE: u16 = 0x7f80;
/// Below this magnitude, 2⁻¹¹⁹, neither `127 / m` nor `448 / m` is a number of 32 bits.
const TINY: u16 = 8 << 7;
const NAN: u16 = 0x7fc0;

/// As what numbers travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Int8 = 1,
    Fp8 = 2,
}

impl Kind {
    /// The bytes of a row; yields its largest magnitude.
    #[inline(always)]
    fn pack_row(self, row: &[[u8; 2]], bytes: &mut [u8]) -> u16 {
        let largest = largest(row);
        if largest == 0 {
            bytes.fill(0);
            return 0;
        }
        if (TINY..INFINITE).contains(&largest) {
            match self {
                Self::Int8 => int8::pack_row(row, largest, bytes),
                Self::Fp8 => fp8::pack_row(row, largest, bytes),
            }
            return largest;
        }
        let largest = largest_finite(row);
        match self {
            Self::Int8 => int8::pack_odd_row(row, largest, bytes),
            Self::Fp8 => fp8::pack_odd_row(row, largest, bytes),
        }
        largest
    }

    #[inline(always)]
    fn unpack_row(self, largest: u16, bytes: &[u8], row: &mut [[u8; 2]]) {
        match self {
            Self::Int8 => int8::unpack_row(largest, bytes, row),
            Self::Fp8 => fp8::unpack_row(largest, bytes, row),
        }
    }
}

/// The same code compiled once more with AVX2, for processors that have it: eight numbers at a time rather than four, and the same bytes.
macro_rules! wide_or_not {
    ($packing:ident.$rows:ident($from:ident, $to:ident)) => {{
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            #[target_feature(enable = "avx2")]
            fn wide(packing: Packing, from: &[u8], to: &mut [u8]) {
                packing.$rows(from, to);
            }
            // SAFETY: the processor has the instructions.
            return unsafe { wide($packing, $from, $to) };
        }
        $packing.$rows($from, $to)
    }};
}

/// How cells are packed: as eight-bit numbers, with a scale for each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    kind: Kind,
    row: u16,
}

impl Packing {
    /// Steps of equal size: small numbers beside large ones are rounded coarsely.
    pub const INT8: &'static str = "int8";
    /// Steps in proportion to the number.
    pub const FP8: &'static str = "fp8";

    /// The kind of that name, for rows of so many numbers; nothing when there is none, or rows are too short to gain.
    pub fn named(name: &str, row: u16) -> Option<Self> {
        let kind = match name {
            Self::INT8 => Kind::Int8,
            Self::FP8 => Kind::Fp8,
            _ => return None,
        };
        (row >= MIN_ROW).then_some(Self { kind, row })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self.kind {
            Kind::Int8 => Self::INT8,
            Kind::Fp8 => Self::FP8,
        }
    }

    /// What both sides must say alike: the kind in the first byte, then the row.
    pub fn code(self) -> u64 {
        self.kind as u64 | u64::from(self.row) << 8
    }

    /// Bytes of a packed cell; nothing when the cell is not whole rows.
    pub fn packed_bytes(self, cell_bytes: usize) -> Option<usize> {
        let row = usize::from(self.row);
        let (rows, rest) = (cell_bytes / (row * NUMBER), cell_bytes % (row * NUMBER));
        (rows > 0 && rest == 0).then_some(rows * (row + NUMBER))
    }

    /// Packs a cell into [`Packing::packed_bytes`] bytes.
    pub fn pack(self, cell: &[u8], packed: &mut [u8]) {
        wide_or_not!(self.pack_rows(cell, packed));
    }

    /// The cell that was packed. Whatever the bytes are, they are some numbers.
    pub fn unpack(self, packed: &[u8], cell: &mut [u8]) {
        wide_or_not!(self.unpack_rows(packed, cell));
    }

    #[inline(always)]
    fn pack_rows(self, cell: &[u8], packed: &mut [u8]) {
        let row = usize::from(self.row);
        for (from, to) in cell.chunks_exact(row * NUMBER).zip(packed.chunks_exact_mut(row + NUMBER)) {
            if let Some((scale, bytes)) = to.split_first_chunk_mut() {
                *scale = self.kind.pack_row(from.as_chunks().0, bytes).to_le_bytes();
            }
        }
    }

    #[inline(always)]
    fn unpack_rows(self, packed: &[u8], cell: &mut [u8]) {
        let row = usize::from(self.row);
        for (from, to) in packed.chunks_exact(row + NUMBER).zip(cell.chunks_exact_mut(row * NUMBER)) {
            if let Some((scale, bytes)) = from.split_first_chunk() {
                self.kind.unpack_row(u16::from_le_bytes(*scale), bytes, to.as_chunks_mut().0);
            }
        }
    }
}

#[inline(always)]
fn wide(number: u16) -> f32 {
    f32::from_bits(u32::from(number) << 16)
}

/// To the nearest bf16, a tie to the even one.
#[inline(always)]
fn to_bf16(number: f32) -> u16 {
    let bits = number.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// The largest magnitude, be it finite or not.
#[inline(always)]
fn largest(row: &[[u8; 2]]) -> u16 {
    // Signed, since every processor compares those at once.
    row.iter().fold(0_i16, |most, number| most.max(i16::from_le_bytes(*number) & i16::MAX)).unsigned_abs()
}

/// The largest finite magnitude.
fn largest_finite(row: &[[u8; 2]]) -> u16 {
    let magnitudes = row.iter().map(|number| u16::from_le_bytes(*number) & MAGNITUDE);
    magnitudes.filter(|magnitude| *magnitude < INFINITE).max().unwrap_or(0)
}

#[cfg(test)]
#[path = "packing_tests.rs"]
mod tests;
