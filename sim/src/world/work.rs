//! A request on its workers: prompts computed, KV on its way, tokens drawn, the end.

use std::collections::HashMap;
use std::rc::Rc;

use engine::kv::pool::BlockState;

use super::World;
use crate::choice::Choice;
use crate::clock::{Event, Ns, ns};
use crate::prefill::Brought;
use crate::request::Ended;
use crate::route::Pool;

/// As in the workers' loops, when all blocks are held by others.
const BLOCKED_WAIT: Ns = 5_000_000;

/// When a worker's loop goes on: at the end of the step that it began, or, where it has work but no blocks for it, after a while.
fn next_look(took: Option<Ns>, has_work: bool, looks_at: &mut Ns, now: Ns) -> Option<Ns> {
    if took.is_none() && has_work && *looks_at <= now {
        *looks_at = now + BLOCKED_WAIT;
        return Some(*looks_at);
    }
    took.map(|took| now + took)
}

impl World {
    pub(super) fn begin_prefill(&mut self, number: u32) {
        let worker = &mut self.prefill[number as usize];
        let now = self.clock.now();
        let took = worker.begin(&self.cost, now);
        if let Some(at) = next_look(took, worker.has_jobs(), &mut worker.looks_at, now) {
            self.clock.at(at, Event::PrefillStep(number));
        }
        self.router.report(Pool::Prefill, number, worker.load(), worker.pool.available());
    }

    pub(super) fn prefill_step(&mut self, number: u32) {
        if self.prefill[number as usize].is_busy_at(self.clock.now()) {
            return;
        }
        let Brought { pushes, computed } = self.prefill[number as usize].end(self.cluster.shape.layers);
        let mut arrivals: HashMap<u32, Ns> = HashMap::new();
        for push in pushes {
            let at = self.push(number, push.request, push.from, push.to, push.first_layer, push.last_layer);
            arrivals.insert(push.request, at);
        }
        for done in computed {
            let at = arrivals.get(&done.request).copied().unwrap_or_else(|| self.clock.now());
            let Some(live) = self.live.get_mut(&done.request) else { continue };
            self.record.wanted_tokens += live.prompt as u64;
            self.record.hit_tokens += done.cached as u64;
            (live.prefill_queue, live.prefill_compute) = (done.queue, done.compute);
            (live.prefill_cached, live.source) = (done.cached, done.source);
            self.clock.at(at, Event::Landed(done.request));
            self.clock.at(at + self.hop, Event::PrefillReply(done.request));
        }
        self.begin_prefill(number);
    }

    /// When the blocks `from..to` that the decode worker lacks have arrived: layers leave as they are final, both links carry
    /// one thing after the other.
    fn push(&mut self, number: u32, request: u32, from: usize, to: usize, first: Ns, last: Ns) -> Ns {
        let Some(live) = self.live.get(&request) else { return last };
        let link = self.cluster.profile.link;
        let blocks = to.saturating_sub(from.max(live.cached.len()));
        let bytes = blocks as f64 * self.block_bytes;
        let (sender, receiver) = (&mut self.prefill[number as usize], &mut self.decode[live.decode as usize]);
        let start = first.max(sender.link_free).max(receiver.link_free);
        let layers = self.cluster.shape.layers.max(1) as f64;
        let after_last = last + ns(bytes / layers / link.bytes_per_second);
        let there = after_last.max(start + ns(bytes / link.bytes_per_second));
        if blocks > 0 {
            sender.link_free = there;
            receiver.link_free = there;
        }
        there + ns(link.latency_seconds)
    }

    pub(super) fn landed(&mut self, request: u32) {
        let Some(live) = self.live.get_mut(&request) else { return };
        let now = self.clock.now();
        live.source.clear();
        let worker = &mut self.decode[live.decode as usize];
        worker.reserved -= 1;
        let mut choice = Choice::new(request, live.prompt, live.output, Rc::clone(&live.chain), live.arrived);
        choice.published = live.cached.len();
        let reserved = std::mem::take(&mut live.reserved);
        reserved.iter().for_each(|block| block.set_state(BlockState::Running));
        choice.blocks = std::mem::take(&mut live.cached);
        let bytes = reserved.len() as f64 * self.block_bytes;
        choice.blocks.extend(reserved);
        choice.advance(live.prompt, &worker.pool, self.cluster.block_tokens);
        choice.expected = live.expected.take();
        // The first token rode in the commit.
        (choice.tokens, choice.first, choice.last) = (live.prompt + 1, now, now);
        self.record.first(live.arrived, now + self.hop);
        self.router.holds(Pool::Decode, live.decode, &live.chain);
        if live.output <= 1 {
            return self.end(&choice, now);
        }
        worker.land(choice, bytes);
        self.wake_decode(request);
    }

    pub(super) fn prefill_reply(&mut self, request: u32) {
        // A short answer can be over already; what was learned of it is lost then.
        let Some(live) = self.live.get_mut(&request) else { return };
        let Some(prefill) = live.prefill else { return };
        if std::mem::take(&mut live.is_assigned) {
            self.router.unassign(Pool::Prefill, prefill, live.prompt);
        }
        let computed = live.prompt - live.prefill_cached;
        let whole = self.clock.now() - live.placed;
        self.router.learn(whole, live.prefill_queue, live.prefill_compute, computed);
        self.router.holds(Pool::Prefill, prefill, &live.chain);
    }

    pub(super) fn wake_decode(&mut self, request: u32) {
        let Some(live) = self.live.get(&request) else { return };
        let number = live.decode;
        if self.decode[number as usize].is_idle() {
            self.begin_decode(number);
        }
    }

    fn begin_decode(&mut self, number: u32) {
        let worker = &mut self.decode[number as usize];
        let now = self.clock.now();
        let took = worker.begin(&self.cost, now);
        if let Some(at) = next_look(took, worker.has_work(), &mut worker.looks_at, now) {
            self.clock.at(at, Event::DecodeStep(number));
        }
        self.router.report(Pool::Decode, number, worker.load(), worker.pool.available());
    }

    pub(super) fn decode_step(&mut self, number: u32) {
        let now = self.clock.now();
        if self.decode[number as usize].is_busy_at(now) {
            return;
        }
        let mut drawn = std::mem::take(&mut self.drawn);
        self.decode[number as usize].end(now, &mut drawn);
        for token in drawn.drain(..) {
            match &token.ended {
                Some(choice) => self.end(choice, now),
                None if token.is_first => {
                    self.record.first(token.arrived, now + self.hop);
                    if let Some(live) = self.live.get(&token.request) {
                        self.router.learn_local(live.local_tokens, now + self.hop - live.placed);
                        self.router.holds(Pool::Decode, number, &live.chain);
                    }
                }
                None => self.record.gap(token.arrived, now - token.previous),
            }
        }
        self.drawn = drawn;
        self.begin_decode(number);
    }

    fn end(&mut self, choice: &Choice, now: Ns) {
        let Some(live) = self.live.remove(&choice.request) else { return };
        self.router.unassign(Pool::Decode, live.decode, 0);
        self.decode[live.decode as usize].ended(live.output);
        if let Some(prefill) = live.prefill.filter(|_| live.is_assigned) {
            self.router.unassign(Pool::Prefill, prefill, live.prompt);
        }
        self.record.ended(&Ended {
            arrived: live.arrived,
            first: choice.first + self.hop,
            last: now + self.hop,
            prompt: live.prompt,
            output: live.output,
        });
        self.ended += 1;
        self.leave();
    }
}
