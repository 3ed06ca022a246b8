//! Everything that can happen next, in the real states' own words.

use kv_transport::fence::Fence;
use kv_transport::landing_state::{Claim, LandingEnd, LandingPhase, LandingState, Settled};
use kv_transport::push_state::{FrameBounds, Next, PushPhase, PushState, QueuedCell};
use kv_transport::{PushError, Refusal};

use crate::world::{Content, Message, Outcome, Read, Reservation, World, Write};

/// Attempts that the router makes.
const ATTEMPTS: u32 = 2;

#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    // Router.
    Place,
    GiveUp,
    Cancel,
    // Decode worker. Revoke stands for expiry, a stall, a lost connection, a closed stream.
    Revoke(Fence),
    WriteLands(usize),
    Token,
    DropSequence,
    CrashDecode,
    // Prefill worker. Close stands for a stall, a lost connection, a cancel.
    Compute(Fence),
    Speak(Fence),
    ReadEnds(usize),
    Close(Fence),
    CrashPrefill,
    // Network.
    Deliver(Message),
    Duplicate(Message),
    Flip(Message),
}

impl Step {
    /// Whether one side takes it by itself: no message need come for it, and nothing go wrong.
    pub fn is_local(&self) -> bool {
        !matches!(
            self,
            Self::Deliver(_) | Self::Duplicate(_) | Self::Flip(_) | Self::CrashDecode | Self::CrashPrefill
        )
    }
}

impl World {
    pub fn steps(&self, steps: &mut Vec<Step>) {
        let open = self.outcome.is_none();
        if open {
            steps.push(Step::Cancel);
            steps.push(if self.current.is_some() { Step::GiveUp } else { Step::Place });
        }
        steps.extend(self.landings.iter().filter(|(_, l)| l.state.is_open()).map(|(f, _)| Step::Revoke(*f)));
        steps.extend((0..self.writes.len()).map(Step::WriteLands));
        if let Some(fence) = self.running {
            steps.push(if self.current == Some(fence) { Step::Token } else { Step::DropSequence });
        }
        for (fence, push) in &self.pushes {
            if push.is_open() {
                steps.push(Step::Close(*fence));
            }
            if matches!(push.phase(), PushPhase::Opening | PushPhase::Pushing) {
                steps.push(Step::Compute(*fence));
            }
            if push.has_next() {
                steps.push(Step::Speak(*fence));
            }
        }
        steps.extend((0..self.reads.len()).map(Step::ReadEnds));
        steps.extend(self.network.iter().map(|message| Step::Deliver(*message)));
        if self.faults > 0 {
            steps.extend([Step::CrashDecode, Step::CrashPrefill]);
            for message in &self.network {
                steps.push(Step::Duplicate(*message));
                if matches!(message, Message::Write { .. }) {
                    steps.push(Step::Flip(*message));
                }
            }
        }
    }

