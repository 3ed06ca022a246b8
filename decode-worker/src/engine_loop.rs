//! The thread that owns the engine: admits, plans, runs a step, hands tokens out. No async here.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use cluster::Load;
use engine::kv::pool::{Block, BlockPool};
use engine::{Batch, Engine, EngineError, KvLayout, Sampled, Segment};
use proto::v1::{self, decode_event::Event};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tonic::Status;
use worker::progress::Progress;
use worker::rate::Rate;
use worker::request::{Key, load_to_wire, sampled_to_wire};
use worker::{Request, attempts::Running};

use crate::choice::Choice;
use crate::metrics::LoopMetrics;
use crate::scheduler::{self, Rules};
use crate::seal::Seal;

/// How long to wait for blocks when every choice is blocked on ones that landings hold.
const BLOCKED_WAIT: Duration = Duration::from_millis(5);

/// Landed KV that is compared between two steps, at most: a few milliseconds' worth.
const UNSEAL_BYTES: usize = 32 << 20;

/// Where a request's events go. Closed by the client: the request is cancelled.
pub(crate) type Events = mpsc::UnboundedSender<Result<v1::DecodeEvent, Status>>;

/// A request that is ready to run.
pub(crate) struct Submission {
    pub request: Arc<Request>,
    pub events: Events,
    /// Blocks that hold the first `computed` tokens of the stem.
    pub blocks: Vec<Block>,
    /// Blocks that a transport wrote, into the pool's host side.
    pub arrived: Vec<u32>,
    pub computed: usize,
    /// How many of the blocks were here before anything landed.
    pub cached: usize,
    /// How it begins.
    pub start: Start,
    /// What guards its landed blocks.
    pub seal: Option<Seal>,
    /// Held until the request ends.
    pub hold: Hold,
}

/// How a request begins here.
pub(crate) enum Start {
    /// Its stem is prefilled here.
    Local,
    /// Its stem landed, with the tokens drawn at its end, already sent to the client.
    Landed(Vec<v1::SampledToken>),
    /// It ran elsewhere: by open choice, the blocks beyond the shared ones and the tokens drawn meanwhile.
    Moved(Vec<(Vec<Block>, Vec<u32>)>),
}

impl Submission {
    /// Gives up what landed damaged, and what stands on it: it is computed here again. Draws are a function, so
    /// tokens that the client has already come once more, and equal. `bad` counts landed blocks in their order.
    fn without(&mut self, bad: &[usize], block_tokens: usize) {
        let good = |from: usize, blocks: usize| {
            let first = bad.iter().filter(|at| (from..from + blocks).contains(*at)).min();
            first.map_or(blocks, |at| at - from)
        };
        let landed = self.blocks.len() - self.cached;
        let kept = good(0, landed);
        self.blocks.truncate(self.cached + kept);
        self.computed = self.computed.min(self.blocks.len() * block_tokens);
        match &mut self.start {
            Start::Landed(_) if kept < landed => self.start = Start::Local,
            Start::Local | Start::Landed(_) => {}
            Start::Moved(choices) => {
                let mut from = landed;
                for (own, _) in choices {
                    let blocks = own.len();
                    own.truncate(if kept < landed { 0 } else { good(from, blocks) });
                    from += blocks;
                }
            }
        }
        let own = match &self.start {
            Start::Moved(choices) => choices.as_slice(),
            Start::Local | Start::Landed(_) => &[],
        };
        let kept = self.blocks.iter().chain(own.iter().flat_map(|(own, _)| own)).map(Block::id);
        let kept: BTreeSet<u32> = kept.collect();
        self.arrived.retain(|id| kept.contains(id));
    }
}

