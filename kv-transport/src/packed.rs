//! Packed cells: made as their frame is, unpacked into place when they have come whole.
//!
//! What travels has a checksum of its own. The sender compares a cell with its producer's checksum as it packs it; the receiver keeps the
//! checksum of what it unpacked, which is what lies in memory from then on.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::Instant;

use crate::incoming::{Plan, READ_BYTES};
use crate::job::QueuedCell;
use crate::landing_shared::Checked;
use crate::landing_state::LandingPhase;
use crate::packing::Packing;
use crate::push::PushShared;
use crate::serve::{Close, Connection};
use crate::transport::{Side, Transport};
use crate::wire::{CELL_BYTES, CellDescriptor, HEADER_BYTES, Header, Kind};

/// Appends a whole frame of packed cells; yields the bytes of its cells. Nothing when one lies outside the source, which was checked
/// when it was queued.
pub(crate) fn put(push: &Arc<PushShared>, seq: u32, cells: &[QueuedCell], out: &mut Vec<u8>) -> Option<u64> {
    let packing = push.packing?;
    let packed_bytes = packing.packed_bytes(push.grid.cell_bytes as usize)?;
    let payload_bytes = packed_bytes * cells.len();
    let front = out.len();
    let payload = front + HEADER_BYTES + CELL_BYTES * cells.len();
    out.resize(payload + payload_bytes, 0);
    let mut body = Vec::with_capacity(CELL_BYTES * cells.len());
    for (queued, packed) in cells.iter().zip(out.get_mut(payload..)?.chunks_exact_mut(packed_bytes)) {
        let place = push.place(queued.plane, queued.src_slot)?;
        let pack = |cell: &[u8]| {
            packing.pack(cell, packed);
            // Not what its producer made any more: it must not look good to the receiver either.
            crc32c::crc32c(packed) ^ crc32c::crc32c(cell) ^ queued.checksum
        };
        // Once the push is over the source is not read; zeros go out, and are thrown away.
        let checksum = push.reading(|| push.region.with_bytes(place, pack)).and_then(Result::ok);
        let QueuedCell { plane, index, .. } = *queued;
        CellDescriptor { plane, index, checksum: checksum.unwrap_or(0) }.put(&mut body);
    }
    let mut header = Header::bare(Kind::Packed, push.ticket.transfer, seq, packing.code());
    header.count = u16::try_from(cells.len()).ok()?;
    header.payload_bytes = u32::try_from(payload_bytes).ok()?;
    let mut head = Vec::with_capacity(payload - front);
    header.put_with_body(&body, &mut head);
    out.get_mut(front..payload)?.copy_from_slice(&head);
    push.packed_bytes.fetch_add(payload_bytes as u64, Ordering::Relaxed);
    push.link.counters.packed_bytes.add(payload_bytes as u64);
    Some(payload_bytes as u64)
}

impl Connection {
    /// A write of packed cells.
    pub(crate) async fn packed_frame(&mut self, header: Header) -> Result<(), Close> {
        let Some((landing, descriptors)) = self.cells_of(&header).await? else { return Ok(()) };
        let packing = self.receiver.config.packing.filter(|packing| packing.code() == header.arg);
        let packing = packing.ok_or(Close::Protocol("cells are packed otherwise than was agreed"))?;
        let packed_bytes = packing.packed_bytes(landing.cell_bytes).unwrap_or(0);
        if packed_bytes == 0 || header.payload_bytes as usize != descriptors.len() * packed_bytes {
            return Err(Close::Protocol("payload is not whole packed cells"));
        }
        let mut plan = self.plan(landing, &descriptors)?;
        let committed_before = plan.landing.phase() == LandingPhase::Committed;
        let mut at = 0;
        while let Some(arriving) = plan.cells.get(at) {
            if !arriving.take {
                self.discard(packed_bytes).await?;
                at += 1;
                continue;
            }
            let most = (READ_BYTES / packed_bytes).max(1);
            let count = plan.cells.iter().skip(at).take(most).take_while(|cell| cell.take).count();
            if self.read_packed(&plan, count * packed_bytes).await? {
                self.unpack(&mut plan, at..at + count, packing)?;
                at += count;
            } else {
                // Revoked meanwhile: what is left of the frame was read to where these cells end.
                at += count;
                plan.cells.iter_mut().for_each(|cell| cell.take = false);
            }
        }
        self.answer_cells(&header, &plan, committed_before);
        Ok(())
    }

    /// Reads `wanted` packed bytes. False when the landing is over: then they were thrown away.
    async fn read_packed(&mut self, plan: &Plan, wanted: usize) -> Result<bool, Close> {
        let limit = self.receiver.config.progress_timeout;
        let mut packed = std::mem::take(&mut self.packed);
        packed.resize(wanted.max(packed.len()), 0);
        let mut got = 0;
        while got < wanted {
            // As if each read were a write into the landing: it shows progress, and notices an end.
            let Some(write) = plan.landing.begin() else {
                self.packed = packed;
                self.discard(wanted - got).await?;
                return Ok(false);
            };
            let fresh = self.take_some(packed.get_mut(got..wanted).unwrap_or_default())?;
            write.finish((fresh.unwrap_or(0), Transport::Tcp, Side::Host), &[]);
            match fresh {
                Some(fresh) => {
                    got += fresh;
                    self.fairness.moved(fresh).await;
                }
                None => self.readable(Instant::now() + limit).await?,
            }
        }
        self.packed = packed;
        Ok(true)
    }

    /// What the inbox holds, or one system call's bytes; nothing when there are none now.
    fn take_some(&mut self, into: &mut [u8]) -> Result<Option<usize>, Close> {
        let buffered = self.inbox.bytes();
        let n = buffered.len().min(into.len());
        if n > 0 {
            if let (Some(to), Some(from)) = (into.get_mut(..n), buffered.get(..n)) {
                to.copy_from_slice(from);
            }
            self.inbox.consume(n);
            return Ok(Some(n));
        }
        match self.stream.try_read(into) {
            Ok(0) => Err(Close::End),
            Ok(n) => Ok(Some(n)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Some(0)),
            Err(error) => Err(error.into()),
        }
    }

    /// Unpacks cells that have come, each into its place if its checksum is right.
    fn unpack(&mut self, plan: &mut Plan, cells: Range<usize>, packing: Packing) -> Result<(), Close> {
        let Some(write) = plan.landing.begin() else { return Ok(()) };
        let packed_bytes = packing.packed_bytes(plan.cell_bytes).unwrap_or(1);
        let arriving = plan.cells.iter().enumerate().skip(cells.start).take(cells.len());
        let mut checked = Vec::with_capacity(cells.len());
        for ((at, arriving), packed) in arriving.zip(self.packed.chunks_exact(packed_bytes)) {
            let good = crc32c::crc32c(packed) == arriving.checksum;
            let place = |cell: &mut [u8]| {
                packing.unpack(packed, cell);
                crc32c::crc32c(cell)
            };
            let checksum = if good {
                self.receiver.region.with_bytes_mut(arriving.place.clone(), place)?
            } else {
                arriving.checksum
            };
            checked.push(Checked { at, cell: arriving.cell, checksum, good });
        }
        let bad = write.finish((0, Transport::Tcp, Side::Host), &checked);
        plan.bad |= bad;
        let (counters, bytes) = (&self.receiver.counters, (cells.len() * packed_bytes) as u64);
        counters.bytes.add(bytes);
        counters.packed_bytes.add(bytes);
        counters.checksum_failures.add(u64::from(bad.count_ones()));
        Ok(())
    }
}
