//! The sender's side of one connection: one task that sends frames and hears replies.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::BufMut;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use crate::error::{PushError, Refusal};
use crate::link::Link;
use crate::push::{Job, PushShared};
use crate::socket::{Fairness, INBOX_BYTES, Inbox, attempt};
use crate::wire::{CELL_BYTES, CellDescriptor, HEADER_BYTES, Header, Kind};

/// Bytes one system call sends at most.
const WRITE_BYTES: usize = 1 << 20;
/// What is sent instead of source bytes once their push is over: the rest of a frame must still be something.
static FILLER: [u8; 64 << 10] = [0; 64 << 10];
/// Sequence numbers of the frames that are not writes; all of them are answered.
const SEQ_ATTACH: u32 = u32::MAX;
const SEQ_COMMIT: u32 = u32::MAX - 1;
/// Transfers remembered as attached before the finished ones among them are forgotten.
const MAX_ATTACHED: usize = 512;

/// The deadlines of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) progress: Duration,
    pub(crate) idle: Duration,
}

/// A frame being sent: an owned head, then source cells.
struct Outgoing {
    push: Arc<PushShared>,
    head: Vec<u8>,
    places: Vec<Range<usize>>,
    sent: usize,
    total: usize,
}

pub(crate) struct Stream {
    link: Arc<Link>,
    socket: TcpStream,
    limits: Limits,
    inbox: Inbox,
    attached: HashSet<u128>,
    current: Option<Outgoing>,
    /// Frames sent whose answer is due.
    unanswered: usize,
    /// When a byte last moved in either direction.
    progress: Instant,
    fairness: Fairness,
}

impl Stream {
    pub(crate) fn new(link: Arc<Link>, socket: TcpStream, limits: Limits) -> Self {
        Self {
            link,
            socket,
            limits,
            inbox: Inbox::new(),
            attached: HashSet::new(),
            current: None,
            unanswered: 0,
            progress: Instant::now(),
            fairness: Fairness::default(),
        }
    }

    /// Runs until the link ends; a lost connection ends the link.
    pub(crate) async fn run(mut self) {
        let link = self.link.clone();
        // Also when the task is dropped with its runtime: nobody shall wait for this connection then.
        let guard = EndOfLink(&link);
        let why = match self.serve().await {
            Ok(()) => PushError::Closed,
            Err(Lost::Stalled) => PushError::Stalled,
            Err(Lost::Refused(refusal)) => PushError::Refused(refusal),
            Err(Lost::Gone) => PushError::PeerGone,
        };
        link.die(&why);
        drop(guard);
    }

    async fn serve(&mut self) -> Result<(), Lost> {
        loop {
            self.hear()?;
            let moved = self.speak()?;
            if moved > 0 {
                self.progress = Instant::now();
                self.fairness.moved(moved).await;
            } else if self.wait().await? {
                return Ok(());
            }
        }
    }

    /// Sends some of the current frame, taking the next one if there is none. 0 when nothing can be sent now.
    fn speak(&mut self) -> Result<usize, Lost> {
        if self.current.is_none() {
            let Some((push, job)) = self.link.take() else {
                return Ok(0);
            };
            self.current = self.frame(push, job);
        }
        let Some(frame) = &mut self.current else {
            return Ok(0);
        };
        let Some(n) = frame.send(&self.socket)? else {
            return Ok(0);
        };
        frame.sent += n;
        if frame.sent == frame.total {
            self.link.counters.bytes.add(frame.places.iter().map(|place| place.len() as u64).sum());
            self.current = None;
        }
        Ok(n)
    }

    fn frame(&mut self, push: Arc<PushShared>, job: Job) -> Option<Outgoing> {
        let transfer = push.ticket.transfer;
        let (mut head, mut places) = (Vec::new(), Vec::new());
        if self.attached.len() >= MAX_ATTACHED {
            self.attached.retain(|transfer| self.link.knows(*transfer));
        }
        // An attach that was asked for is always said: its answer tells whether the ticket still stands.
        if self.attached.insert(transfer) || matches!(job, Job::Attach) {
            let mut body = Vec::with_capacity(crate::wire::ATTACH_BYTES);
            body.put_slice(&push.ticket.secret.0);
            body.put_u64_le(push.ticket.generation);
            body.put_u32_le(push.ticket.attempt);
            Header::bare(Kind::Attach, transfer, SEQ_ATTACH, 0).put_with_body(&body, &mut head);
            self.unanswered += 1;
        }
        match job {
            Job::Attach => {}
            Job::Write { seq, cells } => {
                let mut body = Vec::with_capacity(cells.len() * CELL_BYTES);
                for cell in &cells {
                    let place = push.place(cell.plane, cell.src_slot)?;
                    CellDescriptor { plane: cell.plane, index: cell.index, checksum: cell.checksum }
                        .put(&mut body);
                    places.push(place);
                }
                let mut header = Header::bare(Kind::Write, transfer, seq, 0);
                header.count = u16::try_from(cells.len()).ok()?;
                header.payload_bytes = u32::try_from(places.iter().map(Range::len).sum::<usize>()).ok()?;
                header.put_with_body(&body, &mut head);
                self.unanswered += 1;
            }
            Job::Commit(payload) => {
                Header::bare(Kind::Commit, transfer, SEQ_COMMIT, 0).put_with_body(&payload, &mut head);
                self.unanswered += 1;
            }
            Job::Abort(reason) => {
                Header::bare(Kind::Abort, transfer, 0, 0).put_with_body(reason.as_bytes(), &mut head);
            }
        }
        let total = head.len() + places.iter().map(Range::len).sum::<usize>();
        Some(Outgoing { push, head, places, sent: 0, total })
    }