/// What the loop is told. Moves are described in [`crate::moving`].
pub(crate) enum Order {
    /// Run this.
    Run(Submission),
    /// Show what a running request consists of.
    Portray { key: Key, attempt: u32, reply: oneshot::Sender<Option<Portrait>> },
    /// Let a request stand still; the reply has the tokens of these choices beyond those that are known, and
    /// all blocks. Nothing is stopped when one of them has ended.
    Stop { group: u64, known: Vec<(u32, usize)>, reply: oneshot::Sender<Option<Stopped>> },
    /// A request that stands still goes on.
    GoOn(u64),
    /// A request runs elsewhere now.
    Moved(u64),
}

/// A request that stands still: its newest tokens, and its blocks.
pub(crate) type Stopped = (Vec<v1::SampledToken>, Portrait);

/// A running request at one instant. Keeps its blocks.
pub(crate) struct Portrait {
    pub group: u64,
    choices: Vec<(u32, Vec<Block>)>,
}

impl Portrait {
    /// Ids of the choice's blocks, from the start of the sequence.
    pub fn blocks(&self, choice: u32) -> Option<Vec<u32>> {
        let (_, blocks) = self.choices.iter().find(|(index, _)| *index == choice)?;
        Some(blocks.iter().map(Block::id).collect())
    }

    /// What must be kept while it is read.
    pub fn into_blocks(self) -> Vec<Block> {
        self.choices.into_iter().flat_map(|(_, blocks)| blocks).collect()
    }
}

/// What a running request occupies besides blocks.
pub(crate) struct Hold {
    pub _slot: OwnedSemaphorePermit,
    pub attempt: Arc<Running>,
}

struct Group {
    request: Arc<Request>,
    events: Events,
    open: u32,
    finishes: Vec<v1::ChoiceFinish>,
    submitted: Instant,
    started: Option<Instant>,
    /// Prefill happens here; otherwise the KV has landed.
    local: bool,
    cached_tokens: u32,
    /// Stands still because it is about to run elsewhere.
    stopped: bool,
    /// The router was asked to move it.
    leaving: bool,
    hold: Hold,
}

/// The loop's whole state.
pub(crate) struct EngineLoop {
    pub engine: Box<dyn Engine>,
    pub pool: Arc<BlockPool>,
    pub rules: Rules,
    pub inbox: Receiver<Order>,
    pub load: Arc<watch::Sender<Load>>,
    layout: KvLayout,
    /// Landed, and not yet compared with what was sent.
    sealed: VecDeque<(Submission, Seal)>,
    choices: Vec<Choice>,
    groups: HashMap<u64, Group>,
    next_group: u64,
    rate: Rate,
    metrics: LoopMetrics,
    progress: Progress,
}

impl EngineLoop {
    pub fn new(
        engine: Box<dyn Engine>,
        pool: Arc<BlockPool>,
        rules: Rules,
        inbox: Receiver<Order>,
        load: Arc<watch::Sender<Load>>,
        metrics: LoopMetrics,
        progress: Progress,
    ) -> Self {
        let layout = *engine.kv().layout();
        Self {
            engine,
            pool,
            rules,
            inbox,
            load,
            layout,
            sealed: VecDeque::new(),
            choices: Vec::new(),
            groups: HashMap::new(),
            next_group: 0,
            rate: Rate::default(),
            metrics,
            progress,
        }
    }

    /// Runs until every sender of submissions is gone and the last request has ended.
    pub fn run(mut self) -> Result<(), EngineError> {
        loop {
            if self.choices.is_empty() && self.sealed.is_empty() {
                self.publish_load();
                self.progress.idle();
                match self.inbox.recv() {
                    Ok(order) => self.obey(order)?,
                    Err(_) => return Ok(()),
                }
                self.progress.step();
            }
            while let Ok(order) = self.inbox.try_recv() {
                self.obey(order)?;
            }
            self.drop_abandoned();
            self.unseal()?;
            self.ask_to_leave();
            self.step()?;
            debug_assert_eq!(self.pool.check(), Ok(()));
            self.publish_load();
        }
    }

