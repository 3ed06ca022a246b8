//! The ticket: the right to write one transfer, as bytes that others pass on unread.

use std::fmt;

use bytes::{Buf, BufMut, Bytes};

use crate::grid::{Grid, MAX_CELLS};
use crate::wire::{put_name, take_name};
use crate::{Identity, error::TicketError};

/// Most bytes of an encoded ticket.
pub const MAX_TICKET_BYTES: usize = 1 << 20;
/// Most bytes of a ticket's `meta`.
pub const MAX_META_BYTES: usize = 256 << 10;
/// Most endpoints in a ticket.
pub const MAX_ENDPOINTS: usize = 16;
/// Most slots in a ticket.
pub const MAX_SLOTS: usize = 1 << 20;

const MAGIC: [u8; 4] = *b"TDMT";
const VERSION: u16 = 1;

/// The proof that a writer was given the ticket. Never printed; compared in constant time.
#[derive(Clone, Copy)]
pub struct Secret(pub(crate) [u8; 16]);

impl Secret {
    /// Draws a new one from the operating system's seeded generator.
    pub(crate) fn random() -> Self {
        Self(rand::random())
    }

    /// Compares without telling by time where the first difference is.
    pub(crate) fn matches(&self, other: &[u8; 16]) -> bool {
        let difference = self.0.iter().zip(other).fold(0_u8, |sum, (a, b)| sum | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What a receiver promises: this transfer may write these cells until then.
#[derive(Debug, Clone)]
pub struct Ticket {
    /// Random id of the transfer.
    pub transfer: u128,
    /// Proof of possession.
    pub secret: Secret,
    /// The receiver that issued it; another incarnation refuses it.
    pub receiver: Identity,
    /// Counts up with every reservation of the receiver.
    pub generation: u64,
    /// The caller's count of attempts for the same request.
    pub attempt: u32,
    /// Where the receiver listens, `host:port`, best first.
    pub endpoints: Vec<String>,
    /// The receiver's grid; planes and cell size must equal the sender's.
    pub grid: Grid,
    /// The receiver's slots; cells name them by their index here.
    pub slots: Vec<u32>,
    /// The caller's own words to the sending side.
    pub meta: Bytes,
    /// Milliseconds from issue until it is worthless.
    pub time_to_live_ms: u64,
}

/// Maximal runs of consecutive slots, in order.
fn runs(slots: &[u32]) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &slot in slots {
        match runs.last_mut() {
            Some((start, len)) if start.checked_add(*len) == Some(slot) => *len += 1,
            _ => runs.push((slot, 1)),
        }
    }
    runs
}

impl Ticket {
    /// The ticket as bytes.
    pub fn encode(&self) -> Result<Bytes, TicketError> {
        if self.meta.len() > MAX_META_BYTES
            || self.endpoints.len() > MAX_ENDPOINTS
            || self.slots.len() > MAX_SLOTS
        {
            return Err(TicketError::TooLarge);
        }
        let runs = runs(&self.slots);
        let mut out = Vec::with_capacity(256 + self.meta.len() + runs.len() * 8);
        out.put_slice(&MAGIC);
        out.put_u16_le(VERSION);
        out.put_u128_le(self.transfer);
        out.put_slice(&self.secret.0);
        put_name(&self.receiver.worker, &mut out).ok_or(TicketError::TooLarge)?;
        out.put_u64_le(self.receiver.incarnation);
        out.put_u64_le(self.generation);
        out.put_u32_le(self.attempt);
        out.put_u64_le(self.time_to_live_ms);
        out.put_u32_le(self.grid.planes);
        out.put_u64_le(self.grid.plane_stride);
        out.put_u32_le(self.grid.cell_bytes);
        out.put_u8(u8::try_from(self.endpoints.len()).map_err(|_| TicketError::TooLarge)?);
        for endpoint in &self.endpoints {
            put_name(endpoint, &mut out).ok_or(TicketError::TooLarge)?;
        }
        out.put_u32_le(u32::try_from(runs.len()).map_err(|_| TicketError::TooLarge)?);
        for (start, len) in runs {
            out.put_u32_le(start);
            out.put_u32_le(len);
        }
        out.put_u32_le(u32::try_from(self.meta.len()).map_err(|_| TicketError::TooLarge)?);
        out.put_slice(&self.meta);
        out.put_u32_le(crc32c::crc32c(&out));
        if out.len() > MAX_TICKET_BYTES { Err(TicketError::TooLarge) } else { Ok(out.into()) }
    }

    /// Reads a ticket; bounded in time and memory whatever the bytes are.
    pub fn decode(bytes: &[u8]) -> Result<Self, TicketError> {
        if bytes.len() > MAX_TICKET_BYTES {
            return Err(TicketError::TooLarge);
        }
        let (guarded, mut crc) =
            bytes.split_at_checked(bytes.len().saturating_sub(4)).ok_or(TicketError::Malformed)?;
        let mut rest = guarded.strip_prefix(&MAGIC).ok_or(TicketError::Malformed)?;
        match rest.try_get_u16_le() {
            Ok(VERSION) => {}
            Ok(version) => return Err(TicketError::Version(version)),
            Err(_) => return Err(TicketError::Malformed),
        }
        if crc.try_get_u32_le().ok() != Some(crc32c::crc32c(guarded)) {
            return Err(TicketError::Malformed);
        }
        let ticket = Self::take(&mut rest).ok_or(TicketError::Malformed)?;
        if rest.is_empty() { Ok(ticket) } else { Err(TicketError::Malformed) }
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        let transfer = from.try_get_u128_le().ok()?;
        let mut secret = Secret([0; 16]);
        from.try_copy_to_slice(&mut secret.0).ok()?;
        let receiver = Identity { worker: take_name(from)?, incarnation: from.try_get_u64_le().ok()? };
        let generation = from.try_get_u64_le().ok()?;
        let attempt = from.try_get_u32_le().ok()?;
        let time_to_live_ms = from.try_get_u64_le().ok()?;
        let grid = Grid {
            planes: from.try_get_u32_le().ok()?,
            plane_stride: from.try_get_u64_le().ok()?,
            cell_bytes: from.try_get_u32_le().ok()?,
        };
        let endpoints = usize::from(from.try_get_u8().ok()?);
        if !grid.is_sane() || endpoints > MAX_ENDPOINTS {
            return None;
        }
        let endpoints = (0..endpoints).map(|_| take_name(from)).collect::<Option<Vec<_>>>()?;
        let slots = take_slots(from, &grid)?;
        let meta = usize::try_from(from.try_get_u32_le().ok()?).ok()?;
        let (meta, rest) = from.split_at_checked(meta).filter(|_| meta <= MAX_META_BYTES)?;
        *from = rest;
        let meta = Bytes::copy_from_slice(meta);
        Some(Self {
            transfer,
            secret,
            receiver,
            generation,
            attempt,
            endpoints,
            grid,
            slots,
            meta,
            time_to_live_ms,
        })
    }
}

fn take_slots(from: &mut &[u8], grid: &Grid) -> Option<Vec<u32>> {
    let runs = from.try_get_u32_le().ok()?;
    let mut slots = Vec::new();
    for _ in 0..runs {
        let start = from.try_get_u32_le().ok()?;
        let len = from.try_get_u32_le().ok()?;
        let total = slots.len().checked_add(usize::try_from(len).ok()?)?;
        let end = start.checked_add(len)?;
        let cells = u64::try_from(total).ok()?.checked_mul(u64::from(grid.planes))?;
        if len == 0 || total > MAX_SLOTS || cells > MAX_CELLS || u64::from(end) > grid.slots() {
            return None;
        }
        slots.extend(start..end);
    }
    Some(slots)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ticket(slots: Vec<u32>, meta: Vec<u8>) -> Ticket {
        Ticket {
            transfer: 7,
            secret: Secret([0xAB; 16]),
            receiver: Identity { worker: "decode-0".into(), incarnation: 3 },
            generation: 9,
            attempt: 1,
            endpoints: vec!["127.0.0.1:1".into(), "[::1]:2".into()],
            grid: Grid { planes: 4, plane_stride: 1 << 20, cell_bytes: 1 << 10 },
            slots,
            meta: meta.into(),
            time_to_live_ms: 1000,
        }
    }

    #[test]
    fn the_secret_is_never_printed() {
        let text = format!("{:?}", ticket(vec![1], vec![]));
        assert!(
            text.contains("Secret(..)") && !text.contains("171") && !text.to_lowercase().contains("abab")
        );
    }

    #[test]
    fn secrets_differ_and_compare() {
        let secret = Secret::random();
        assert!(secret.matches(&secret.0));
        assert!(!secret.matches(&Secret::random().0));
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = ticket(vec![], vec![]).encode().unwrap().to_vec();
        bytes[4] = 9;
        assert!(matches!(Ticket::decode(&bytes), Err(TicketError::Version(9))));
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(slots in prop::collection::vec(0_u32..1024, 0..200), meta in prop::collection::vec(any::<u8>(), 0..50)) {
            let before = ticket(slots, meta);
            let after = Ticket::decode(&before.encode().unwrap()).unwrap();
            prop_assert_eq!(after.slots, before.slots);
            prop_assert_eq!(after.meta, before.meta);
            prop_assert_eq!(after.receiver, before.receiver);
            prop_assert_eq!(after.endpoints, before.endpoints);
            prop_assert_eq!(after.grid, before.grid);
            prop_assert!(after.secret.matches(&before.secret.0));
        }

        #[test]
        fn any_damage_is_noticed(at in any::<prop::sample::Index>(), bit in 0_u8..8, cut in any::<prop::sample::Index>()) {
            let good = ticket(vec![1, 2, 3, 9], vec![5; 9]).encode().unwrap().to_vec();
            let mut bad = good.clone();
            bad[at.index(good.len())] ^= 1 << bit;
            prop_assert!(Ticket::decode(&bad).is_err());
            prop_assert!(Ticket::decode(&good[..cut.index(good.len())]).is_err());
        }

        #[test]
        fn random_fields_with_a_good_checksum_never_panic(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = MAGIC.to_vec();
            bytes.put_u16_le(VERSION);
            bytes.extend(body);
            bytes.put_u32_le(crc32c::crc32c(&bytes));
            let _ = Ticket::decode(&bytes);
        }
    }
}
