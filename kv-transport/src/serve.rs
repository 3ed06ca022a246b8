//! The receiver's side of one connection: hello, then frames until it closes. Hostile bytes end it, nothing else.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Buf;
use tokio::io::Interest;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::Identity;
use crate::borrow::Borrowed;
use crate::error::Refusal;
use crate::landing_shared::{LandingShared, Notice};
use crate::landing_state::LandingEnd;
use crate::receiver::ReceiverShared;
use crate::serve_rdma::{KEY_TICK, Lane};
use crate::socket::{Fairness, INBOX_BYTES, Inbox, Outbox, Socket};
use crate::wire::{self, HEADER_BYTES, Header, Hello, HelloAck, Kind};

/// Notices about ended landings a connection queues; more are told at the next frame instead.
const NOTICES: usize = 256;
/// Replies a connection queues before it stops reading.
const MAX_OUTBOX_BYTES: usize = 64 << 10;

/// What a frame counts for beside its payload.
const FRAME_COST_BYTES: usize = 4 << 10;
/// Replies that are sent before the connection would wait anyway.
const FLUSH_BYTES: usize = 4 * HEADER_BYTES;

/// Why a connection ends.
#[derive(Debug)]
pub(crate) enum Close {
    /// The peer closed it.
    End,
    /// Nothing came for too long.
    Silent,
    /// The peer sent nonsense.
    Protocol(&'static str),
    /// The receiver shuts down.
    Shutdown,
    /// The socket failed.
    Io(io::Error),
}

impl From<io::Error> for Close {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A transfer this connection showed the secret of. The landing itself may be long gone.
pub(crate) type Attached = HashMap<u128, Weak<LandingShared>>;

pub(crate) struct Connection {
    pub(crate) receiver: Arc<ReceiverShared>,
    pub(crate) stream: Socket,
    pub(crate) inbox: Inbox,
    pub(crate) outbox: Outbox,
    pub(crate) attached: Attached,
    /// A queue pair beside the connection.
    pub(crate) lane: Option<Lane>,
    /// The sender's memory, when it is lent.
    pub(crate) borrowed: Option<Arc<Borrowed>>,
    /// Commits, by transfer and frame, that are not answered yet.
    pub(crate) commits: Vec<(u128, u32)>,
    pub(crate) fairness: Fairness,
    pub(crate) discard: Box<[u8]>,
    /// Packed cells that came, until they are unpacked.
    pub(crate) packed: Vec<u8>,
    pub(crate) peer: Identity,
    pub(crate) notify: mpsc::Sender<Notice>,
    notices: mpsc::Receiver<Notice>,
}

/// Counts a connection for as long as it lives.
struct Counted(Arc<ReceiverShared>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves a connection until it closes; everything attached to it and still open is then lost.
pub(crate) async fn serve(receiver: Arc<ReceiverShared>, stream: Socket) {
    let count = receiver.connections.fetch_add(1, Ordering::Relaxed);
    let _counted = Counted(receiver.clone());
    let busy = count >= receiver.config.max_connections;
    let (notify, notices) = mpsc::channel(NOTICES);
    let mut connection = Connection {
        receiver,
        stream,
        inbox: Inbox::new(),
        outbox: Outbox::default(),
        attached: Attached::new(),
        lane: None,
        borrowed: None,
        commits: Vec::new(),
        fairness: Fairness::default(),
        discard: Box::default(),
        packed: Vec::new(),
        peer: Identity { worker: String::new(), incarnation: 0 },
        notices,
        notify,
    };
    let Err(close) = connection.run(busy).await;
    connection.close(&close);
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Also reached when the task itself is dropped: whatever was attached is lost.
        self.lose(LandingEnd::PeerGone);
    }
}

impl Connection {
    async fn run(&mut self, busy: bool) -> Result<std::convert::Infallible, Close> {
        self.stream.tune()?;
        self.hello(busy).await?;
        loop {
            self.lane_work();
            if self.outbox.len() >= FLUSH_BYTES {
                self.outbox.flush(&mut self.stream)?;
            }
            if self.outbox.len() >= MAX_OUTBOX_BYTES {
                self.readable(Instant::now() + self.receiver.config.progress_timeout).await?;
            }
            let idle = self.receiver.config.idle_timeout;
            let header = match self.need(HEADER_BYTES, idle).await?.first_chunk::<HEADER_BYTES>() {
                Some(bytes) => Header::parse(bytes).ok_or(Close::Protocol("damaged header"))?,
                None => return Err(Close::End),
            };
            self.inbox.consume(HEADER_BYTES);
            // Frames without payload count too, so that a flood of them leaves room for others.
            self.fairness.moved(FRAME_COST_BYTES).await;
            if !header.is_bounded() {
                return Err(Close::Protocol("frame out of bounds"));
            }
            match header.kind {
                Kind::Write => self.write_frame(header).await?,
                Kind::Packed => self.packed_frame(header).await?,
                Kind::Attach => self.attach_frame(header).await?,
                Kind::Commit => self.commit_frame(header).await?,
                Kind::Abort => self.abort_frame(header).await?,
                Kind::Offer => self.offer_frame(header).await?,
                Kind::Lend => self.lend_frame(header).await?,
                Kind::Lent => self.lent_frame(header).await?,
                Kind::Fallen => self.fallen_frame(header),
                Kind::Quiet => self.quiet_frame(header),
                _ => return Err(Close::Protocol("a reply from a sender")),
            }
        }
    }