    fn obey(&mut self, order: Order) -> Result<(), EngineError> {
        match order {
            Order::Run(mut submission) => match submission.seal.take() {
                Some(seal) => self.sealed.push_back((submission, seal)),
                None => self.admit(submission)?,
            },
            Order::Portray { key, attempt, reply } => drop(reply.send(self.portray(&key, attempt)?)),
            Order::Stop { group, known, reply } => {
                let stopped = self.stop(group, &known)?;
                let stands = stopped.is_some();
                if reply.send(stopped).is_err() && stands {
                    self.set_stopped(group, false);
                }
            }
            Order::GoOn(group) => self.set_stopped(group, false),
            Order::Moved(group) => {
                if let Some(group) = self.groups.remove(&group) {
                    let event = Some(Event::Moved(v1::Moved {}));
                    let _ = group.events.send(Ok(v1::DecodeEvent { event, load: None }));
                }
                self.drop_abandoned();
            }
        }
        Ok(())
    }

    /// Compares a bounded piece of what landed; what is whole begins to run.
    fn unseal(&mut self) -> Result<(), EngineError> {
        let began = Instant::now();
        let kv = self.engine.kv();
        let mut left = (UNSEAL_BYTES / self.layout.block_bytes().max(1)).max(1);
        let mut cells = 0;
        while let Some((submission, seal)) = self.sealed.front_mut() {
            let is_wanted = submission.hold.attempt.must_end().is_none() && !submission.events.is_closed();
            let done = if is_wanted { seal.check(kv.as_ref(), left) } else { 0 };
            left -= done;
            cells += done;
            if is_wanted && !seal.is_checked() {
                break;
            }
            let Some((mut submission, seal)) = self.sealed.pop_front() else { break };
            if !is_wanted {
                continue;
            }
            if !seal.bad().is_empty() {
                tracing::error!(request = %submission.request.id, blocks = seal.bad().len(),
                    "landed KV changed in the pool before its first step; computing it again");
                self.metrics.corrupt_blocks.increment(seal.bad().len() as u64);
                submission.without(seal.bad(), self.layout.block_tokens);
            }
            self.admit(submission)?;
        }
        if cells > 0 {
            self.metrics.verified(cells * self.layout.block_bytes(), began.elapsed());
        }
        Ok(())
    }

    fn portray(&mut self, key: &Key, attempt: u32) -> Result<Option<Portrait>, EngineError> {
        let is_it = |group: &Group| group.request.key == *key && group.request.attempt == attempt;
        let group = self.groups.iter().find(|(_, group)| is_it(group)).map(|(key, _)| *key);
        let Some(group) = group else { return Ok(None) };
        let ours = self.choices.iter().filter(|c| c.group == group && !c.is_stem());
        let choices: Vec<_> = ours.map(|c| (c.index, c.full_blocks(&self.layout).to_vec())).collect();
        self.publish(Portrait { group, choices }).map(Some)
    }

    /// Makes what a portrait shows readable for the transport.
    fn publish(&mut self, portrait: Portrait) -> Result<Portrait, EngineError> {
        let blocks = portrait.choices.iter().flat_map(|(_, blocks)| blocks.iter().map(Block::id));
        // Choices share blocks.
        let ids: BTreeSet<u32> = blocks.collect();
        self.engine.publish_blocks(&ids.into_iter().collect::<Vec<_>>())?;
        Ok(portrait)
    }

    fn stop(&mut self, group: u64, known: &[(u32, usize)]) -> Result<Option<Stopped>, EngineError> {
        let mut since = Vec::new();
        let mut choices = Vec::new();
        for (index, known) in known {
            let ours = |c: &&Choice| c.group == group && c.index == *index && !c.is_stem();
            let Some(choice) = self.choices.iter().find(ours) else { return Ok(None) };
            for (position, token_id) in choice.output().iter().enumerate().skip(*known) {
                let position = u32::try_from(position).unwrap_or(u32::MAX);
                since.push(v1::SampledToken { choice: *index, token_id: *token_id, logprob: None, position });
            }
            choices.push((*index, choice.used_blocks(&self.layout).to_vec()));
        }
        self.set_stopped(group, true);
        let portrait = self.publish(Portrait { group, choices })?;
        Ok(Some((since, portrait)))
    }