    /// Reads and handles the replies that are there.
    fn hear(&mut self) -> Result<(), Lost> {
        loop {
            while let Some(bytes) = self.inbox.bytes().first_chunk::<HEADER_BYTES>() {
                let header = Header::parse(bytes)
                    .filter(Header::is_bounded)
                    .ok_or(Lost::Refused(Refusal::Protocol))?;
                self.inbox.consume(HEADER_BYTES);
                self.progress = Instant::now();
                self.reply(&header)?;
            }
            match self.socket.try_read(self.inbox.space(INBOX_BYTES / 2)) {
                Ok(0) => return Err(Lost::Gone),
                Ok(n) => self.inbox.filled(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Lost::Gone),
            }
        }
    }

    fn reply(&mut self, header: &Header) -> Result<(), Lost> {
        if header.seq != 0 {
            self.unanswered = self.unanswered.saturating_sub(1);
        }
        if header.transfer == 0 && header.kind == Kind::Refused {
            return Err(Lost::Refused(Refusal::from_code(header.arg)));
        }
        // Unknown here: the push is over already.
        let Some(push) = self.link.push(header.transfer) else {
            return Ok(());
        };
        match header.kind {
            Kind::Attached => push.update(|inner| inner.state.attached()),
            Kind::Ack => push.update(|inner| {
                let before = inner.state.refetched();
                inner.state.acked(header.seq, header.arg);
                self.link.counters.refetched_cells.add(inner.state.refetched() - before);
            }),
            Kind::CommitAck => push.update(|inner| inner.state.commit_acked()),
            Kind::Refused => push.fail(match Refusal::from_code(header.arg) {
                Refusal::Corrupt => PushError::Corrupt,
                refusal => PushError::Refused(refusal),
            }),
            _ => return Err(Lost::Refused(Refusal::Protocol)),
        }
        Ok(())
    }

    /// Waits for something to do; true when the link ends.
    async fn wait(&mut self) -> Result<bool, Lost> {
        let sending = self.current.is_some();
        let interest = if sending { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        let busy = sending || self.unanswered > 0;
        let until =
            if busy { self.progress + self.limits.progress } else { Instant::now() + self.limits.idle };
        tokio::select! {
            biased;
            () = self.link.stop.cancelled() => Ok(true),
            ready = self.socket.ready(interest) => ready.map(|_| false).map_err(|_| Lost::Gone),
            () = self.link.work.notified(), if !sending => {
                if !busy {
                    self.progress = Instant::now();
                }
                Ok(false)
            }
            () = sleep_until(until) => if busy { Err(Lost::Stalled) } else { Ok(self.link.close_if_idle()) },
        }
    }
}

impl Outgoing {
    /// Sends what the socket takes in one call; nothing when it takes none.
    fn send(&self, socket: &TcpStream) -> Result<Option<usize>, Lost> {
        let head = self.head.get(self.sent.min(self.head.len())..).unwrap_or_default();
        let source = |region: &crate::Region| {
            attempt(socket, Interest::WRITABLE, |fd| region.write_to(fd, head, self.rest()))
        };
        let sent = match self.push.reading(source) {
            Some(sent) => sent,
            None if !head.is_empty() => attempt(socket, Interest::WRITABLE, |fd| {
                self.push.region.write_to(fd, head, std::iter::empty())
            }),
            None => {
                let filler = FILLER.get(..(self.total - self.sent).min(FILLER.len())).unwrap_or_default();
                attempt(socket, Interest::WRITABLE, |fd| {
                    self.push.region.write_to(fd, filler, std::iter::empty())
                })
            }
        };
        sent.map_err(|_| Lost::Gone)
    }

    /// The cells, or parts of them, that were not sent yet; at most [`WRITE_BYTES`] of them.
    fn rest(&self) -> impl Iterator<Item = Range<usize>> {
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

/// Why a connection was lost.
#[derive(Debug)]
enum Lost {
    Gone,
    Stalled,
    Refused(Refusal),
}

struct EndOfLink<'a>(&'a Link);

impl Drop for EndOfLink<'_> {
    fn drop(&mut self) {
        self.0.die(&PushError::PeerGone);
    }
}
