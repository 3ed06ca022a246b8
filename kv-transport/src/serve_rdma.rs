//! The receiver's side of a queue pair beside a connection: keys given and taken back, cells that the sender's
//! network card wrote, verified where they lie.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;

use crate::Region;
use crate::device::waiting;
use crate::landing_shared::{Checked, Granted, Key, LandingShared};
use crate::landing_state::Claim;
use crate::serve::{Close, Connection};
use crate::transport::{Side, Transport};
use crate::verbs::{Answer, Control, Done, Offer, PairBroken, QueuePair, Window};
use crate::wire::{CellDescriptor, HEADER_BYTES, Header, Kind};

/// Announcements that may arrive before they are looked at; the sender keeps to it.
const ANNOUNCEMENTS: usize = 64;
/// Keys given or taken at the same time.
const KEY_REQUESTS: u32 = 128;
/// A key whose landing is over is looked at this often.
pub(crate) const KEY_TICK: Duration = Duration::from_millis(20);
/// After a completion, the next one is looked for this long before the task sleeps.
const SPIN: Duration = Duration::from_micros(30);

/// A queue pair and the keys given out on it.
pub(crate) struct Lane {
    /// Dropped before the grants: their memory may be released only when nothing can write it any more.
    pair: QueuePair,
    grants: HashMap<u128, Grant>,
    done: Vec<Done>,
    spin_until: Instant,
    breaks_seen: u64,
}

struct Grant {
    granted: Granted,
    window: Option<Window>,
    stage: Stage,
    /// The sender has nothing in flight.
    quiet: bool,
}

/// Where a key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Binding,
    Given,
    /// The landing is over; since when the sender is waited for.
    Waiting(Instant),
    Invalidating,
}

impl Lane {
    /// Waits for a completion after [`Lane::arm`].
    pub(crate) async fn event(&self) {
        self.pair.event().await;
    }

    pub(crate) fn arm(&mut self) {
        self.pair.arm();
    }

    /// Whether the next completion is probably near.
    pub(crate) fn spins(&self) -> bool {
        Instant::now() < self.spin_until
    }

    /// Whether keys are out.
    pub(crate) fn has_grants(&self) -> bool {
        !self.grants.is_empty()
    }

    fn open(receiver: &crate::receiver::ReceiverShared, offer: &Offer) -> Result<(Self, Answer), PairBroken> {
        let fabric = receiver.config.fabric.as_ref().ok_or(PairBroken("no RDMA here".into()))?;
        let rail = fabric.nearest(&offer.gid).ok_or(PairBroken("no RDMA here".into()))?;
        let control = Control { sends: KEY_REQUESTS, send_buffers: 0, receive_buffers: ANNOUNCEMENTS };
        let mut pair = QueuePair::new(rail.clone(), control)?;
        pair.connect(offer)?;
        let answer = Answer {
            pair: pair.offer(),
            base: pair.base(),
            depth: u16::try_from(ANNOUNCEMENTS).unwrap_or(u16::MAX),
        };
        let (spin_until, breaks_seen) = (Instant::now(), receiver.counters.breaks.get());
        Ok((Self { pair, grants: HashMap::new(), done: Vec::new(), spin_until, breaks_seen }, answer))
    }

    /// Gives the sender a key for a transfer. What is to be replied at once, if the key is there already.
    fn give(&mut self, landing: &Arc<LandingShared>) -> Result<Option<u32>, PairBroken> {
        if let Some(grant) = self.grants.get(&landing.transfer) {
            let key = match grant.window {
                Some(window) => self.pair.key(window),
                None => self.pair.region_key(),
            };
            return Ok((grant.stage == Stage::Given).then_some(key));
        }
        let Some(granted) = landing.grant() else { return Ok(None) };
        let window = if self.pair.has_windows() { Some(self.pair.bind()?) } else { None };
        let stage = if window.is_some() { Stage::Binding } else { Stage::Given };
        self.grants.insert(landing.transfer, Grant { granted, window, stage, quiet: false });
        Ok(window.is_none().then(|| self.pair.region_key()))
    }