    fn set_stopped(&mut self, group: u64, stopped: bool) {
        if let Some(group) = self.groups.get_mut(&group) {
            group.stopped = stopped;
        }
    }

    /// While draining, every request whose choices all decode asks to be moved.
    fn ask_to_leave(&mut self) {
        if !self.load.borrow().draining {
            self.groups.values_mut().for_each(|group| group.leaving = false);
            return;
        }
        let load = load_to_wire(&self.load_now());
        for (key, group) in self.groups.iter_mut().filter(|(_, group)| !group.leaving) {
            if self.choices.iter().any(|c| c.group == *key && (c.is_stem() || c.view().pending > 1)) {
                continue;
            }
            group.leaving = true;
            let event = Some(Event::Leaving(v1::Leaving {}));
            let _ = group.events.send(Ok(v1::DecodeEvent { event, load: Some(load) }));
        }
    }

    fn admit(&mut self, submission: Submission) -> Result<(), EngineError> {
        let Submission { request, events, blocks, arrived, computed, start, hold, .. } = submission;
        self.engine.load_blocks(&arrived)?;
        let group = self.next_group;
        self.next_group += 1;
        self.groups.insert(
            group,
            Group {
                request: Arc::clone(&request),
                events,
                open: u32::try_from(request.open.len()).unwrap_or(u32::MAX),
                finishes: Vec::new(),
                submitted: Instant::now(),
                started: None,
                local: matches!(start, Start::Local),
                cached_tokens: u32::try_from(computed).unwrap_or(u32::MAX),
                stopped: false,
                leaving: false,
                hold,
            },
        );
        let stem = |blocks| {
            let mut stem = Choice::stem(Arc::clone(&request), group, blocks, 0);
            stem.advance(computed, &self.pool, &self.layout);
            stem
        };
        match start {
            Start::Local => {
                self.metrics.local_prefills.increment(1);
                self.choices.push(stem(blocks));
            }
            Start::Landed(tokens) => {
                let stem = stem(blocks);
                self.branch(stem, &tokens.iter().map(|t| (t.choice, t.token_id)).collect::<Vec<_>>());
            }
            Start::Moved(choices) => {
                for (index, (own, since)) in request.open.iter().zip(choices) {
                    let table: Vec<Block> = blocks.iter().cloned().chain(own).collect();
                    let room = table.len() * self.layout.block_tokens;
                    let mut choice = Choice::moved(Arc::clone(&request), group, *index, table, since);
                    choice.advance(room.min(choice.tokens.len() - 1), &self.pool, &self.layout);
                    if !self.finish_if_done(&choice) {
                        self.choices.push(choice);
                    }
                }
            }
        }
        Ok(())
    }

    /// Turns a computed stem and the tokens drawn at its end into running choices.
    fn branch(&mut self, stem: Choice, drawn: &[(u32, u32)]) {
        for mut choice in stem.branch(&self.layout) {
            choice.tokens.extend(drawn.iter().filter(|(index, _)| *index == choice.index).map(|(_, t)| t));
            if !self.finish_if_done(&choice) {
                self.choices.push(choice);
            }
        }
    }

    /// Reports the end of a choice that has ended, and of its request with the last one.
    fn finish_if_done(&mut self, choice: &Choice) -> bool {
        let Some(reason) = choice.finish_reason() else { return false };
        let load = self.load_now();
        let Some(group) = self.groups.get_mut(&choice.group) else { return true };
        group.finishes.push(v1::ChoiceFinish { choice: choice.index, finish_reason: reason.into() });
        group.open -= 1;
        if group.open == 0 {
            let finished = v1::Finished { choices: std::mem::take(&mut group.finishes) };
            let event =
                v1::DecodeEvent { event: Some(Event::Finished(finished)), load: Some(load_to_wire(&load)) };
            let _ = group.events.send(Ok(event));
            self.groups.remove(&choice.group);
        }
        true
    }

