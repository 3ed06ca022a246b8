//! The sender's side of a queue pair beside a connection: cells written straight into the peer's memory, and what
//! happens to them when it breaks.
//!
//! ```text
//! Off ──offer──► Offered ──answer──► Up ──broken here──► Falling ──peer's side is gone too──► Off (again after a while)
//!  ▲                │ refused, late   └──────────────── peer's side broke ─────────────────────►│
//!  └────────────────┘                      cells without an answer go back to their pushes
//! ```
//!
//! Cells move to another way only when nothing of them can arrive on the old one any more, and only those whose
//! verification was not confirmed.

mod frames;

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

pub(crate) use self::frames::Sent;
use self::frames::{Grant, Parked};
use crate::error::PushError;
use crate::link::Link;
use crate::push::PushShared;
use crate::push_state::PushPhase;
use crate::socket::Outbox;
use crate::stats::Fallback;
use crate::verbs::{Answer, Control, Done, Fabric, PairBroken, QueuePair};
use crate::wire::{Header, Kind, MAX_FRAME_CELLS};

/// Requests in flight on a queue pair.
const REQUESTS: u32 = 1024;
/// Announcements in flight; the peer may have room for fewer.
const ANNOUNCEMENTS: usize = 64;
/// Requests of one frame at most: a write for each cell, and the announcement.
const FRAME_REQUESTS: u32 = MAX_FRAME_CELLS as u32 + 1;
/// Sequence numbers of an offer and of the word that a queue pair is gone; both are answered.
pub(crate) const SEQ_OFFER: u32 = u32::MAX - 2;
pub(crate) const SEQ_FALLEN: u32 = u32::MAX - 3;
/// Keys of pushes that are over are looked for this often.
const TICK: Duration = Duration::from_millis(50);
/// After a completion, the next one is looked for this long before the task sleeps.
const SPIN: Duration = Duration::from_micros(30);

/// How RDMA is used towards a peer.
#[derive(Debug, Clone)]
pub(crate) struct LaneConfig {
    pub(crate) fabric: Arc<Fabric>,
    /// Which rail.
    pub(crate) rail: usize,
    /// Pushes fail rather than use TCP.
    pub(crate) required: bool,
    /// How long until a peer that fell back to TCP is offered a queue pair again.
    pub(crate) retry: Duration,
    /// The peer must answer an offer by then.
    pub(crate) patience: Duration,
}

pub(crate) struct Lane {
    config: LaneConfig,
    link: Arc<Link>,
    state: State,
    /// Frames whose answer is due, on the queue pair or on their way into it.
    unanswered: HashMap<(u128, u32), Arc<PushShared>>,
    parked: VecDeque<Parked>,
    grants: HashMap<u128, Grant>,
    spin_until: Instant,
    /// Whether the link's frames wait for this lane rather than go over TCP.
    counted: bool,
    breaks_seen: u64,
}

enum State {
    Off { retry_at: Instant },
    Offered { pair: Box<QueuePair>, until: Instant },
    Up(Box<Up>),
    Falling,
}

struct Up {
    pair: QueuePair,
    base: u64,
    depth: usize,
    free: Vec<usize>,
    /// By announcement buffer: whose source is being read.
    reading: HashMap<usize, Arc<PushShared>>,
    done: Vec<Done>,
}

impl Lane {
    pub(crate) fn new(config: LaneConfig, link: Arc<Link>) -> Self {
        Self {
            breaks_seen: link.counters.breaks.get(),
            config,
            link,
            state: State::Off { retry_at: Instant::now() },
            unanswered: HashMap::new(),
            parked: VecDeque::new(),
            grants: HashMap::new(),
            spin_until: Instant::now(),
            counted: true,
        }
    }

    /// Whether the link's frames wait for this lane rather than go over TCP. Where that is not allowed, no push survives the last one.
    fn count(&mut self, counted: bool) {
        if mem::replace(&mut self.counted, counted) != counted {
            self.link.count_lane(counted);
            if self.config.required && !self.link.has_lanes() {
                self.link.fail_pushes(&PushError::Downgrade { reason: self.link.why_tcp() });
            }
        }
    }

