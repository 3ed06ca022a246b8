//! The sender's side of one connection: one task that sends frames and hears replies.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::time::{Instant, sleep_until};

use crate::error::{PushError, Refusal};
use crate::job::{Job, QueuedCell};
use crate::link::Link;
use crate::outgoing::Outgoing;
use crate::push::{PushShared, SEQ_COMMIT};
use crate::socket::{Fairness, INBOX_BYTES, Inbox, Outbox, Socket};
use crate::stream_rdma::{Lane, Sent};
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
    socket: Socket,
    limits: Limits,
    inbox: Inbox,
    /// Tickets that were shown here, and by which push: one that was refused is shown anew by the next.
    attached: HashMap<u128, u32>,
    current: Option<Outgoing>,
    /// Frames sent whose answer is due.
    unanswered: usize,
    /// The present, as of the beginning of this round. Where clocks are slow (virtual machines), they are read often enough.
    now: Instant,
    /// When a byte last moved in either direction.
    progress: Instant,
    fairness: Fairness,
    /// A queue pair beside the connection.
    lane: Option<Lane>,
    /// Small frames that belong to no push.
    outbox: Outbox,
}

impl Stream {
    pub(crate) fn new(link: Arc<Link>, socket: Socket, limits: Limits, lane: Option<Lane>) -> Self {
        Self {
            lane,
            outbox: Outbox::default(),
            link,
            socket,
            limits,
            inbox: Inbox::new(),
            attached: HashMap::new(),
            current: None,
            unanswered: 0,
            now: Instant::now(),
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
            self.now = Instant::now();
            self.socket.flush().map_err(|_| Lost::Gone)?;
            self.hear()?;
            self.reap();
            if let Some(lane) = &mut self.lane {
                self.unanswered += lane.tend(self.now, &mut self.outbox);
            }
            let moved = self.speak()?;
            if moved > 0 {
                self.progress = self.now;
                self.fairness.moved(moved).await;
            } else if self.wait().await? {
                return Ok(());
            }
        }
    }

    /// Sends some of the current frame, taking the next one if there is none. 0 when nothing can be sent now.
    fn speak(&mut self) -> Result<usize, Lost> {
        if self.current.is_none() {
            self.outbox.flush(&mut self.socket).map_err(|_| Lost::Gone)?;
            if !self.outbox.is_empty() || !self.may_take() {
                return Ok(0);
            }
            // A queue pair's cells and the commit go different ways.
            let Some((push, job)) = self.link.take(self.lane.is_none()) else {
                return Ok(0);
            };
            let (push, job) = match (&self.lane, job) {
                (Some(lane), Job::Write { seq, cells, .. }) if lane.is_up() => {
                    match self.write(push, seq, cells) {
                        Ok(moved) => return Ok(moved),
                        Err(push) => (push, Job::Attach),
                    }
                }
                (_, job) => (push, job),
            };
            if self.attached.len() >= MAX_ATTACHED {
                self.attached.retain(|transfer, _| self.link.knows(*transfer));
            }
            // An attach that was asked for is always said: its answer tells whether the ticket still stands.
            let shown = self.attached.insert(push.ticket.transfer, push.round) == Some(push.round);
            let attach = !shown || matches!(job, Job::Attach);
            let frame = Outgoing::new(push, job, attach, self.link.lent);
            self.unanswered += frame.as_ref().map_or(0, |frame| frame.answers);
            self.current = frame;
        }
        let Some(frame) = &mut self.current else {
            return Ok(0);
        };
        let Some(n) = frame.send(&mut self.socket).map_err(|_| Lost::Gone)? else { return Ok(0) };
        if frame.is_sent() {
            self.link.counters.bytes.add(frame.bytes);
            if let Some(way) = self.link.lent {
                self.link.counters.lent(way).add(frame.bytes);
            }
            self.current = None;
        }
        Ok(n)
    }

    /// Whether a frame may be taken now: by RDMA where there is any, else over TCP.
    fn may_take(&self) -> bool {
        match &self.lane {
            Some(lane) => lane.may_take(),
            None => !self.link.has_lanes(),
        }
    }

    /// A frame for the queue pair; the push comes back when its key must be asked for first.
    fn write(
        &mut self,
        push: Arc<PushShared>,
        seq: u32,
        cells: Vec<QueuedCell>,
    ) -> Result<usize, Arc<PushShared>> {
        let Some(lane) = &mut self.lane else { return Ok(0) };
        match lane.write(push, seq, cells) {
            Ok(Sent::Bytes(bytes)) => Ok(bytes.max(1)),
            Ok(Sent::Parked) => Ok(1),
            Ok(Sent::AskForKey(push)) => Err(push),
            Err(broken) => {
                self.unanswered += lane.breaks(&broken, &mut self.outbox);
                Ok(1)
            }
        }
    }

    /// Looks at what the queue pair has done; true when there was something.
    fn reap(&mut self) -> bool {
        let Some(lane) = &mut self.lane else { return false };
        match lane.reap() {
            Ok(some) => {
                if some {
                    self.progress = self.now;
                }
                some
            }
            Err(broken) => {
                self.unanswered += lane.breaks(&broken, &mut self.outbox);
                true
            }
        }
    }

