//! What two ends tell each other about their queue pairs.

use bytes::{Buf, BufMut};

/// A queue pair's address, as the sender offers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) gid: [u8; 16],
    pub(crate) lid: u16,
    pub(crate) number: u32,
    pub(crate) psn: u32,
    pub(crate) mtu_bytes: u32,
    pub(crate) ethernet: bool,
}

/// The receiver's queue pair, and where its pool lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) pair: Offer,
    /// Address of the pool's first byte.
    pub(crate) base: u64,
    /// Announcements it has room for.
    pub(crate) depth: u16,
}

impl Offer {
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        out.put_slice(&self.gid);
        out.put_u16_le(self.lid);
        out.put_u32_le(self.number);
        out.put_u32_le(self.psn);
        out.put_u32_le(self.mtu_bytes);
        out.put_u8(u8::from(self.ethernet));
    }

    pub(crate) fn take(from: &mut &[u8]) -> Option<Self> {
        let mut gid = [0; 16];
        from.try_copy_to_slice(&mut gid).ok()?;
        Some(Self {
            gid,
            lid: from.try_get_u16_le().ok()?,
            number: from.try_get_u32_le().ok()?,
            psn: from.try_get_u32_le().ok()?,
            mtu_bytes: from.try_get_u32_le().ok()?,
            ethernet: from.try_get_u8().ok()? == 1,
        })
    }
}

impl Answer {
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        self.pair.put(out);
        out.put_u64_le(self.base);
        out.put_u16_le(self.depth);
    }

    pub(crate) fn take(from: &mut &[u8]) -> Option<Self> {
        let pair = Offer::take(from)?;
        Some(Self { pair, base: from.try_get_u64_le().ok()?, depth: from.try_get_u16_le().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        let pair = Offer { gid: [7; 16], lid: 3, number: 17, psn: 99, mtu_bytes: 4096, ethernet: true };
        let answer = Answer { pair, base: 1 << 40, depth: 64 };
        let mut bytes = Vec::new();
        answer.put(&mut bytes);
        assert_eq!(bytes.len(), 41);
        assert_eq!(Answer::take(&mut bytes.as_slice()), Some(answer));
        assert_eq!(Answer::take(&mut bytes[..40].as_ref()), None);
    }
}
