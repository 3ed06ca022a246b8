//! The sender's side of one connection: one task that sends frames and hears replies.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until};

use crate::error::{PushError, Refusal};
use crate::job::Job;
use crate::link::Link;
use crate::outgoing::Outgoing;
use crate::socket::{Fairness, INBOX_BYTES, Inbox};
use crate::wire::{HEADER_BYTES, Header, Kind};

/// Transfers remembered as attached before the finished ones among them are forgotten.
const MAX_ATTACHED: usize = 512;

/// Reads of replies in a row.
const HEARINGS: usize = 16;

/// The deadlines of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) progress: Duration,
    pub(crate) idle: Duration,
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
            if self.attached.len() >= MAX_ATTACHED {
                self.attached.retain(|transfer| self.link.knows(*transfer));
            }
            // An attach that was asked for is always said: its answer tells whether the ticket still stands.
            let attach = self.attached.insert(push.ticket.transfer) || matches!(job, Job::Attach);
            let frame = Outgoing::new(push, job, attach);
            self.unanswered += frame.as_ref().map_or(0, |frame| frame.answers);
            self.current = frame;
        }
        let Some(frame) = &mut self.current else {
            return Ok(0);
        };
        let Some(n) = frame.send(&self.socket).map_err(|_| Lost::Gone)? else { return Ok(0) };
        if frame.is_sent() {
            self.link.counters.bytes.add(frame.payload_bytes());
            self.current = None;
        }
        Ok(n)
    }

    /// Reads and handles the replies that are there.
    fn hear(&mut self) -> Result<(), Lost> {
        // A bounded number of reads: a peer that floods with replies must not keep this from speaking.
        for _ in 0..HEARINGS {
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
        Ok(())
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