    /// Drops the requests whose client has gone or no longer waits.
    fn drop_abandoned(&mut self) {
        let now = Instant::now();
        self.groups.retain(|_, group| {
            let late = group.request.deadline.is_some_and(|d| d <= now);
            if late {
                let _ = group
                    .events
                    .send(Err(Status::deadline_exceeded("the request's deadline passed while decoding")));
            }
            // Whoever waits for the request was told by its observer.
            !late && group.hold.attempt.must_end().is_none() && !group.events.is_closed()
        });
        let groups = &self.groups;
        self.choices.retain(|choice| groups.contains_key(&choice.group));
    }

    fn step(&mut self) -> Result<(), EngineError> {
        let going = |choice: &Choice| self.groups.get(&choice.group).is_some_and(|group| !group.stopped);
        let (indices, views): (Vec<usize>, Vec<_>) =
            self.choices.iter().enumerate().filter(|(_, c)| going(c)).map(|(i, c)| (i, c.view())).unzip();
        let mut plan = scheduler::plan(&views, &self.rules, self.pool.available());
        plan.run.iter_mut().for_each(|(index, _)| *index = indices[*index]);
        plan.preempt.iter_mut().for_each(|index| *index = indices[*index]);
        for &victim in &plan.preempt {
            tracing::debug!(request = %self.choices[victim].request.id, "preempted: out of blocks");
            self.choices[victim].preempt();
            self.metrics.preemptions.increment(1);
        }
        let run = self.grown(plan.run);
        if run.is_empty() {
            return self.wait_for_blocks();
        }
        let started = Instant::now();
        let outcome = self.forward(&run);
        let tokens = run.iter().map(|(_, count)| count).sum();
        match outcome {
            Ok(drawn) => {
                self.rate.add(tokens, started.elapsed());
                self.metrics.steps.add(tokens, started.elapsed());
                self.progress.step();
                self.apply(&run, drawn, started);
                Ok(())
            }
            Err(EngineError::BadBatch(why)) => {
                self.fail(&run, &why);
                Ok(())
            }
            Err(fatal) => {
                self.fail(&run, &fatal.to_string());
                Err(fatal)
            }
        }
    }

    /// Gives each planned choice its blocks; one that gets none sits this step out.
    fn grown(&mut self, planned: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
        let (pool, layout) = (&self.pool, &self.layout);
        let mut run = Vec::with_capacity(planned.len());
        for (index, mut count) in planned {
            let choice = &mut self.choices[index];
            if choice.table().is_empty() && choice.computed == 0 {
                choice.adopt_cached(pool, layout);
                count = count.min(choice.tokens.len() - choice.computed);
            }
            if choice.grow(count, pool, layout) {
                run.push((index, count));
            }
        }
        run
    }

    fn wait_for_blocks(&mut self) -> Result<(), EngineError> {
        if self.choices.is_empty() {
            return Ok(());
        }
        match self.inbox.recv_timeout(BLOCKED_WAIT) {
            Ok(order) => self.obey(order)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(BLOCKED_WAIT),
        }
        Ok(())
    }

    fn forward(&mut self, run: &[(usize, usize)]) -> Result<Vec<Vec<Sampled>>, EngineError> {
        let draws: Vec<_> = run
            .iter()
            .map(|&(index, count)| {
                let choice = &self.choices[index];
                if choice.draws(count) { choice.draw_requests() } else { Vec::new() }
            })
            .collect();
        let segments = run
            .iter()
            .zip(&draws)
            .map(|(&(index, count), samples)| {
                let choice = &self.choices[index];
                Segment {
                    tokens: &choice.tokens[choice.computed..choice.computed + count],
                    position: choice.computed,
                    blocks: choice.table(),
                    samples,
                }
            })
            .collect();
        self.engine.forward(&Batch { segments }, &mut |_| {})
    }