    /// Whether cells go by RDMA now.
    pub(crate) fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_))
    }

    /// Whether a frame may be taken now.
    pub(crate) fn may_take(&self) -> bool {
        match &self.state {
            State::Up(up) => {
                up.pair.room() >= FRAME_REQUESTS && !up.free.is_empty() && self.unanswered.len() < up.depth
            }
            State::Falling => false,
            State::Off { .. } | State::Offered { .. } => !self.link.has_lanes(),
        }
    }

    /// Does what is due by time; a new offer goes to `out`. Frames that were said count as to be answered.
    pub(crate) fn tend(&mut self, now: Instant, out: &mut Outbox) -> usize {
        let breaks = self.link.counters.breaks.get();
        let rails = self.link.counters.broken_rails.load(Ordering::Relaxed);
        if mem::replace(&mut self.breaks_seen, breaks) != breaks
            && rails >> (self.config.rail % 64) & 1 == 1
            && let State::Up(up) = &mut self.state
        {
            up.pair.fail();
        }
        match &self.state {
            State::Off { retry_at } if now >= *retry_at => return self.offer(out),
            State::Offered { until, .. } if now >= *until => {
                self.goes_off(
                    Fallback::NoAnswer,
                    "the peer did not answer the offer of a queue pair in time",
                );
            }
            _ => {}
        }
        self.forget_ended(out);
        0
    }

    /// When [`Lane::tend`] has something to do next.
    pub(crate) fn due(&self, now: Instant) -> Option<Instant> {
        match &self.state {
            State::Off { retry_at } => Some(*retry_at),
            State::Offered { until, .. } => Some(*until),
            _ if self.grants.is_empty() => None,
            _ => Some(now + TICK),
        }
    }

    /// Makes a queue pair and offers it.
    fn offer(&mut self, out: &mut Outbox) -> usize {
        let control = Control { sends: REQUESTS, send_buffers: ANNOUNCEMENTS, receive_buffers: 0 };
        let made = match self.config.fabric.rail(self.config.rail) {
            Some(rail) => QueuePair::new(rail.clone(), control),
            None => Err(PairBroken("no RDMA here".into())),
        };
        match made {
            Ok(pair) => {
                let mut body = Vec::new();
                pair.offer().put(&mut body);
                Header::bare(Kind::Offer, 0, SEQ_OFFER, 0).put_with_body(&body, &mut out.bytes);
                let until = Instant::now() + self.config.patience;
                self.state = State::Offered { pair: Box::new(pair), until };
                1
            }
            Err(PairBroken(reason)) => {
                self.goes_off(Fallback::Local, &reason);
                0
            }
        }
    }

    /// The peer's answer to the offer.
    pub(crate) fn answered(&mut self, header: &Header, body: &[u8]) {
        let State::Offered { pair, .. } = mem::replace(&mut self.state, State::Falling) else {
            // Too late: the offer was given up, and so was the peer's queue pair when the next one comes.
            self.state = State::Off { retry_at: Instant::now() + self.config.retry };
            return;
        };
        let mut pair = *pair;
        if header.arg != 0 {
            return self.goes_off(Fallback::Refused, &String::from_utf8_lossy(body));
        }
        let Some(answer) = Answer::take(&mut &*body) else {
            return self.goes_off(Fallback::Refused, "the peer's answer makes no sense");
        };
        if let Err(PairBroken(reason)) = pair.connect(&answer.pair) {
            return self.goes_off(Fallback::Local, &reason);
        }
        self.link.counters.queue_pairs.add(1);
        let depth = usize::from(answer.depth).clamp(1, ANNOUNCEMENTS);
        let (free, reading) = ((0..ANNOUNCEMENTS).collect(), HashMap::new());
        self.state =
            State::Up(Box::new(Up { pair, base: answer.base, depth, free, reading, done: Vec::new() }));
        self.count(true);
    }

    /// Looks at what the queue pair has done; true when there was something.
    pub(crate) fn reap(&mut self) -> Result<bool, PairBroken> {
        let State::Up(up) = &mut self.state else { return Ok(false) };
        let mut done = mem::take(&mut up.done);
        let result = up.pair.poll(&mut done);
        let some = !done.is_empty();
        for done in done.drain(..) {
            if let Done::Sent(buffer) = done {
                up.free.push(buffer);
                if let Some(push) = up.reading.remove(&buffer) {
                    push.end_read();
                }
            }
        }
        up.done = done;
        result?;
        if some {
            self.spin_until = Instant::now() + SPIN;
            self.unpark()?;
        }
        Ok(some)
    }

    /// Whether the next completion is probably near.
    pub(crate) fn spins(&self) -> bool {
        self.is_up() && Instant::now() < self.spin_until
    }

    /// Asks to be woken by the next completion. Look once more before waiting.
    pub(crate) fn arm(&mut self) {
        if let State::Up(up) = &mut self.state {
            up.pair.arm();
        }
    }

    /// Waits for the next completion.
    pub(crate) async fn event(&self) {
        match &self.state {
            State::Up(up) => up.pair.event().await,
            _ => std::future::pending().await,
        }
    }

    /// An answer came; whether it was for a frame of this lane.
    pub(crate) fn settled(&mut self, header: &Header) -> bool {
        let is_ours = self.unanswered.remove(&(header.transfer, header.seq)).is_some();
        if let State::Up(up) = &mut self.state
            && is_ours
            && header.kind == Kind::Ack
            && !up.pair.proves(header.arg == 0)
        {
            // What the card read was not what the device holds.
            up.pair.fail();
        }
        is_ours
    }

    /// Whether answers are due.
    pub(crate) fn waits(&self) -> bool {
        !self.unanswered.is_empty()
    }

    /// The queue pair broke on this side: nothing more is read or sent through it. The peer is told.
    pub(crate) fn breaks(&mut self, broken: &PairBroken, out: &mut Outbox) -> usize {
        let State::Up(up) = &self.state else { return 0 };
        up.pair.doubts(broken);
        let PairBroken(reason) = broken;
        self.warn(Fallback::Broken, reason);
        self.let_go(State::Falling);
        Header::bare(Kind::Fallen, 0, SEQ_FALLEN, 0).put(&mut out.bytes);
        1
    }

    /// The peer's queue pair is gone, and every answer it owed is here.
    pub(crate) fn peer_down(&mut self, header: &Header) {
        match &self.state {
            State::Falling if header.seq == SEQ_FALLEN => self.resend(),
            State::Up(_) | State::Offered { .. } if header.seq == 0 => {
                self.warn(Fallback::PeerBroken, "the peer's queue pair broke");
                self.let_go(State::Falling);
                self.resend();
            }
            _ => {}
        }
    }

    /// Destroys the queue pair; what it read is not read any more.
    fn let_go(&mut self, next: State) {
        let before = mem::replace(&mut self.state, next);
        if let State::Up(up) = before {
            let Up { pair, mut reading, .. } = *up;
            drop(pair);
            for push in reading.drain().map(|(_, push)| push) {
                push.end_read();
            }
        }
    }

    /// What was not answered goes back to the pushes, to go another way.
    fn resend(&mut self) {
        self.state = State::Off { retry_at: Instant::now() + self.config.retry };
        self.grants.clear();
        self.parked.clear();
        let frames = mem::take(&mut self.unanswered);
        self.count(false);
        for ((_, number), push) in frames {
            if let Some(seq) = push.seq_of(number) {
                push.update(|inner| inner.state.unsend(seq));
            }
        }
    }

    fn goes_off(&mut self, why: Fallback, reason: &str) {
        self.warn(why, reason);
        self.let_go(State::Off { retry_at: Instant::now() + self.config.retry });
        self.count(false);
    }

    fn warn(&self, why: Fallback, reason: &str) {
        self.link.counters.fell_back(why);
        // Said once for each new reason; the counter has all.
        if self.link.falls_back(reason) {
            tracing::warn!(reason, why = why.name(), "a peer is used over TCP although RDMA was wanted");
        }
    }

    /// Pushes that are over: the peer may take their keys back once nothing of them is in flight.
    fn forget_ended(&mut self, out: &mut Outbox) {
        if self.grants.is_empty() {
            return;
        }
        let State::Up(up) = &self.state else { return };
        let mut ended = Vec::new();
        for (transfer, grant) in &self.grants {
            let phase = grant.push.phase();
            let open = matches!(phase, PushPhase::Opening | PushPhase::Pushing | PushPhase::Committing);
            let flying = up.reading.values().any(|push| Arc::ptr_eq(push, &grant.push));
            if !open && !flying {
                ended.push((*transfer, phase == PushPhase::Committed));
            }
        }
        for (transfer, committed) in ended {
            self.grants.remove(&transfer);
            self.parked.retain(|parked| {
                let keep = parked.push.ticket.transfer != transfer;
                if !keep {
                    self.unanswered.remove(&(transfer, parked.push.number(parked.seq)));
                }
                keep
            });
            if !committed {
                Header::bare(Kind::Quiet, transfer, 0, 0).put(&mut out.bytes);
            }
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.let_go(State::Falling);
        if self.counted {
            self.link.count_lane(false);
        }
    }
}
