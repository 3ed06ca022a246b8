//! A frame on its way out: an owned head, then cells read straight from the source, then perhaps the commit.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::job::{Job, QueuedCell};
use crate::packed;
use crate::packing::Packing;
use crate::push::{PushShared, SEQ_ATTACH, SEQ_COMMIT};
use crate::socket::Socket;
use crate::transport::Transport;
use crate::wire::{ATTACH_BYTES, CellDescriptor, Header, Kind, LENT_CELL_BYTES, LentCell};
use bytes::BufMut;

/// Bytes one system call sends at most.
const WRITE_BYTES: usize = 1 << 20;
/// What is sent instead of source bytes once their push is over: the rest of a frame must still be something.
static FILLER: [u8; 64 << 10] = [0; 64 << 10];
/// A frame being sent.
pub(crate) struct Outgoing {
    push: Arc<PushShared>,
    head: Vec<u8>,
    places: Vec<Range<usize>>,
    /// A commit behind the cells.
    tail: Vec<u8>,
    sent: usize,
    total: usize,
    /// Bytes of its cells, as they go.
    pub(crate) bytes: u64,
    way: Transport,
    /// Answers the receiver owes for it.
    pub(crate) answers: usize,
}

impl Outgoing {
    /// The frame of a job, behind an attach if this connection has not shown the ticket yet. Nothing when a cell
    /// lies outside the source, which was checked when it was queued. Cells are sent, or only named when the source is lent.
    pub(crate) fn new(
        push: Arc<PushShared>,
        job: Job,
        attach: bool,
        lent: Option<Transport>,
    ) -> Option<Self> {
        let transfer = push.ticket.transfer;
        let (mut head, mut places, mut tail) = (Vec::new(), Vec::new(), Vec::new());
        let (mut answers, mut bytes) = (0, 0);
        if attach {
            let mut body = Vec::with_capacity(ATTACH_BYTES);
            body.put_slice(&push.ticket.secret.0);
            body.put_u64_le(push.ticket.generation);
            body.put_u32_le(push.ticket.attempt);
            let packing = push.packing.map_or(0, Packing::code);
            Header::bare(Kind::Attach, transfer, push.number(SEQ_ATTACH), packing)
                .put_with_body(&body, &mut head);
            answers += 1;
        }
        let commit = match job {
            Job::Attach => None,
            Job::Write { seq, cells, commit } if lent.is_none() && push.packing.is_some() => {
                bytes = packed::put(&push, push.number(seq), &cells, &mut head)?;
                answers += 1;
                commit
            }
            Job::Write { seq, cells, commit } => {
                let mut body = Vec::with_capacity(cells.len() * LENT_CELL_BYTES);
                for queued in &cells {
                    let place = push.place(queued.plane, queued.src_slot)?;
                    bytes += place.len() as u64;
                    let QueuedCell { plane, index, checksum, .. } = *queued;
                    let cell = CellDescriptor { plane, index, checksum };
                    if lent.is_some() {
                        LentCell { cell, offset: place.start as u64 }.put(&mut body);
                    } else {
                        cell.put(&mut body);
                        places.push(place);
                    }
                }
                let kind = if lent.is_some() { Kind::Lent } else { Kind::Write };
                let mut header = Header::bare(kind, transfer, push.number(seq), 0);
                header.count = u16::try_from(cells.len()).ok()?;
                header.payload_bytes = u32::try_from(places.iter().map(Range::len).sum::<usize>()).ok()?;
                header.put_with_body(&body, &mut head);
                answers += 1;
                commit
            }
            Job::Commit(payload) => Some(payload),
            Job::Abort(reason) => {
                Header::bare(Kind::Abort, transfer, 0, 0).put_with_body(reason.as_bytes(), &mut head);
                None
            }
        };
        if let Some(payload) = commit {
            Header::bare(Kind::Commit, transfer, push.number(SEQ_COMMIT), 0)
                .put_with_body(&payload, &mut tail);
            answers += 1;
        }
        if places.is_empty() {
            // Nothing between: one system call for both.
            head.append(&mut tail);
        }
        let total = head.len() + places.iter().map(Range::len).sum::<usize>() + tail.len();
        let way = lent.unwrap_or(Transport::Tcp);
        Some(Self { push, head, places, tail, sent: 0, total, bytes, way, answers })
    }

    /// Whether all of it is with the kernel.
    pub(crate) fn is_sent(&self) -> bool {
        self.sent == self.total
    }

    /// Sends what the socket takes in one call; nothing when it takes none. Once the push is over the source is
    /// not read any more, but what was begun must be completed: with zeros, which fail their checksum.
    pub(crate) fn send(&mut self, socket: &mut Socket) -> io::Result<Option<usize>> {
        let head = self.head.get(self.sent.min(self.head.len())..).unwrap_or_default();
        let region = &self.push.region;
        let cells_end = self.total - self.tail.len();
        if self.sent >= cells_end && !self.tail.is_empty() {
            let tail = self.tail.get(self.sent - cells_end..).unwrap_or_default();
            let sent = socket.write(region, tail, std::iter::empty())?;
            self.sent += sent.unwrap_or(0);
            return Ok(sent);
        }
        let sent = match self.push.reading(|| socket.write(region, head, self.rest())) {
            Some(sent) => sent?,
            None => {
                let filler = FILLER.get(..(cells_end - self.sent).min(FILLER.len())).unwrap_or_default();
                let bytes = if head.is_empty() { filler } else { head };
                socket.write(region, bytes, std::iter::empty())?
            }
        };
        self.sent += sent.unwrap_or(0);
        if self.bytes > 0 {
            self.push.used.add(self.way);
        }
        Ok(sent)
    }

    /// The cells, or parts of them, that were not sent yet; at most [`WRITE_BYTES`] of them.
    fn rest(&self) -> impl Iterator<Item = Range<usize>> + Clone {
        let mut skip = self.sent.saturating_sub(self.head.len());
        let mut room = WRITE_BYTES;
        self.places.iter().filter_map(move |place| {
            let start = place.start + skip.min(place.len());
            skip -= start - place.start;
            let end = place.end.min(start + room);
            room -= end - start;
            (start < end).then_some(start..end)
        })
    }
}