    /// None when nothing changes.
    pub fn after(&self, step: &Step) -> Option<Self> {
        let mut next = self.clone();
        next.apply(step);
        next.settle();
        (next != *self).then_some(next)
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Place => self.place(),
            Step::GiveUp => {
                self.current = None;
                if self.attempts == ATTEMPTS {
                    self.end(Outcome::Failed);
                }
            }
            Step::Cancel => self.end(Outcome::Cancelled),
            Step::Revoke(fence) => {
                if let Some(landing) = self.landings.get_mut(fence) {
                    landing.state.revoke(LandingEnd::Revoked);
                }
            }
            Step::WriteLands(at) => self.write_lands(*at),
            Step::Token => self.token(),
            Step::DropSequence => {
                self.running = None;
                self.free = true;
            }
            Step::CrashDecode => self.crash_decode(),
            Step::CrashPrefill => self.crash_prefill(),
            Step::Compute(fence) => self.compute(*fence),
            Step::Speak(fence) => self.speak(*fence),
            Step::ReadEnds(at) => self.read_ends(*at),
            Step::Close(fence) => self.close(*fence, PushError::Stalled),
            Step::Deliver(message) => {
                self.network.remove(message);
                self.deliver(*message);
            }
            Step::Duplicate(message) => {
                self.faults -= 1;
                self.deliver(*message);
            }
            Step::Flip(message) => {
                self.faults -= 1;
                self.network.remove(message);
                if let Message::Write { fence, life, seq, cell, .. } = *message {
                    self.deliver(Message::Write { fence, life, seq, cell, content: Content::Garbage });
                }
            }
        }
    }

    fn end(&mut self, outcome: Outcome) {
        self.current = None;
        self.outcome = Some(outcome);
        self.ends += 1;
    }

    fn place(&mut self) {
        if !self.free {
            return;
        }
        self.free = false;
        self.attempts += 1;
        self.generation += 1;
        let (incarnation, generation, attempt) = (self.incarnation, self.generation, self.attempts);
        let fence = Fence { incarnation, generation, attempt };
        self.landings
            .insert(fence, Reservation { state: LandingState::new(self.memory.len()), sender: None });
        self.current = Some(fence);
        self.network.insert(Message::Prefill(fence));
    }

    fn token(&mut self) {
        if let Some(fence) = self.running {
            self.wrong_token |= self.memory.iter().any(|cell| *cell != Some(Content::Of(fence.attempt)));
            self.end(Outcome::Done);
        }
    }

    fn crash_decode(&mut self) {
        self.faults -= 1;
        self.incarnation += 1;
        self.generation = 0;
        self.landings.clear();
        self.ended.clear();
        self.writes.clear();
        self.memory.fill(None);
        self.running = None;
        self.free = true;
    }

    fn crash_prefill(&mut self) {
        self.faults -= 1;
        self.life += 1;
        self.pushes.clear();
        self.seen.clear();
        self.reads.clear();
        self.source = None;
    }

    fn write_lands(&mut self, at: usize) {
        let Write { landing, ticket, life, seq, cell, content } = self.writes.remove(at);
        self.memory[cell] = Some(content);
        let Some(reservation) = self.landings.get_mut(&landing) else { return };
        let settled = reservation.state.settle(cell, content == Content::Of(ticket.attempt));
        reservation.state.write_ends();
        if reservation.state.phase() == LandingPhase::Committed {
            // The commit came before this cell.
            self.network.insert(Message::Committed(ticket, life));
        }
        self.network.insert(match settled {
            Settled::Verified => Message::Acked { fence: ticket, life, seq, bad: false },
            Settled::Refetch => Message::Acked { fence: ticket, life, seq, bad: true },
            Settled::GaveUp | Settled::Ignored => Message::Refused { fence: ticket, life, of_commit: false },
        });
    }

    fn compute(&mut self, fence: Fence) {
        let Some(push) = self.pushes.get_mut(&fence) else { return };
        if self.computed == self.memory.len() {
            // Refused once the push is over: nothing changes then.
            let _ = push.commit();
            return;
        }
        let cell = QueuedCell { plane: self.computed as u32, index: 0, src_slot: 0, checksum: 0 };
        push.queue(&[cell]).unwrap();
        self.computed += 1;
    }

    fn speak(&mut self, fence: Fence) {
        let Some(push) = self.pushes.get_mut(&fence) else { return };
        match push.next() {
            Next::Nothing => {}
            Next::Attach => drop(self.network.insert(Message::Attach(fence, self.life))),
            Next::Write { seq, cells } => {
                assert!(push.read_begins());
                self.reads.push(Read { fence, seq, cell: cells[0].plane as usize });
            }
            Next::Commit => drop(self.network.insert(Message::Commit(fence, self.life))),
            Next::Abort => drop(self.network.insert(Message::Abort(fence, self.life))),
        }
    }

    fn read_ends(&mut self, at: usize) {
        let Read { fence, seq, cell } = self.reads.remove(at);
        let content = self.source.unwrap_or(Content::Garbage);
        self.network.insert(Message::Write { fence, life: self.life, seq, cell, content });
        if let Some(push) = self.pushes.get_mut(&fence) {
            push.read_ends();
        }
    }

    fn close(&mut self, fence: Fence, why: PushError) {
        if let Some(push) = self.pushes.get_mut(&fence) {
            push.close(why);
        }
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::Prefill(fence) => self.prefill(fence),
            Message::Attach(fence, life)
            | Message::Commit(fence, life)
            | Message::Abort(fence, life)
            | Message::Write { fence, life, .. } => self.decode_hears(fence, life, message),
            Message::Attached(fence, life)
            | Message::Committed(fence, life)
            | Message::Refused { fence, life, .. }
            | Message::Acked { fence, life, .. }
                if life == self.life =>
            {
                self.prefill_hears(fence, message)
            }
            _ => {}
        }
    }

    fn prefill(&mut self, fence: Fence) {
        // A call that comes twice runs once; without room it is refused, and the router's attempt times out.
        if self.pushes.is_empty() && self.seen.insert(fence) {
            let cells = self.memory.len();
            let bounds = FrameBounds { cells: 1, bytes: 1, window_bytes: cells };
            self.pushes.insert(fence, PushState::new(cells, 1, 1, bounds));
            self.source = Some(Content::Of(fence.attempt));
            self.computed = 0;
        }
    }

    fn prefill_hears(&mut self, fence: Fence, message: Message) {
        let Some(push) = self.pushes.get_mut(&fence) else { return };
        if !matches!(message, Message::Refused { .. }) {
            // Every frame goes behind the ticket, and so does its answer behind the ticket's.
            push.attached();
        }
        match message {
            Message::Acked { seq, bad, .. } => push.acked(seq, u64::from(bad)),
            Message::Committed(..) => push.commit_acked(),
            Message::Refused { of_commit, .. } => push.refused(Refusal::Stale, of_commit),
            _ => {}
        }
    }

    fn decode_hears(&mut self, ticket: Fence, life: u8, message: Message) {
        let refused =
            Message::Refused { fence: ticket, life, of_commit: matches!(message, Message::Commit(..)) };
        let Some((landing, reservation)) = self.landings.iter_mut().find(|(f, _)| f.admits(&ticket)) else {
            let committed = matches!(message, Message::Commit(..)) && self.ended.get(&ticket) == Some(&true);
            self.network.insert(if committed { Message::Committed(ticket, life) } else { refused });
            return;
        };
        if *reservation.sender.get_or_insert(life) != life {
            self.network.insert(refused);
            return;
        }
        let state = &mut reservation.state;
        let reply = match message {
            Message::Attach(..) if state.is_open() => Some(Message::Attached(ticket, life)),
            Message::Commit(..) if state.is_open() => {
                state.commit_arrives();
                (state.phase() == LandingPhase::Committed).then_some(Message::Committed(ticket, life))
            }
            Message::Abort(..) => {
                state.revoke(LandingEnd::Aborted);
                None
            }
            Message::Write { seq, cell, content, .. } => match state.claim(cell) {
                Claim::Granted if state.write_begins() => {
                    self.writes.push(Write { landing: *landing, ticket, life, seq, cell, content });
                    None
                }
                Claim::Duplicate => Some(Message::Acked { fence: ticket, life, seq, bad: false }),
                Claim::Busy => Some(Message::Acked { fence: ticket, life, seq, bad: true }),
                _ => Some(refused),
            },
            _ => Some(refused),
        };
        self.network.extend(reply);
    }

    /// What the owners do by themselves when a state has moved: take, release, forget.
    fn settle(&mut self) {
        while let Some((fence, phase)) = self
            .landings
            .iter()
            .map(|(f, l)| (*f, l.state.phase()))
            .find(|(_, p)| matches!(p, LandingPhase::Void | LandingPhase::Committed))
        {
            self.landings.remove(&fence);
            let committed = phase == LandingPhase::Committed;
            self.ended.insert(fence, committed);
            if committed {
                self.running = Some(fence);
            } else {
                self.free = true;
            }
        }
        for push in self.pushes.values_mut().filter(|push| push.phase() == PushPhase::Committed) {
            push.close(PushError::Closed);
        }
        self.pushes.retain(|_, push| push.phase() != PushPhase::Closed || push.has_next());
        self.forget_dead_letters();
    }

    /// Answers to a push that is over, and its own messages once no landing listens or will: they can do nothing any more, and would
    /// only multiply the states by every order in which they come. That a later landing turns them away is not taken for granted.
    fn forget_dead_letters(&mut self) {
        let (pushes, now) = (&self.pushes, self.life);
        let listens = !self.landings.is_empty() || self.outcome.is_none() && self.attempts < ATTEMPTS;
        self.network.retain(|message| match *message {
            Message::Prefill(_) => true,
            Message::Attach(fence, life)
            | Message::Commit(fence, life)
            | Message::Abort(fence, life)
            | Message::Write { fence, life, .. } => listens || life == now && pushes.contains_key(&fence),
            Message::Attached(fence, life)
            | Message::Committed(fence, life)
            | Message::Refused { fence, life, .. }
            | Message::Acked { fence, life, .. } => life == now && pushes.contains_key(&fence),
        });
    }
}