    /// Checksums of cells of `cell_bytes` as they stand where this queue pair lets them be written.
    fn sums(&self, region: &Region, places: &[Range<usize>], cell_bytes: usize) -> io::Result<Vec<u32>> {
        match (self.pair.side(), region.device()) {
            (_, None) | (Side::Host, _) => {
                places.iter().map(|place| region.checksum(0, place.clone())).collect()
            }
            (Side::Device, _) if places.is_empty() => Ok(Vec::new()),
            (Side::Device, Some(device)) => {
                let starts: Vec<usize> = places.iter().map(|place| place.start).collect();
                waiting(|| device.sums(&starts, cell_bytes))
            }
        }
    }

    fn transfer_of(&self, window: Window) -> Option<u128> {
        self.grants.iter().find(|(_, grant)| grant.window == Some(window)).map(|(transfer, _)| *transfer)
    }

    /// Takes back the keys whose time has come.
    fn tend(&mut self, patience: Duration) -> Result<(), PairBroken> {
        let mut over = Vec::new();
        for (transfer, grant) in &mut self.grants {
            let due = match (grant.stage, grant.granted.wish()) {
                (Stage::Given, Key::TakeBack) => true,
                (Stage::Given, Key::Revoke) => {
                    grant.stage = Stage::Waiting(Instant::now());
                    grant.quiet
                }
                (Stage::Waiting(since), _) => {
                    let late = Instant::now() >= since + patience;
                    if late && !grant.quiet && grant.window.is_none() {
                        return Err(PairBroken("the sender did not confirm the end of a transfer".into()));
                    }
                    late || grant.quiet
                }
                _ => false,
            };
            match grant.window {
                Some(window) if due => {
                    grant.stage = Stage::Invalidating;
                    self.pair.invalidate(window)?;
                }
                None if due => over.push(*transfer),
                _ => {}
            }
        }
        // Without windows the sender's word is what there is: it has nothing in flight.
        for transfer in over {
            self.grants.remove(&transfer);
        }
        Ok(())
    }
}

impl Connection {
    /// The sender offers a queue pair.
    pub(crate) async fn offer_frame(&mut self, header: Header) -> Result<(), Close> {
        let body = self.body(header, true).await?;
        let offer = Offer::take(&mut &body[..]).ok_or(Close::Protocol("damaged offer"))?;
        // One at a time: a new offer means that the sender's old queue pair is gone.
        self.lane = None;
        let mut out = Vec::new();
        let refused = match Lane::open(&self.receiver, &offer) {
            Ok((lane, answer)) => {
                tracing::debug!(peer = %self.peer.worker, ?lane.pair, "queue pair connected");
                answer.put(&mut out);
                self.lane = Some(lane);
                self.receiver.counters.queue_pairs.add(1);
                0
            }
            Err(PairBroken(reason)) => {
                if self.receiver.config.fabric.is_some() {
                    tracing::warn!(peer = %self.peer.worker, reason, "cannot connect a queue pair");
                }
                let end = reason.floor_char_boundary(crate::wire::MAX_OFFER_BYTES);
                out.extend_from_slice(reason.get(..end).unwrap_or_default().as_bytes());
                1
            }
        };
        Header::bare(Kind::Answer, 0, header.seq, refused).put_with_body(&out, &mut self.outbox.bytes);
        Ok(())
    }

    /// The sender's queue pair is gone: what arrived before is answered, then ours goes too.
    pub(crate) fn fallen_frame(&mut self, header: Header) {
        self.lane_work();
        self.lane = None;
        self.reply(Kind::Down, 0, header.seq, 0);
        self.settle_commits();
    }

