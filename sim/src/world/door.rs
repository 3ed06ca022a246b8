//! A request until a worker has it: at the door, placed, reserved, shed.

use std::rc::Rc;

use engine::kv::pool::BlockState;

use super::World;
use crate::choice::Choice;
use crate::clock::{Event, Ns, ns};
use crate::request::Live;
use crate::route::Pool;

/// As in the router's journey: full workers are asked again after this, then after twice as long, up to sixteen times.
const SHED_PAUSE: Ns = 20_000_000;
const MAX_SHED_PAUSE: Ns = 320_000_000;
/// One client: traces do not say whose requests they are.
const CLIENT: u64 = 0;

impl World {
    /// At the door: in, into the queue, or away.
    pub(super) fn arrive(&mut self) {
        let number = self.next as u32;
        let planned = &self.plan[self.next];
        let now = self.clock.now();
        let live = Live {
            prompt: planned.prompt,
            output: planned.output,
            chain: planned.chain(number, self.cluster.block_tokens).into(),
            arrived: now,
            placed: now,
            looking_since: now,
            pause: SHED_PAUSE,
            is_admitted: false,
            decode: 0,
            prefill: None,
            is_assigned: false,
            local_max: 0,
            local_tokens: 0,
            cached: Vec::new(),
            reserved: Vec::new(),
            expected: None,
            source: Vec::new(),
            prefill_queue: 0,
            prefill_compute: 0,
            prefill_cached: 0,
        };
        self.next += 1;
        if let Some(next) = self.plan.get(self.next) {
            self.clock.at(next.at, Event::Arrive);
        }
        let is_full = self.running >= self.cluster.max_running || !self.queue.is_empty();
        if is_full && self.queue.len() >= self.cluster.max_running {
            self.record.shed(now);
            self.ended += 1;
            return;
        }
        let tokens = live.prompt + live.output;
        self.live.insert(number, live);
        match is_full {
            false => self.enter(number),
            true => {
                self.queue.push(CLIENT, tokens, number);
                self.clock.after(self.patience(), Event::GiveUp(number));
            }
        }
    }

    fn patience(&self) -> Ns {
        ns(self.cluster.patience_seconds)
    }

    fn enter(&mut self, request: u32) {
        self.running += 1;
        if let Some(live) = self.live.get_mut(&request) {
            live.is_admitted = true;
            live.looking_since = self.clock.now();
        }
        self.clock.after(0, Event::Place(request));
    }

    pub(super) fn give_up(&mut self, request: u32) {
        if self.live.get(&request).is_some_and(|live| !live.is_admitted) {
            self.queue.remove(CLIENT, |waiting| *waiting == request);
            self.forget(request);
        }
    }

    /// Shed: the client hears of it.
    fn forget(&mut self, request: u32) {
        if let Some(live) = self.live.remove(&request) {
            self.record.shed(live.arrived);
            self.ended += 1;
        }
    }

    /// A place at the door is free.
    pub(super) fn leave(&mut self) {
        self.running -= 1;
        if let Some(next) = self.queue.pop() {
            self.enter(next);
        }
    }

    pub(super) fn place(&mut self, request: u32) {
        let Some(live) = self.live.get_mut(&request) else { return };
        live.placed = self.clock.now();
        let Some(placed) = self.router.place(live.prompt, &live.chain) else { return };
        (live.decode, live.prefill, live.local_max) = (placed.decode, placed.prefill, placed.local_max);
        live.local_tokens = placed.local_tokens;
        self.router.assign(Pool::Decode, placed.decode, 0);
        if let Some(prefill) = placed.prefill {
            self.router.assign(Pool::Prefill, prefill, live.prompt);
            live.is_assigned = true;
        }
        self.clock.after(self.hop, Event::Reserve(request));
    }

    /// On the decode worker: what is there, what is missing, whether there is room.
    pub(super) fn reserve(&mut self, request: u32) {
        let Some(live) = self.live.get_mut(&request) else { return };
        let block_tokens = self.cluster.block_tokens;
        let worker = &mut self.decode[live.decode as usize];
        if worker.sequences() >= self.cluster.max_sequences + self.cluster.max_waiting {
            return self.try_again(request);
        }
        let reusable = ((live.prompt - 1) / block_tokens).min(live.chain.len());
        let cached = worker.pool.lookup(&live.chain[..reusable]);
        let uncached = live.prompt - cached.len() * block_tokens;
        let missing = live.prompt.div_ceil(block_tokens) - cached.len();
        let Ok(expected) = worker.expect(missing, live.output) else {
            return self.try_again(request);
        };
        let cached_tokens = (cached.len() * block_tokens) as u64;
        let is_local = live.prefill.is_none() || uncached <= live.local_max;
        if is_local {
            self.record.local += 1;
            self.record.wanted_tokens += live.prompt as u64;
            self.record.hit_tokens += cached_tokens;
            if let Some(prefill) = live.prefill.take() {
                self.router.unassign(Pool::Prefill, prefill, live.prompt);
                live.is_assigned = false;
            }
            let chain = Rc::clone(&live.chain);
            let mut choice = Choice::new(request, live.prompt, live.output, chain, live.arrived);
            choice.published = cached.len();
            choice.computed = cached.len() * block_tokens;
            choice.blocks = cached;
            choice.expected = Some(expected);
            worker.admit(choice);
            return self.wake_decode(request);
        }
        let Ok(reserved) = worker.pool.alloc(missing, BlockState::Reserved) else {
            return self.try_again(request);
        };
        worker.reserved += 1;
        self.record.remote += 1;
        self.record.remote_blocks += (missing + cached.len()) as u64;
        self.record.saved_blocks += cached.len() as u64;
        (live.cached, live.reserved, live.expected) = (cached, reserved, Some(expected));
        // The ticket goes back to the router, the prompt on to the prefill worker.
        self.clock.after(2 * self.hop, Event::Submit(request));
    }

    /// The worker was full: again, after a pause, until patience ends.
    fn try_again(&mut self, request: u32) {
        let Some(live) = self.live.get_mut(&request) else { return };
        self.router.unassign(Pool::Decode, live.decode, 0);
        if let Some(prefill) = live.prefill.filter(|_| std::mem::take(&mut live.is_assigned)) {
            self.router.unassign(Pool::Prefill, prefill, live.prompt);
        }
        self.record.retries += 1;
        let now = self.clock.now();
        if now - live.looking_since >= ns(self.cluster.patience_seconds) {
            self.forget(request);
            return self.leave();
        }
        let pause = live.pause;
        live.pause = (pause * 2).min(MAX_SHED_PAUSE);
        self.clock.after(self.hop + pause, Event::Place(request));
    }

    pub(super) fn submit(&mut self, request: u32) {
        let Some(live) = self.live.get(&request) else { return };
        let Some(prefill) = live.prefill else { return };
        let worker = &mut self.prefill[prefill as usize];
        worker.submit(request, live.prompt, Rc::clone(&live.chain), self.clock.now());
        if worker.is_idle() {
            self.begin_prefill(prefill);
        }
    }
}
