//! Cells on their way in: straight from the socket into place, verified as they complete.

use std::ops::Range;
use std::sync::{Arc, Weak};

use tokio::time::Instant;

use crate::error::Refusal;
use crate::landing_shared::{Checked, LandingShared};
use crate::landing_state::{Claim, LandingPhase};
use crate::serve::{Close, Connection};
use crate::transport::{Side, Transport};
use crate::wire::{CELL_BYTES, CellDescriptor, HEADER_BYTES, Header, Kind, MAX_FRAME_CELLS};

/// Bytes one system call moves into place at most: small enough that the checksum finds them in the cache.
pub(crate) const READ_BYTES: usize = 256 << 10;
/// Bytes of a discard buffer.
const DISCARD_BYTES: usize = 64 << 10;
/// What may follow a frame's payload and is read along with it: the next header and its descriptors.
const TAIL_BYTES: usize = HEADER_BYTES + MAX_FRAME_CELLS * CELL_BYTES;

/// A cell of the frame being read.
pub(crate) struct Arriving {
    pub(crate) cell: usize,
    pub(crate) place: Range<usize>,
    pub(crate) checksum: u32,
    pub(crate) take: bool,
}

/// How far a frame's payload was read.
#[derive(Default)]
struct Cursor {
    /// The cell being read.
    at: usize,
    /// Bytes of it that were read.
    done: usize,
    /// CRC-32C of those bytes.
    sum: u32,
}

/// What is done with a frame's payload.
pub(crate) struct Plan {
    pub(crate) landing: Arc<LandingShared>,
    pub(crate) cells: Vec<Arriving>,
    pub(crate) cell_bytes: usize,
    /// Cells to be sent again.
    pub(crate) bad: u64,
}

impl Connection {
    /// A write: places, verifies and acknowledges its cells, or throws them away and says why.
    pub(crate) async fn write_frame(&mut self, header: Header) -> Result<(), Close> {
        let Some((landing, descriptors)) = self.cells_of(&header).await? else { return Ok(()) };
        if header.payload_bytes as usize != descriptors.len() * landing.cell_bytes {
            return Err(Close::Protocol("payload is not whole cells"));
        }
        let mut plan = self.plan(landing, &descriptors)?;
        let committed_before = plan.landing.phase() == LandingPhase::Committed;
        self.take_payload(&mut plan).await?;
        self.answer_cells(&header, &plan, committed_before);
        Ok(())
    }

    /// The cells of a write and the landing that they are for; nothing when the frame was thrown away and answered.
    pub(crate) async fn cells_of(
        &mut self,
        header: &Header,
    ) -> Result<Option<(Arc<LandingShared>, Vec<CellDescriptor>)>, Close> {
        let body_bytes = header.body_bytes as usize;
        let limit = self.receiver.config.progress_timeout;
        let body = self.need(body_bytes, limit).await?.get(..body_bytes).unwrap_or_default();
        let intact = crc32c::crc32c(body) == header.body_crc;
        let descriptors: Vec<_> = CellDescriptor::parse_all(body).collect();
        self.inbox.consume(body_bytes);
        match self.landing_of(header, intact) {
            Ok(landing) => Ok(Some((landing, descriptors))),
            Err((kind, arg)) => {
                self.discard(header.payload_bytes as usize).await?;
                self.reply(kind, header.transfer, header.seq, arg);
                Ok(None)
            }
        }
    }

    /// The landing that a frame of cells is for, or the reply that it gets instead.
    pub(crate) fn landing_of(
        &self,
        header: &Header,
        is_intact: bool,
    ) -> Result<Arc<LandingShared>, (Kind, u64)> {
        let landing = self.attached.get(&header.transfer).and_then(Weak::upgrade);
        let Some(landing) = landing.filter(|_| is_intact) else {
            return Err(match self.refusal(header.transfer) {
                Some(refusal) => (Kind::Refused, refusal as u64),
                None => (Kind::Ack, all(usize::from(header.count))),
            });
        };
        if self.receiver.config.require_rdma {
            return Err((Kind::Refused, Refusal::Downgrade as u64));
        }
        landing.check_time(Instant::now());
        Ok(landing)
    }

    /// Answers a frame of cells that were taken.
    pub(crate) fn answer_cells(&mut self, header: &Header, plan: &Plan, committed_before: bool) {
        match plan.landing.refusal() {
            Some(refusal) => self.reply(Kind::Refused, header.transfer, header.seq, refusal as u64),
            None => self.reply(Kind::Ack, header.transfer, header.seq, plan.bad),
        }
        if !committed_before && plan.landing.phase() == LandingPhase::Committed {
            // The commit came before the last cell.
            self.reply(Kind::CommitAck, header.transfer, 0, 0);
        }
    }

    /// Claims the cells of a frame.
    pub(crate) fn plan(
        &self,
        landing: Arc<LandingShared>,
        descriptors: &[CellDescriptor],
    ) -> Result<Plan, Close> {
        let cell_bytes = landing.cell_bytes;
        let placed: Option<Vec<_>> =
            descriptors.iter().map(|d| landing.place(&self.receiver, d.plane, d.index)).collect();
        let placed = placed.ok_or(Close::Protocol("a cell outside the ticket"))?;
        let (mut bad, mut duplicates) = (0, 0);
        let cells = landing.claim(|state| {
            let mut cells = Vec::with_capacity(placed.len());
            for (at, ((cell, place), descriptor)) in placed.into_iter().zip(descriptors).enumerate() {
                let claim = state.claim(cell);
                duplicates += u64::from(claim == Claim::Duplicate);
                bad |= u64::from(claim == Claim::Busy) << at;
                cells.push(Arriving {
                    cell,
                    place,
                    checksum: descriptor.checksum,
                    take: claim == Claim::Granted,
                });
            }
            cells
        });
        self.receiver.counters.duplicate_cells.add(duplicates);
        Ok(Plan { landing, cells, cell_bytes, bad })
    }

