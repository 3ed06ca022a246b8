//! Frames of cells on a queue pair: their transfer's key, the writes they become, and the announcement behind them.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::{FRAME_REQUESTS, Lane, State};
use crate::job::QueuedCell;
use crate::push::PushShared;
use crate::transport::Transport;
use crate::verbs::{PairBroken, WriteTo};
use crate::wire::{CELL_BYTES, CellDescriptor, Header, Kind};

/// A frame that waits for its transfer's key.
pub(super) struct Parked {
    pub(super) push: Arc<PushShared>,
    pub(super) seq: u32,
    pub(super) cells: Vec<QueuedCell>,
}

pub(super) struct Grant {
    pub(super) push: Arc<PushShared>,
    pub(super) key: Option<u32>,
}

/// What became of a frame.
pub(crate) enum Sent {
    /// So many bytes are on their way.
    Bytes(usize),
    /// It waits for its transfer's key, which must be asked for by an attach.
    AskForKey(Arc<PushShared>),
    /// It waits for its transfer's key, which was asked for.
    Parked,
}

impl Lane {
    /// The peer gave a key to write.
    pub(crate) fn granted(&mut self, transfer: u128, key: u64) -> Result<(), PairBroken> {
        if let Some(grant) = self.grants.get_mut(&transfer) {
            grant.key = u32::try_from(key).ok();
        }
        let (now, later) = self.parked.drain(..).partition(|parked| parked.push.ticket.transfer == transfer);
        self.parked = later;
        let mut now: VecDeque<Parked> = now;
        while let Some(Parked { push, seq, cells }) = now.pop_front() {
            let fits = matches!(&self.state, State::Up(up) if up.pair.room() >= FRAME_REQUESTS && !up.free.is_empty());
            if !fits {
                // Tried again with the next completion.
                self.parked.push_back(Parked { push, seq, cells });
                continue;
            }
            self.write(push, seq, cells)?;
        }
        Ok(())
    }

    /// A frame of cells: posted, or parked until its transfer has a key.
    pub(crate) fn write(
        &mut self,
        push: Arc<PushShared>,
        seq: u32,
        cells: Vec<QueuedCell>,
    ) -> Result<Sent, PairBroken> {
        let transfer = push.ticket.transfer;
        self.unanswered.insert((transfer, push.number(seq)), push.clone());
        let key = match self.grants.get(&transfer) {
            Some(grant) => grant.key,
            None => {
                self.grants.insert(transfer, Grant { push: push.clone(), key: None });
                self.parked.push_back(Parked { push: push.clone(), seq, cells });
                return Ok(Sent::AskForKey(push));
            }
        };
        let (Some(key), State::Up(up)) = (key, &mut self.state) else {
            self.parked.push_back(Parked { push, seq, cells });
            return Ok(Sent::Parked);
        };
        let Some(writes) = plan(&push, &cells, up.base, up.pair.max_pieces()) else {
            return Err(PairBroken("a cell outside the peer's pool".into()));
        };
        if !push.begin_read() {
            // Over meanwhile: nothing of it is sent, and nobody waits for the answer.
            self.unanswered.remove(&(transfer, push.number(seq)));
            return Ok(Sent::Parked);
        }
        let Some(buffer) = up.free.pop() else {
            push.end_read();
            return Err(PairBroken("no announcement buffer is free".into()));
        };
        let announcement = announce(transfer, push.number(seq), &cells);
        let bytes = writes.iter().flat_map(|w| &w.pieces).map(Range::len).sum();
        push.used.add(Transport::Rdma);
        up.reading.insert(buffer, push);
        up.pair.write_and_announce(&writes, key, &announcement, buffer)?;
        self.link.counters.bytes.add(bytes as u64);
        self.link.counters.rdma_bytes.add(bytes as u64);
        Ok(Sent::Bytes(bytes))
    }

    /// Frames that have a key and waited for room only.
    pub(super) fn unpark(&mut self) -> Result<(), PairBroken> {
        let ready = |parked: &Parked| {
            let transfer = parked.push.ticket.transfer;
            self.grants.get(&transfer).filter(|grant| grant.key.is_some()).map(|_| transfer)
        };
        if let Some(transfer) = self.parked.iter().find_map(ready)
            && let Some(key) = self.grants.get(&transfer).and_then(|grant| grant.key)
        {
            self.granted(transfer, u64::from(key))?;
        }
        Ok(())
    }
}

/// The writes of a frame: cells that follow each other at the peer become one, with as many pieces as the device takes.
fn plan(push: &PushShared, cells: &[QueuedCell], base: u64, max_pieces: usize) -> Option<Vec<WriteTo>> {
    let mut writes: Vec<WriteTo> = Vec::with_capacity(cells.len());
    let mut end = None;
    for cell in cells {
        let slot = *push.ticket.slots.get(cell.index as usize)?;
        let target = push.ticket.grid.cell(cell.plane, slot)?;
        let source = push.place(cell.plane, cell.src_slot)?;
        let remote = base.checked_add(target.start as u64)?;
        let follows = end == Some(remote);
        end = Some(base.checked_add(target.end as u64)?);
        match writes.last_mut().filter(|_| follows) {
            Some(write) if write.pieces.last().is_some_and(|last| last.end == source.start) => {
                write.pieces.last_mut().into_iter().for_each(|last| last.end = source.end);
            }
            Some(write) if write.pieces.len() < max_pieces => write.pieces.push(source),
            _ => writes.push(WriteTo { remote, pieces: vec![source] }),
        }
    }
    Some(writes)
}

fn announce(transfer: u128, seq: u32, cells: &[QueuedCell]) -> Vec<u8> {
    let mut body = Vec::with_capacity(cells.len() * CELL_BYTES);
    for cell in cells {
        CellDescriptor { plane: cell.plane, index: cell.index, checksum: cell.checksum }.put(&mut body);
    }
    let mut header = Header::bare(Kind::Placed, transfer, seq, 0);
    header.count = u16::try_from(cells.len()).unwrap_or(u16::MAX);
    let mut out = Vec::new();
    header.put_with_body(&body, &mut out);
    out
}