    /// The sender has nothing of a transfer in flight.
    pub(crate) fn quiet_frame(&mut self, header: Header) {
        if let Some(grant) = self.lane.as_mut().and_then(|lane| lane.grants.get_mut(&header.transfer)) {
            grant.quiet = true;
        }
        self.lane_work();
    }

    /// A transfer was attached: its sender gets a key, if there is a queue pair.
    pub(crate) fn give_key(&mut self, transfer: u128) {
        let landing = self.attached.get(&transfer).and_then(Weak::upgrade);
        let (Some(lane), Some(landing)) = (&mut self.lane, landing) else { return };
        match lane.give(&landing) {
            Ok(Some(key)) => self.reply(Kind::Granted, transfer, 0, u64::from(key)),
            Ok(None) => {}
            Err(broken) => self.lane_falls(&broken),
        }
    }

    fn lane_falls(&mut self, broken: &PairBroken) {
        let PairBroken(reason) = broken;
        self.lane.iter().for_each(|lane| lane.pair.doubts(broken));
        // Destroys the queue pair, then lets go of what could be written through it.
        self.lane = None;
        self.receiver.counters.queue_pairs_lost.add(1);
        tracing::warn!(peer = %self.peer.worker, reason, "queue pair lost; its transfers go on over TCP");
        self.reply(Kind::Down, 0, 0, 0);
        self.settle_commits();
    }

    /// Handles what the queue pair has done and takes keys back; true when there was something.
    pub(crate) fn lane_work(&mut self) -> bool {
        let Some(mut lane) = self.lane.take() else {
            self.settle_commits();
            return false;
        };
        let breaks = self.receiver.counters.breaks.get();
        if std::mem::replace(&mut lane.breaks_seen, breaks) != breaks {
            lane.pair.fail();
        }
        let mut done = std::mem::take(&mut lane.done);
        let mut result = lane.pair.poll(&mut done);
        let worked = !done.is_empty();
        for done in done.drain(..) {
            let handled = self.lane_done(&mut lane, done);
            result = result.and(handled);
        }
        lane.done = done;
        let patience = self.receiver.config.fence_timeout;
        let result = result.and_then(|()| lane.tend(patience));
        if worked {
            lane.spin_until = Instant::now() + SPIN;
        }
        self.lane = Some(lane);
        if let Err(broken) = result {
            self.lane_falls(&broken);
        }
        self.settle_commits();
        worked
    }

    fn lane_done(&mut self, lane: &mut Lane, done: Done) -> Result<(), PairBroken> {
        match done {
            Done::Sent(_) => Ok(()),
            Done::Received(buffer, len) => {
                let bytes = lane.pair.received(buffer, len);
                // The buffer is free before the sender learns that it may announce more.
                lane.pair.receive_into(buffer)?;
                self.placed(lane, &bytes)
            }
            Done::Bound(window) => {
                let transfer = lane.transfer_of(window);
                if let Some((transfer, grant)) = transfer.and_then(|t| Some((t, lane.grants.get_mut(&t)?))) {
                    grant.stage = Stage::Given;
                    self.reply(Kind::Granted, transfer, 0, u64::from(lane.pair.key(window)));
                }
                Ok(())
            }
            Done::Invalidated(window) => {
                if let Some(transfer) = lane.transfer_of(window) {
                    // Nothing can be written any more: the landing moves on.
                    lane.grants.remove(&transfer);
                }
                Ok(())
            }
        }
    }

    /// Cells that were written before this announcement: verifies and acknowledges them.
    fn placed(&mut self, lane: &Lane, bytes: &[u8]) -> Result<(), PairBroken> {
        let (head, body) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or_else(|| nonsense("nothing"))?;
        let header = Header::parse(head)
            .filter(|h| h.kind == Kind::Placed && h.is_bounded() && h.body_bytes as usize == body.len())
            .filter(|h| h.body_crc == crc32c::crc32c(body))
            .ok_or_else(|| nonsense("nonsense"))?;
        let landing = self.attached.get(&header.transfer).and_then(Weak::upgrade);
        let Some(landing) = landing.filter(|landing| landing.refusal().is_none()) else {
            let refusal = self.refusal(header.transfer).unwrap_or(crate::Refusal::Unknown);
            self.reply(Kind::Refused, header.transfer, header.seq, refusal as u64);
            return Ok(());
        };
        landing.check_time(Instant::now());
        let bad = self.verify(lane, &landing, body)?;
        match landing.refusal() {
            Some(refusal) => self.reply(Kind::Refused, header.transfer, header.seq, refusal as u64),
            None => self.reply(Kind::Ack, header.transfer, header.seq, bad),
        }
        Ok(())
    }