    async fn hello(&mut self, busy: bool) -> Result<(), Close> {
        let limit = self.receiver.config.hello_timeout;
        let prefix = wire::MAGIC.len() + 2;
        let mut head = self.need(prefix, limit).await?;
        let magic = head.get(..wire::MAGIC.len()).unwrap_or_default() == wire::MAGIC;
        head.advance(wire::MAGIC.len());
        let len = usize::from(head.get_u16_le());
        if !magic || len > wire::MAX_HELLO_BYTES {
            return Err(Close::Protocol("not a hello"));
        }
        let all = self.need(prefix + len + 4, limit).await?;
        let (guarded, mut crc) = all
            .get(wire::MAGIC.len()..prefix + len + 4)
            .and_then(|rest| rest.split_at_checked(2 + len))
            .ok_or(Close::Protocol("not a hello"))?;
        if crc.get_u32_le() != crc32c::crc32c(guarded) {
            return Err(Close::Protocol("damaged hello"));
        }
        let hello =
            Hello::parse(guarded.get(2..).unwrap_or_default()).ok_or(Close::Protocol("not a hello"))?;
        self.inbox.consume(prefix + len + 4);
        let refused = match &hello {
            (_, None) => Some(Refusal::Protocol),
            (_, Some(hello)) if hello.to != self.receiver.identity => {
                self.receiver.counters.stale_refused.add(1);
                Some(Refusal::Stale)
            }
            (_, Some(hello)) => self.stranger(&hello.from.worker).or(busy.then_some(Refusal::Busy)),
        };
        let answer = HelloAck { from: self.receiver.identity.clone(), refused };
        self.outbox.bytes.extend(answer.encode().ok_or(Close::Protocol("this receiver's name is too long"))?);
        self.outbox.flush(&mut self.stream)?;
        match (hello, refused) {
            ((_, Some(hello)), None) => {
                self.peer = hello.from;
                Ok(())
            }
            _ => Err(Close::End),
        }
    }

    /// Why somebody who says that he is this worker is not believed.
    fn stranger(&self, worker: &str) -> Option<Refusal> {
        if !self.receiver.config.secure {
            return None;
        }
        let refusal = match (self.stream.is_encrypted(), self.stream.may_be(worker)) {
            (false, _) => Refusal::Insecure,
            (true, false) => Refusal::Identity,
            (true, true) => return None,
        };
        self.receiver.counters.identity_refused.add(1);
        tracing::warn!(peer = worker, has_certificate = self.stream.has_certificate(), %refusal, "a KV connection was refused");
        Some(refusal)
    }

    pub(crate) fn reply(&mut self, kind: Kind, transfer: u128, seq: u32, arg: u64) {
        Header::bare(kind, transfer, seq, arg).put(&mut self.outbox.bytes);
    }

