//! The loop: takes the next event, lets the real values decide, notes when what follows from it happens.

use std::collections::HashMap;
use std::rc::Rc;

use decode_worker::scheduler::{self as decode_rules, LocalPrefill};
use engine::kv::pool::BlockState;
use engine::roofline::kv_bytes_per_token;
use engine::sim::Cost;
use prefill_worker::scheduler as prefill_rules;
use rand::SeedableRng;
use rand::rngs::StdRng;
use router::fair_queue::FairQueue;

use crate::choice::Choice;
use crate::clock::{Clock, Event, Ns, ns};
use crate::decode::{DecodeWorker, Drawn};
use crate::load::Planned;
use crate::prefill::{Brought, PrefillWorker};
use crate::record::Record;
use crate::report::Report;
use crate::request::{Ended, Live};
use crate::route::{Pool, Router};
use crate::{Cluster, SimError, Strategy};

/// As in the router's journey: full workers are asked again after this, then after twice as long, up to sixteen times.
const SHED_PAUSE: Ns = 20_000_000;
const MAX_SHED_PAUSE: Ns = 320_000_000;
/// As in the workers' loops, when all blocks are held by others.
const BLOCKED_WAIT: Ns = 5_000_000;
/// One client: traces do not say whose requests they are.
const CLIENT: u64 = 0;
/// Events between two words about progress.
const TALK: u64 = 1 << 16;

pub(crate) struct World {
    cluster: Cluster,
    plan: Vec<Planned>,
    next: usize,
    seed: u64,
    clock: Clock,
    cost: Cost,
    router: Router,
    prefill: Vec<PrefillWorker>,
    decode: Vec<DecodeWorker>,
    live: HashMap<u32, Live>,
    queue: FairQueue<u32>,
    running: usize,
    record: Record,
    block_bytes: f64,
    hop: Ns,
    ended: usize,
    drawn: Vec<Drawn>,
}

impl World {
    pub(crate) fn new(cluster: Cluster, plan: Vec<Planned>, seed: u64, warm_up_seconds: f64) -> Self {
        let two = cluster.strategy.has_two_pools();
        let workers =
            if two { [cluster.prefill, cluster.decode] } else { [0, cluster.prefill + cluster.decode] };
        let block_tokens = cluster.block_tokens;
        let prefill_rules = prefill_rules::Rules {
            step_tokens: cluster.prefill_step_tokens,
            max_prompts: cluster.max_sequences,
            block_tokens,
        };
        // As workers are started for these strategies: whole prompts get the room of a prefill step.
        let (prefill, step_tokens) = match cluster.strategy {
            Strategy::Shared => (LocalPrefill::Shared, cluster.prefill_step_tokens),
            Strategy::Chunked => (LocalPrefill::Chunked, cluster.chunk_tokens),
            Strategy::Priority => (LocalPrefill::Priority, cluster.prefill_step_tokens),
            Strategy::Disaggregated | Strategy::Adaptive => (LocalPrefill::Priority, cluster.chunk_tokens),
        };
        let decode_rules = decode_rules::Rules {
            step_tokens,
            max_choices: cluster.max_sequences,
            block_tokens,
            prefill,
            chunk_tokens: step_tokens,
            itl_limit_ms: cluster.slo.itl_ms,
        };
        let profile = &cluster.profile;
        let landing = match cluster.seals {
            true => profile.landing_bytes_per_second * profile.devices as f64,
            false => f64::INFINITY,
        };
        let random = StdRng::seed_from_u64(seed ^ 0x7461_6e64_656d);
        Self {
            router: Router::new(cluster.strategy, workers, block_tokens, cluster.blocks, random),
            cost: Cost::new(&cluster.shape, &cluster.profile),
            prefill: (0..workers[0]).map(|_| PrefillWorker::new(cluster.blocks, prefill_rules)).collect(),
            decode: (0..workers[1])
                .map(|_| DecodeWorker::new(cluster.blocks, decode_rules, landing))
                .collect(),
            record: Record::new(cluster.slo, ns(warm_up_seconds)),
            block_bytes: kv_bytes_per_token(&cluster.shape, cluster.profile.kv) * block_tokens as f64,
            hop: ns(cluster.profile.hop_seconds),
            cluster,
            plan,
            next: 0,
            seed,
            clock: Clock::default(),
            live: HashMap::new(),
            queue: FairQueue::default(),
            running: 0,
            ended: 0,
            drawn: Vec::new(),
        }
    }

