//! The frames of a connection that carry no cells: attach, commit, abort.

use std::sync::{Arc, Weak};

use bytes::{Buf, Bytes};

use crate::error::Refusal;
use crate::fence::Fence;
use crate::landing_state::LandingEnd;
use crate::packing::Packing;
use crate::receiver::Known;
use crate::serve::{Close, Connection};
use crate::wire::{self, Header, Kind};

impl Connection {
    /// Shows the secret of a transfer.
    pub(crate) async fn attach_frame(&mut self, header: Header) -> Result<(), Close> {
        let body = self.need(wire::ATTACH_BYTES, self.receiver.config.progress_timeout).await?;
        let mut body = body.first_chunk::<{ wire::ATTACH_BYTES }>().copied().ok_or(Close::End)?.to_vec();
        self.inbox.consume(wire::ATTACH_BYTES);
        if crc32c::crc32c(&body) != header.body_crc {
            return Err(Close::Protocol("damaged attach"));
        }
        let mut fields = body.as_slice();
        let mut secret = [0; 16];
        fields.copy_to_slice(&mut secret);
        let (generation, attempt) = (fields.get_u64_le(), fields.get_u32_le());
        let outcome = self.accepts(header.arg);
        let outcome = outcome.and_then(|()| self.attach(header.transfer, &secret, generation, attempt));
        // The secret leaves no copy behind.
        body.fill(0);
        secret.fill(0);
        match outcome {
            Ok(()) => {
                self.reply(Kind::Attached, header.transfer, header.seq, 0);
                self.give_key(header.transfer);
            }
            Err(refusal) => self.reply(Kind::Refused, header.transfer, header.seq, refusal as u64),
        }
        Ok(())
    }

    /// Whether cells may come packed so; 0 says that they are not.
    fn accepts(&self, packing: u64) -> Result<(), Refusal> {
        let ours = self.receiver.config.packing.map(Packing::code);
        if packing == 0 || ours == Some(packing) { Ok(()) } else { Err(Refusal::Packing) }
    }

    fn attach(
        &mut self,
        transfer: u128,
        secret: &[u8; 16],
        generation: u64,
        attempt: u32,
    ) -> Result<(), Refusal> {
        let counters = &self.receiver.counters;
        let landing = match self.receiver.known(transfer) {
            Known::Live(landing) => landing,
            Known::Ended(refusal) => {
                counters.stale_refused.add(1);
                return Err(refusal);
            }
            Known::Never => {
                counters.stale_refused.add(1);
                return Err(Refusal::Unknown);
            }
        };
        if !landing.secret.matches(secret) {
            counters.forged_refused.add(1);
            return Err(Refusal::Forged);
        }
        if landing.meant_for.as_ref().is_some_and(|sender| *sender != self.peer.worker) {
            counters.misused_refused.add(1);
            tracing::warn!(peer = %self.peer.worker, meant_for = landing.meant_for, "a ticket was shown by another worker");
            return Err(Refusal::Misused);
        }
        let incarnation = self.receiver.identity.incarnation;
        let shown = Fence { incarnation, generation, attempt };
        if !landing.fence(incarnation).admits(&shown) {
            counters.stale_refused.add(1);
            return Err(Refusal::Stale);
        }
        if self.attached.contains_key(&transfer) {
            return landing.refusal().map_or(Ok(()), Err);
        }
        if self.attached.len() >= self.receiver.config.max_attached {
            self.attached.retain(|_, landing| landing.strong_count() > 0);
            if self.attached.len() >= self.receiver.config.max_attached {
                return Err(Refusal::Busy);
            }
        }
        landing.attach(&self.peer, self.notify.clone())?;
        self.attached.insert(transfer, Arc::downgrade(&landing));
        Ok(())
    }

    /// The sender is done.
    pub(crate) async fn commit_frame(&mut self, header: Header) -> Result<(), Close> {
        let known = self.attached.get(&header.transfer).map(Weak::upgrade);
        let payload = self.body(header, known.is_some()).await?;
        let committed = match &known {
            Some(Some(landing)) => landing.commit(payload),
            // Ended and let go of. A stale answer means it was committed: the acknowledgement may be repeated.
            Some(None) => self.is_committed(header.transfer),
            None => false,
        };
        if committed {
            self.reply(Kind::CommitAck, header.transfer, header.seq, 0);
        } else if let Some(refusal) = self.refusal(header.transfer) {
            self.reply(Kind::Refused, header.transfer, header.seq, refusal as u64);
        } else {
            // Cells are on their way still, or keys must be taken back first.
            self.commits.retain(|(transfer, _)| *transfer != header.transfer);
            self.commits.push((header.transfer, header.seq));
        }
        Ok(())
    }

    /// Whether a transfer that is not live any more was committed.
    pub(crate) fn is_committed(&self, transfer: u128) -> bool {
        matches!(self.receiver.known(transfer), Known::Ended(Refusal::Stale))
    }

    /// The sender gives up.
    pub(crate) async fn abort_frame(&mut self, header: Header) -> Result<(), Close> {
        let reason = self.body(header, true).await?;
        if let Some(landing) = self.attached.get(&header.transfer).and_then(Weak::upgrade) {
            landing.revoke(LandingEnd::Aborted, &String::from_utf8_lossy(&reason));
        }
        Ok(())
    }

    /// Reads a body that is not about cells; memory grows with what arrives, and only if `keep`.
    pub(crate) async fn body(&mut self, header: Header, keep: bool) -> Result<Bytes, Close> {
        let (mut left, mut body) = (header.body_bytes as usize, Vec::new());
        while left > 0 {
            let limit = self.receiver.config.progress_timeout;
            let got = self.need(1, limit).await?;
            let n = got.len().min(left);
            if keep {
                body.extend_from_slice(got.get(..n).unwrap_or_default());
            }
            self.inbox.consume(n);
            left -= n;
        }
        if keep && crc32c::crc32c(&body) != header.body_crc {
            return Err(Close::Protocol("damaged body"));
        }
        Ok(body.into())
    }

    /// Why frames of a transfer are refused, if they are.
    pub(crate) fn refusal(&self, transfer: u128) -> Option<Refusal> {
        match self.attached.get(&transfer).map(Weak::upgrade) {
            Some(Some(landing)) => landing.refusal(),
            Some(None) => match self.receiver.known(transfer) {
                Known::Ended(refusal) => Some(refusal),
                _ => Some(Refusal::Unknown),
            },
            None => Some(Refusal::Unknown),
        }
    }
}
