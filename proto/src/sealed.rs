//! The codec between router and workers: every message ends with a checksum of itself.
//!
//! TCP's own is 16 bits, and the CRC-32C of the KV plane does not cover this one: a flipped bit in a token id would be a
//! wrong token with status OK. The checksum is a protobuf field that no message declares, so other tools can still read
//! them; what comes in without it, or with a wrong one, is refused as DATA_LOSS, which the router tries again.

use std::marker::PhantomData;

use prost::Message;
use prost::bytes::{Buf, BufMut};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Tag of field 2047, fixed32: two bytes that stand before the checksum.
const TAG: [u8; 2] = [0xFD, 0x7F];
const SEAL_BYTES: usize = TAG.len() + size_of::<u32>();

/// Protobuf with a checksum behind it.
#[derive(Debug, Clone)]
pub struct SealedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SealedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + Send + 'static, U: Message + Default + Send + 'static> Codec for SealedCodec<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = Seal<T>;
    type Decoder = Unseal<U>;

    fn encoder(&mut self) -> Seal<T> {
        Seal(PhantomData)
    }

    fn decoder(&mut self) -> Unseal<U> {
        Unseal(PhantomData)
    }
}

/// Writes messages.
#[derive(Debug, Clone)]
pub struct Seal<T>(PhantomData<T>);

impl<T: Message> Encoder for Seal<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, message: T, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let body = message.encode_to_vec();
        out.reserve(body.len() + SEAL_BYTES);
        out.put_slice(&body);
        out.put_slice(&TAG);
        out.put_u32_le(crc32c::crc32c(&body));
        Ok(())
    }
}

/// Reads messages.
#[derive(Debug, Clone)]
pub struct Unseal<U>(PhantomData<U>);

impl<U: Message + Default> Decoder for Unseal<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let all = bytes.copy_to_bytes(bytes.remaining());
        let body = body(&all).ok_or_else(|| {
            Status::data_loss(
                "a message between router and worker failed its checksum, or is of another version",
            )
        })?;
        let read = U::decode(all.slice(..body));
        read.map(Some)
            .map_err(|e| Status::internal(format!("an unreadable message between router and worker: {e}")))
    }
}

/// Length of what was sealed, if it is as it was.
fn body(all: &[u8]) -> Option<usize> {
    let (body, seal) = all.split_at_checked(all.len().checked_sub(SEAL_BYTES)?)?;
    let sum = u32::from_le_bytes(seal.strip_prefix(&TAG)?.try_into().ok()?);
    (sum == crc32c::crc32c(body)).then_some(body.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;

    #[test]
    fn every_flipped_bit_is_seen() {
        let sent =
            v1::SampledToken { choice: 1, token_id: 4711, position: 12, ..v1::SampledToken::default() };
        let mut all = sent.encode_to_vec();
        let sum = crc32c::crc32c(&all);
        all.extend(TAG);
        all.extend(sum.to_le_bytes());
        assert_eq!(body(&all), Some(sent.encoded_len()));
        assert_eq!(v1::SampledToken::decode(all.as_slice()).ok(), Some(sent));
        for bit in 0..all.len() * 8 {
            let mut bad = all.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(body(&bad), None, "bit {bit}");
        }
        assert_eq!(body(&all[..4]), None);
    }
}