    /// At least `n` bytes in the inbox, waiting at most `limit` for all of them.
    pub(crate) async fn need(&mut self, n: usize, limit: Duration) -> Result<&[u8], Close> {
        let mut until = None;
        while self.inbox.bytes().len() < n {
            let space = self.inbox.space(INBOX_BYTES / 2);
            match self.stream.try_read(space) {
                Ok(0) => return Err(Close::End),
                Ok(n) => self.inbox.filled(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let until = *until.get_or_insert_with(|| Instant::now() + limit);
                    self.readable(until).await?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.inbox.bytes())
    }

    /// Waits until the socket may be read, sending replies and notices meanwhile.
    pub(crate) async fn readable(&mut self, until: Instant) -> Result<(), Close> {
        loop {
            while let Ok(notice) = self.notices.try_recv() {
                self.pass_on(notice);
            }
            self.lane_settles().await;
            self.outbox.flush(&mut self.stream)?;
            let full = self.outbox.len() >= MAX_OUTBOX_BYTES;
            let is_sent = self.outbox.is_empty() && !self.stream.has_unsent();
            let interest = match (is_sent, full) {
                (true, _) => Interest::READABLE,
                (false, true) => Interest::WRITABLE,
                (false, false) => Interest::READABLE | Interest::WRITABLE,
            };
            let ticks = self.lane.as_ref().is_some_and(Lane::has_grants) || !self.commits.is_empty();
            let tick = ticks.then(|| Instant::now() + KEY_TICK).filter(|tick| *tick < until);
            let notice = tokio::select! {
                biased;
                () = self.receiver.stop.cancelled() => return Err(Close::Shutdown),
                notice = self.notices.recv() => notice,
                ready = self.stream.ready(interest) => {
                    let ready = ready?;
                    if !full && (ready.is_readable() || ready.is_error()) {
                        return Ok(());
                    }
                    None
                }
                () = lane_event(self.lane.as_ref()) => None,
                () = sleep_until(tick.unwrap_or(until)) => match tick {
                    Some(_) => None,
                    None => return Err(Close::Silent),
                },
            };
            if let Some(notice) = notice {
                self.pass_on(notice);
            }
        }
    }

    /// Does what the queue pair has to do until nothing more is to be expected soon, then arms it.
    async fn lane_settles(&mut self) {
        self.lane_work();
        while self.lane.as_ref().is_some_and(Lane::spins) {
            self.outbox.flush(&mut self.stream).ok();
            tokio::task::yield_now().await;
            self.lane_work();
        }
        if let Some(lane) = &mut self.lane {
            lane.arm();
            // What came between the last look and the arming would wake nobody.
            self.lane_work();
        }
    }

    fn pass_on(&mut self, notice: Notice) {
        if let Some(refusal) = notice.refusal {
            self.reply(Kind::Refused, notice.transfer, 0, refusal as u64);
        }
    }

    /// Ends everything attached and still open.
    fn lose(&mut self, end: LandingEnd) {
        for (_, landing) in self.attached.drain() {
            if let Some(landing) = landing.upgrade() {
                landing.revoke(end, "");
            }
        }
    }

    /// Says why, if there is something to say, and ends what was attached.
    fn close(&mut self, close: &Close) {
        let end = match close {
            Close::Shutdown => LandingEnd::Shutdown,
            Close::Silent => LandingEnd::Stalled,
            Close::End | Close::Protocol(_) | Close::Io(_) => LandingEnd::PeerGone,
        };
        self.lose(end);
        let refusal = match close {
            Close::Protocol(what) => {
                self.receiver.counters.protocol_errors.add(1);
                tracing::warn!(peer = %self.peer.worker, what, "closing a connection that breaks the protocol");
                Refusal::Protocol
            }
            Close::Shutdown => Refusal::Shutdown,
            Close::Silent => Refusal::Stalled,
            Close::End => return,
            Close::Io(error) => {
                tracing::debug!(peer = %self.peer.worker, %error, "connection failed");
                return;
            }
        };
        // Transfer 0 is the connection itself. Best effort: the peer sees the close anyway.
        self.reply(Kind::Refused, 0, 0, refusal as u64);
        let _ = self.outbox.flush(&mut self.stream);
    }
}

/// The next completion of a queue pair, if there is one.
async fn lane_event(lane: Option<&Lane>) {
    match lane {
        Some(lane) => lane.event().await,
        None => std::future::pending().await,
    }
}