    /// Reads and handles the replies that are there.
    fn hear(&mut self) -> Result<(), Lost> {
        // A bounded number of reads: a peer that floods with replies must not keep this from speaking.
        for _ in 0..HEARINGS {
            while let Some(bytes) = self.inbox.bytes().first_chunk::<HEADER_BYTES>() {
                let header = Header::parse(bytes)
                    .filter(Header::is_bounded)
                    .ok_or(Lost::Refused(Refusal::Protocol))?;
                let body_bytes = header.body_bytes as usize;
                if self.inbox.bytes().len() < HEADER_BYTES + body_bytes {
                    break;
                }
                self.inbox.consume(HEADER_BYTES);
                self.progress = self.now;
                if header.kind == Kind::Answer {
                    self.answer(&header, body_bytes)?;
                } else {
                    self.reply(&header)?;
                }
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

    /// The only reply with a body.
    fn answer(&mut self, header: &Header, body_bytes: usize) -> Result<(), Lost> {
        self.unanswered = self.unanswered.saturating_sub(1);
        let body = self.inbox.bytes().get(..body_bytes).unwrap_or_default();
        if crc32c::crc32c(body) != header.body_crc {
            return Err(Lost::Refused(Refusal::Protocol));
        }
        if let Some(lane) = &mut self.lane {
            lane.answered(header, body);
        }
        self.inbox.consume(body_bytes);
        Ok(())
    }

    fn reply(&mut self, header: &Header) -> Result<(), Lost> {
        let of_lane = self.lane.as_mut().is_some_and(|lane| lane.settled(header));
        if header.seq != 0 && !of_lane {
            self.unanswered = self.unanswered.saturating_sub(1);
        }
        if let Some(lane) = &mut self.lane {
            match header.kind {
                Kind::Granted => {
                    if let Err(broken) = lane.granted(header.transfer, header.arg) {
                        self.unanswered += lane.breaks(&broken, &mut self.outbox);
                    }
                    return Ok(());
                }
                Kind::Down => {
                    lane.peer_down(header);
                    return Ok(());
                }
                _ => {}
            }
        }
        if header.transfer == 0 && header.kind == Kind::Refused {
            return Err(Lost::Refused(Refusal::from_code(header.arg)));
        }
        // Unknown here: the push is over already, and whoever shows the same ticket now has not been answered yet.
        let Some(push) = self.link.push(header.transfer) else { return Ok(()) };
        let Some(seq) = push.seq_of(header.seq) else { return Ok(()) };
        match header.kind {
            Kind::Attached => push.update(|inner| inner.state.attached()),
            Kind::Ack => push.update(|inner| {
                let before = inner.state.refetched();
                inner.state.acked(seq, header.arg);
                self.link.counters.refetched_cells.add(inner.state.refetched() - before);
            }),
            Kind::CommitAck => push.update(|inner| inner.state.commit_acked()),
            Kind::Refused => {
                let refusal = Refusal::from_code(header.arg);
                push.update(|inner| inner.state.refused(refusal, seq == SEQ_COMMIT));
            }
            _ => return Err(Lost::Refused(Refusal::Protocol)),
        }
        Ok(())
    }

    /// Waits for something to do; true when the link ends.
    async fn wait(&mut self) -> Result<bool, Lost> {
        let sending = self.current.is_some() || !self.outbox.is_empty() || self.socket.has_unsent();
        let interest = if sending { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        let waits = self.lane.as_ref().is_some_and(Lane::waits);
        let busy = sending || waits || self.unanswered > 0;
        let until = self.progress + if busy { self.limits.progress } else { self.limits.idle };
        while self.lane.as_ref().is_some_and(Lane::spins) {
            tokio::task::yield_now().await;
            if self.reap() {
                return Ok(false);
            }
        }
        if let Some(lane) = &mut self.lane {
            lane.arm();
            // What came between the last look and the arming would wake nobody.
            if self.reap() {
                return Ok(false);
            }
        }
        // Who may not take a frame must not use up the word that there is one.
        let may_take = self.may_take();
        let due = self.lane.as_ref().and_then(|lane| lane.due(self.now)).filter(|due| *due < until);
        tokio::select! {
            biased;
            () = self.link.stop.cancelled() => Ok(true),
            ready = self.socket.ready(interest) => ready.map(|_| false).map_err(|_| Lost::Gone),
            () = self.link.lanes_gone(), if !sending && !may_take => Ok(false),
            () = self.link.work.notified(), if !sending && may_take => {
                if !self.may_take() {
                    // A queue pair came up meanwhile: the word is for its connection.
                    self.link.work.notify_one();
                }
                if !busy {
                    self.progress = Instant::now();
                }
                Ok(false)
            }
            () = lane_event(self.lane.as_ref()) => Ok(false),
            () = sleep_until(due.unwrap_or(until)) => {
                if due.is_some() {
                    Ok(false)
                } else if busy {
                    Err(Lost::Stalled)
                } else {
                    self.progress = Instant::now();
                    Ok(self.link.close_if_idle())
                }
            }
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

/// The next completion of a queue pair, if there is one.
async fn lane_event(lane: Option<&Lane>) {
    match lane {
        Some(lane) => lane.event().await,
        None => std::future::pending().await,
    }
}