    pub(crate) fn run(mut self, progress: &mut dyn FnMut(usize, usize, f64)) -> Result<Report, SimError> {
        if let Some(first) = self.plan.first() {
            self.clock.at(first.at, Event::Arrive);
        }
        let mut events = 0;
        while let Some(event) = self.clock.next() {
            self.handle(event);
            events += 1;
            if events % TALK == 0 {
                progress(self.ended, self.plan.len(), self.clock.now() as f64 / 1e9);
            }
        }
        self.check()?;
        Ok(self.report(events))
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive => self.arrive(),
            Event::GiveUp(request) => self.give_up(request),
            Event::Place(request) => self.place(request),
            Event::Reserve(request) => self.reserve(request),
            Event::Submit(request) => self.submit(request),
            Event::Landed(request) => self.landed(request),
            Event::PrefillReply(request) => self.prefill_reply(request),
            Event::PrefillStep(worker) => self.prefill_step(worker),
            Event::DecodeStep(worker) => self.decode_step(worker),
        }
    }

    /// At the door: in, into the queue, or away.
    fn arrive(&mut self) {
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

    fn give_up(&mut self, request: u32) {
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
    fn leave(&mut self) {
        self.running -= 1;
        if let Some(next) = self.queue.pop() {
            self.enter(next);
        }
    }

    fn place(&mut self, request: u32) {
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
    fn reserve(&mut self, request: u32) {
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

    fn submit(&mut self, request: u32) {
        let Some(live) = self.live.get(&request) else { return };
        let Some(prefill) = live.prefill else { return };
        let worker = &mut self.prefill[prefill as usize];
        worker.submit(request, live.prompt, Rc::clone(&live.chain), self.clock.now());
        if worker.is_idle() {
            self.begin_prefill(prefill);
        }
    }

    fn begin_prefill(&mut self, number: u32) {
        let worker = &mut self.prefill[number as usize];
        let now = self.clock.now();
        match worker.begin(&self.cost, now) {
            Some(took) => self.clock.after(took, Event::PrefillStep(number)),
            None if worker.has_jobs() && worker.looks_at <= now => {
                worker.looks_at = now + BLOCKED_WAIT;
                self.clock.at(worker.looks_at, Event::PrefillStep(number));
            }
            None => {}
        }
        self.router.report(Pool::Prefill, number, worker.load(), worker.pool.available());
    }

    fn prefill_step(&mut self, number: u32) {
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

    fn landed(&mut self, request: u32) {
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

    fn prefill_reply(&mut self, request: u32) {
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

    fn wake_decode(&mut self, request: u32) {
        let Some(live) = self.live.get(&request) else { return };
        let number = live.decode;
        if self.decode[number as usize].is_idle() {
            self.begin_decode(number);
        }
    }

    fn begin_decode(&mut self, number: u32) {
        let worker = &mut self.decode[number as usize];
        let now = self.clock.now();
        match worker.begin(&self.cost, now) {
            Some(took) => self.clock.after(took, Event::DecodeStep(number)),
            None if worker.has_work() && worker.looks_at <= now => {
                worker.looks_at = now + BLOCKED_WAIT;
                self.clock.at(worker.looks_at, Event::DecodeStep(number));
            }
            None => {}
        }
        self.router.report(Pool::Decode, number, worker.load(), worker.pool.available());
    }

    fn decode_step(&mut self, number: u32) {
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

    /// Nothing may be left over, and every pool must balance.
    fn check(&self) -> Result<(), SimError> {
        let broken = |what: String| Err(SimError::Broken(what));
        if self.ended != self.plan.len() || !self.live.is_empty() {
            return broken(format!("{} of {} requests ended", self.ended, self.plan.len()));
        }
        let pools = self.prefill.iter().map(|w| &w.pool).chain(self.decode.iter().map(|w| &w.pool));
        for pool in pools {
            let counts = pool.counts();
            if counts.running + counts.reserved + counts.quarantined > 0 {
                return broken(format!("blocks were leaked: {counts:?}"));
            }
            pool.check().map_err(SimError::Broken)?;
        }
        Ok(())
    }

    fn report(self, events: u64) -> Report {
        let [ttft_ms, itl_ms, tpot_ms, e2e_ms] = self.record.quantiles();
        let record = &self.record;
        let seconds = record.span.1.saturating_sub(record.span.0) as f64 / 1e9;
        let per_second = |n: f64| if seconds > 0.0 { n / seconds } else { 0.0 };
        let counted = (record.ok + record.shed).max(1) as f64;
        let now = self.clock.now().max(1) as f64;
        let share = |busy: u64, workers: usize| busy as f64 / now / workers.max(1) as f64;
        Report {
            strategy: self.cluster.strategy,
            workers: [self.prefill.len(), self.decode.len()],
            profile: self.cluster.profile.name.clone(),
            devices: self.cluster.profile.devices,
            seed: self.seed,
            slo: self.cluster.slo,
            requests: self.plan.len(),
            ok: record.ok,
            shed: record.shed,
            seconds,
            goodput: per_second(record.good as f64),
            within_slo: record.good as f64 / counted,
            output_tokens_per_second: per_second(record.output_tokens as f64),
            prompt_tokens_per_second: per_second(record.prompt_tokens as f64),
            ttft_ms,
            itl_ms,
            tpot_ms,
            e2e_ms,
            local_remote: [record.local, record.remote],
            prefix_hit_rate: record.hit_tokens as f64 / record.wanted_tokens.max(1) as f64,
            remote_blocks: record.remote_blocks,
            saved_blocks: record.saved_blocks,
            retries: record.retries,
            preemptions: self.decode.iter().map(|w| w.preemptions).sum(),
            busy: [
                share(self.prefill.iter().map(|w| w.busy).sum(), self.prefill.len()),
                share(self.decode.iter().map(|w| w.busy).sum(), self.decode.len()),
            ],
            largest_batch: self.decode.iter().map(|w| w.largest_batch).max().unwrap_or(0),
            reasons: self.router.reasons,
            events,
        }
    }
}
