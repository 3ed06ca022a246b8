//! How GGUF packs numbers, and unpacking them.
//!
//! Quantised types hold blocks of 32 numbers along the fastest dimension: a scale `d` (f16), for Q4_1 also a
//! minimum `m` (f16), then the quants. 4-bit quants pair element `i` (low half) with `i + 16` (high half).

use half::{bf16, f16};

const BLOCK: usize = 32;

/// A GGUF element type that we read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockType {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 16-bit brain float.
    Bf16,
    /// `d · (q − 8)`, 4 bits.
    Q4_0,
    /// `d · q + m`, 4 bits.
    Q4_1,
    /// `d · q`, 8 bits signed.
    Q8_0,
}

impl BlockType {
    pub(super) fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// (numbers, bytes) of one block.
    fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (BLOCK, 18),
            Self::Q4_1 => (BLOCK, 20),
            Self::Q8_0 => (BLOCK, 34),
        }
    }

    /// Bytes of a tensor of this shape (slowest dimension first).
    pub(super) fn bytes_of(self, shape: &[usize]) -> Result<usize, String> {
        let (numbers, bytes) = self.block();
        let row = shape.last().copied().unwrap_or(0);
        if row == 0 || row % numbers != 0 {
            return Err(format!("rows of {row} do not fill blocks of {numbers} ({self:?})"));
        }
        shape
            .iter()
            .try_fold(1usize, |product, &size| product.checked_mul(size))
            .and_then(|count| (count / numbers).checked_mul(bytes))
            .filter(|&total| total > 0)
            .ok_or_else(|| format!("shape {shape:?} is empty or too large"))
    }

    /// Appends the numbers packed in `data`.
    pub(super) fn unpack(self, data: &[u8], out: &mut Vec<f32>) {
        let (numbers, bytes) = self.block();
        out.reserve(data.len() / bytes * numbers);
        for block in data.chunks_exact(bytes) {
            match self {
                Self::F32 => out.push(f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
                Self::F16 => out.push(half(block)),
                Self::Bf16 => out.push(bf16::from_le_bytes([block[0], block[1]]).to_f32()),
                Self::Q4_0 => {
                    let d = half(block);
                    nibbles(&block[2..], |q| (q - 8.0) * d, out);
                }
                Self::Q4_1 => {
                    let (d, m) = (half(block), half(&block[2..]));
                    nibbles(&block[4..], |q| q * d + m, out);
                }
                Self::Q8_0 => {
                    let d = half(block);
                    out.extend(block[2..].iter().map(|&q| f32::from(q as i8) * d));
                }
            }
        }
    }
}

fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn nibbles(quants: &[u8], value: impl Fn(f32) -> f32, out: &mut Vec<f32>) {
    out.extend(quants.iter().map(|&q| value(f32::from(q & 15))));
    out.extend(quants.iter().map(|&q| value(f32::from(q >> 4))));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_unpacks_to_its_definition() {
        let unpack = |kind: BlockType, data: &[u8]| {
            let mut out = Vec::new();
            kind.unpack(data, &mut out);
            out
        };
        let (half2, half3) = (f16::from_f32(0.5).to_le_bytes(), f16::from_f32(-3.0).to_le_bytes());
        let quants: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
        let q4_0 = unpack(BlockType::Q4_0, &[&half2[..], &quants].concat());
        let q4_1 = unpack(BlockType::Q4_1, &[&half2[..], &half3, &quants].concat());
        for i in 0..16u8 {
            let (low, high) = (f32::from(i), f32::from(15 - i));
            assert_eq!(q4_0[i as usize], (low - 8.0) * 0.5);
            assert_eq!(q4_0[i as usize + 16], (high - 8.0) * 0.5);
            assert_eq!(q4_1[i as usize], low * 0.5 - 3.0);
            assert_eq!(q4_1[i as usize + 16], high * 0.5 - 3.0);
        }
        let bytes: Vec<u8> = (0..32).map(|i| (i - 16i8) as u8).collect();
        let q8_0 = unpack(BlockType::Q8_0, &[&half2[..], &bytes].concat());
        assert_eq!((q8_0[0], q8_0[31]), (-8.0, 7.5));
        assert_eq!(unpack(BlockType::F16, &half3), [-3.0]);
        assert_eq!(unpack(BlockType::Bf16, &bf16::from_f32(2.5).to_le_bytes()), [2.5]);
        assert_eq!(unpack(BlockType::F32, &7.25f32.to_le_bytes()), [7.25]);
    }

    #[test]
    fn shapes_are_checked() {
        assert_eq!(BlockType::Q4_1.bytes_of(&[2, 64]), Ok(80));
        assert!(BlockType::Q4_1.bytes_of(&[2, 33]).is_err());
        assert!(BlockType::F32.bytes_of(&[usize::MAX, 2]).is_err());
        assert!(BlockType::F32.bytes_of(&[0, 2]).is_err());
    }
}
