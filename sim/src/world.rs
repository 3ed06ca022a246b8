//! The loop: takes the next event, lets the real values decide, notes when what follows from it happens.

mod door;
mod work;

use std::collections::HashMap;

use decode_worker::scheduler::{self as decode_rules, LocalPrefill};
use engine::roofline::kv_bytes_per_token;
use engine::sim::Cost;
use prefill_worker::scheduler as prefill_rules;
use rand::SeedableRng;
use rand::rngs::StdRng;
use router::fair_queue::FairQueue;

use crate::clock::{Clock, Event, Ns, ns};
use crate::decode::{DecodeWorker, Drawn};
use crate::load::Planned;
use crate::prefill::PrefillWorker;
use crate::record::Record;
use crate::report::Report;
use crate::request::Live;
use crate::route::Router;
use crate::{Cluster, SimError, Strategy};

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