    /// Books a step's results: computed tokens, drawn tokens, ends.
    fn apply(&mut self, run: &[(usize, usize)], drawn: Vec<Vec<Sampled>>, started: Instant) {
        let mut tokens: HashMap<usize, Vec<u32>> = HashMap::new();
        for (&(index, count), drawn) in run.iter().zip(&drawn) {
            self.choices[index].advance(count, &self.pool, &self.layout);
            let choice = &self.choices[index];
            if let Some(group) = self.groups.get_mut(&choice.group) {
                group.ran(started, choice, drawn);
            }
            tokens.insert(index, drawn.iter().map(|s| s.token).collect());
        }
        for (index, mut choice) in std::mem::take(&mut self.choices).into_iter().enumerate() {
            match tokens.remove(&index) {
                None => self.choices.push(choice),
                Some(_) if choice.is_stem() && !choice.is_computed() => self.choices.push(choice),
                Some(drawn) if choice.is_stem() => {
                    let indices: Vec<u32> = choice.request.drawn_at_stem().collect();
                    self.branch(choice, &indices.into_iter().zip(drawn).collect::<Vec<_>>());
                }
                Some(drawn) => {
                    choice.tokens.extend(drawn);
                    if !self.finish_if_done(&choice) {
                        self.choices.push(choice);
                    }
                }
            }
        }
    }

    fn fail(&mut self, run: &[(usize, usize)], why: &str) {
        tracing::error!(why, choices = run.len(), "a step failed; its requests are failed");
        for &(index, _) in run {
            if let Some(group) = self.groups.remove(&self.choices[index].group) {
                let _ = group.events.send(Err(Status::internal(format!("decode step failed: {why}"))));
            }
        }
        self.drop_abandoned();
    }

    fn load_now(&self) -> Load {
        let pending = |c: &Choice| c.view().pending;
        let waiting = self.sealed.len() + self.choices.iter().filter(|c| pending(c) > 1).count();
        let queued: usize = self.choices.iter().map(pending).filter(|p| *p > 1).sum();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Load {
            queued_tokens: queued as u64,
            running: count(self.sealed.len() + self.choices.len() - waiting),
            waiting: count(waiting),
            free_blocks: count(self.pool.available()),
            tokens_per_second: self.rate.tokens_per_second(),
            ..self.load.borrow().clone()
        }
    }

    fn publish_load(&mut self) {
        let now = self.load_now();
        self.load.send_if_modified(|load| load.update(now));
    }
}

impl Group {
    /// A step that began at `started` ran tokens of this choice and drew those at its end. What happens
    /// until the first draw of a request without landed KV is its local prefill.
    fn ran(&mut self, started: Instant, choice: &Choice, drawn: &[Sampled]) {
        let began = *self.started.get_or_insert(started);
        if drawn.is_empty() {
            return;
        }
        let local_prefill = (self.local && choice.is_stem()).then(|| v1::PrefillTiming {
            queue_ms: millis(began - self.submitted),
            prefill_ms: millis(began.elapsed()),
            exposed_transfer_ms: 0.0,
            cached_tokens: self.cached_tokens,
        });
        let indices: Vec<u32> = match choice.is_stem() {
            true => choice.request.drawn_at_stem().collect(),
            false => vec![choice.index],
        };
        let position = choice.output().len();
        let to_wire = |(index, s)| sampled_to_wire(index, position, s, &choice.request.sampling);
        let tokens = indices.into_iter().zip(drawn).map(to_wire).collect();
        let event = Some(Event::Tokens(v1::Tokens { tokens, local_prefill }));
        let _ = self.events.send(Ok(v1::DecodeEvent { event, load: None }));
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