    /// Reads the payload of a frame, each cell into its place or away.
    async fn take_payload(&mut self, plan: &mut Plan) -> Result<(), Close> {
        let mut cursor = Cursor::default();
        let limit = self.receiver.config.progress_timeout;
        while let Some(arriving) = plan.cells.get(cursor.at) {
            if !arriving.take {
                self.discard(plan.cell_bytes - cursor.done).await?;
                cursor = Cursor { at: cursor.at + 1, ..Cursor::default() };
                continue;
            }
            match self.place_some(plan, &mut cursor)? {
                Placed::Some(bytes) => self.fairness.moved(bytes).await,
                Placed::Nothing => self.readable(Instant::now() + limit).await?,
                // Revoked meanwhile: what is left of the frame goes the other way.
                Placed::Over => plan.cells.iter_mut().for_each(|cell| cell.take = false),
            }
        }
        Ok(())
    }

    /// One write into place: what the inbox holds, or one system call. The landing cannot let go of the memory
    /// while it runs, and it does not run once the landing is over.
    fn place_some(&mut self, plan: &mut Plan, cursor: &mut Cursor) -> Result<Placed, Close> {
        let Some(write) = plan.landing.begin() else {
            return Ok(Placed::Over);
        };
        let run = plan.run(cursor);
        let wanted: usize = run.iter().map(Range::len).sum();
        let region = &self.receiver.region;
        let buffered = self.inbox.bytes();
        let got = if buffered.is_empty() {
            // Only behind the frame's last cell does the next frame begin.
            let ends = wanted == plan.left(cursor);
            let tail = if ends { TAIL_BYTES } else { 0 };
            let space = self.inbox.space(tail);
            match self.stream.read_into(region, run.iter().cloned(), space)? {
                None => return Ok(Placed::Nothing),
                Some(0) => return Err(Close::End),
                Some(n) => {
                    self.inbox.filled(n.saturating_sub(wanted));
                    n.min(wanted)
                }
            }
        } else {
            let mut copied = 0;
            for place in &run {
                let rest = buffered.get(copied..).unwrap_or_default();
                let n = rest.len().min(place.len());
                region.copy_in(place.start, rest.get(..n).unwrap_or_default())?;
                copied += n;
            }
            self.inbox.consume(copied);
            copied
        };
        let mut checked = Vec::with_capacity(run.len());
        let mut fresh = got;
        for (place, cell) in run.iter().zip(plan.cells.iter().skip(cursor.at)) {
            let step = place.len().min(fresh);
            fresh -= step;
            cursor.sum = region.checksum(cursor.sum, place.start..place.start + step)?;
            cursor.done += step;
            if cursor.done < plan.cell_bytes {
                break;
            }
            let good = cursor.sum == cell.checksum;
            checked.push(Checked { at: cursor.at, cell: cell.cell, checksum: cell.checksum, good });
            *cursor = Cursor { at: cursor.at + 1, ..Cursor::default() };
        }
        let bad = write.finish((got, Transport::Tcp, Side::Host), &checked);
        plan.bad |= bad;
        self.receiver.counters.bytes.add(got as u64);
        self.receiver.counters.checksum_failures.add(u64::from(bad.count_ones()));
        Ok(Placed::Some(got))
    }

    /// Reads bytes and throws them away.
    pub(crate) async fn discard(&mut self, mut left: usize) -> Result<(), Close> {
        let limit = self.receiver.config.progress_timeout;
        self.receiver.counters.discarded_bytes.add(left as u64);
        while left > 0 {
            let buffered = self.inbox.bytes().len().min(left);
            if buffered > 0 {
                self.inbox.consume(buffered);
                left -= buffered;
                continue;
            }
            if self.discard.is_empty() {
                self.discard = vec![0; DISCARD_BYTES].into_boxed_slice();
            }
            let most = left.min(self.discard.len());
            match self.stream.try_read(self.discard.get_mut(..most).unwrap_or_default()) {
                Ok(0) => return Err(Close::End),
                Ok(n) => {
                    left -= n;
                    self.fairness.moved(n).await;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    self.readable(Instant::now() + limit).await?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

enum Placed {
    /// So many bytes are in place.
    Some(usize),
    /// The socket has none now.
    Nothing,
    /// The landing is over.
    Over,
}

impl Plan {
    /// Bytes of the frame's payload that were not read yet.
    fn left(&self, cursor: &Cursor) -> usize {
        (self.cells.len() - cursor.at) * self.cell_bytes - cursor.done
    }

    /// Where the next bytes go: what is left of the current cell and the cells after it that are taken too.
    fn run(&self, cursor: &Cursor) -> Vec<Range<usize>> {
        let (mut run, mut bytes) = (Vec::with_capacity(self.cells.len()), 0);
        for (i, cell) in self.cells.iter().skip(cursor.at).enumerate() {
            if !cell.take || bytes >= READ_BYTES {
                break;
            }
            let start = if i == 0 { cell.place.start + cursor.done } else { cell.place.start };
            let end = cell.place.end.min(start + (READ_BYTES - bytes));
            run.push(start..end);
            bytes += end - start;
        }
        run
    }
}

/// A mask of `count` cells.
fn all(count: usize) -> u64 {
    u64::MAX >> (64 - count.clamp(1, 64))
}