    /// Checks cells where they lie; the mask of those to be sent again.
    fn verify(&mut self, lane: &Lane, landing: &Arc<LandingShared>, body: &[u8]) -> Result<u64, PairBroken> {
        let receiver = self.receiver.clone();
        let mut cells = Vec::new();
        for cell in CellDescriptor::parse_all(body) {
            let place = landing.place(&receiver, cell.plane, cell.index);
            let (id, place) = place.ok_or_else(|| nonsense("a cell outside the ticket"))?;
            cells.push((id, place, cell.checksum));
        }
        let (mut bad, mut duplicates) = (0_u64, 0);
        let claims: Vec<Claim> =
            landing.claim(|state| cells.iter().map(|(id, ..)| state.claim(*id)).collect());
        // While this lives the memory stays with the landing, whoever revokes it.
        let Some(write) = landing.begin() else { return Ok(0) };
        let (mut checked, mut places) = (Vec::with_capacity(cells.len()), Vec::with_capacity(cells.len()));
        for (at, ((cell, place, checksum), claim)) in cells.into_iter().zip(claims).enumerate() {
            match claim {
                Claim::Granted => {
                    places.push(place);
                    checked.push(Checked { at, cell, checksum, good: false });
                }
                Claim::Busy => bad |= 1 << at,
                Claim::Duplicate => duplicates += 1,
                Claim::Outside | Claim::Over => {}
            }
        }
        let sums = lane.sums(&receiver.region, &places, landing.cell_bytes);
        for (cell, sum) in checked.iter_mut().zip(sums.iter().flatten()) {
            cell.good = *sum == cell.checksum;
        }
        let fresh: usize = places.iter().map(Range::len).sum();
        let failed = write.finish((fresh, Transport::Rdma, lane.pair.side()), &checked);
        receiver.counters.bytes.add(fresh as u64);
        receiver.counters.rdma_bytes.add(fresh as u64);
        receiver.counters.checksum_failures.add(u64::from(failed.count_ones()));
        receiver.counters.duplicate_cells.add(duplicates);
        if let Err(error) = sums {
            lane.pair.gives_up(&error.to_string());
            return Err(PairBroken(format!("what was written cannot be verified: {error}")));
        }
        if checked.is_empty() || lane.pair.proves(checked.iter().any(|cell| cell.good)) {
            return Ok(bad | failed);
        }
        Err(PairBroken("what was written is not in the device's memory".into()))
    }

    /// Answers the commits that waited for keys to be taken back.
    fn settle_commits(&mut self) {
        if self.commits.is_empty() {
            return;
        }
        for (transfer, seq) in std::mem::take(&mut self.commits) {
            let known = self.attached.get(&transfer).and_then(Weak::upgrade);
            let committed = match &known {
                Some(landing) => landing.phase() == crate::landing_state::LandingPhase::Committed,
                None => self.is_committed(transfer),
            };
            if committed {
                self.reply(Kind::CommitAck, transfer, seq, 0);
            } else if let Some(refusal) = self.refusal(transfer) {
                self.reply(Kind::Refused, transfer, seq, refusal as u64);
            } else {
                self.commits.push((transfer, seq));
            }
        }
    }
}

fn nonsense(what: &str) -> PairBroken {
    PairBroken(format!("{what} announced on the queue pair"))
}
