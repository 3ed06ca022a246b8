//! The thread that owns the engine: admits, plans, runs a step, hands tokens out. No async here.

mod begin;
mod group;
mod leave;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use cluster::Load;
use engine::kv::pool::BlockPool;
use engine::pace::{StepModel, StepShape};
use engine::{Batch, Engine, EngineError, KvLayout, Sampled, Segment};
use proto::v1::{self, decode_event::Event};
use tokio::sync::watch;
use tonic::Status;
use worker::progress::Progress;
use worker::rate::Rate;
use worker::request::load_to_wire;

use crate::choice::Choice;
use crate::metrics::LoopMetrics;
use crate::order::Order;
use crate::outlook::Outlook;
use crate::scheduler::{self, Rules};
use begin::Sealed;
use group::Group;

/// How long to wait for blocks when every choice is blocked on ones that landings hold.
const BLOCKED_WAIT: Duration = Duration::from_millis(5);

/// How long to wait for the next thing while landed KV is compared or on its way to the device.
const LOADING_WAIT: Duration = Duration::from_micros(100);

/// The loop's whole state.
pub(crate) struct EngineLoop {
    pub engine: Box<dyn Engine>,
    pub pool: Arc<BlockPool>,
    pub rules: Rules,
    pub inbox: Receiver<Order>,
    pub load: Arc<watch::Sender<Load>>,
    layout: KvLayout,
    /// Landed, and not yet compared with what was sent.
    sealed: VecDeque<Sealed>,
    choices: Vec<Choice>,
    groups: HashMap<u64, Group>,
    next_group: u64,
    rate: Rate,
    model: StepModel,
    outlook: Outlook,
    metrics: LoopMetrics,
    progress: Progress,
}

impl EngineLoop {
    pub fn new(
        engine: Box<dyn Engine>,
        pool: Arc<BlockPool>,
        (rules, outlook): (Rules, Outlook),
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
            model: StepModel::default(),
            outlook,
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
                Some(seal) => self.sealed.push_back(Sealed::new(*submission, seal)),
                None => self.admit(*submission),
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

    /// Reports the end of a choice that has ended, and of its request with the last one.
    fn finish_if_done(&mut self, choice: &Choice) -> bool {
        let Some(reason) = choice.finish_reason() else { return false };
        self.outlook.ended(choice.output().len());
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
        let mut plan = scheduler::plan(&views, &self.rules, &self.model, self.pool.available());
        self.metrics.held_back.set(plan.held_back as f64);
        plan.run.iter_mut().for_each(|(index, _)| *index = indices[*index]);
        plan.preempt.iter_mut().for_each(|index| *index = indices[*index]);
        for &victim in &plan.preempt {
            tracing::debug!(request = %self.choices[victim].request.id, "preempted: out of blocks");
            self.metrics.preemptions.increment(1);
            self.metrics.preempted_tokens.increment(self.choices[victim].computed as u64);
            self.choices[victim].preempt();
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
                self.learn(&run, started.elapsed());
                self.progress.step();
                self.fail_lost_forms();
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

    /// What the step that ran teaches: how long steps take, and how many sequences keep the limit.
    fn learn(&mut self, run: &[(usize, usize)], took: Duration) {
        let add = |shape: StepShape, &(index, count): &(usize, usize)| {
            shape.with_run(self.choices[index].computed, count)
        };
        let shape = run.iter().fold(StepShape::default(), add);
        let actual = took.as_secs_f64() * 1e3;
        if self.model.is_fitted() {
            self.metrics.steps.predicted(self.model.predict_ms(&shape), actual);
        }
        self.model.add(&shape, actual);
        self.outlook.ran(&shape, &self.model, &self.rules);
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
        let wait = match (self.choices.is_empty(), self.sealed.is_empty()) {
            (true, true) => return Ok(()),
            // Only for what is on its way to the device.
            (_, false) => LOADING_WAIT,
            (false, true) => BLOCKED_WAIT,
        };
        match self.inbox.recv_timeout(wait) {
            Ok(order) => self.obey(order)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(wait),
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
                None => {
                    choice.waited += 1;
                    self.choices.push(choice);
                }
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

    /// Ends the requests whose grammar could not be followed before anybody sees what was drawn.
    fn fail_lost_forms(&mut self) {
        self.groups.retain(|_, group| match group.request.form_failure() {
            None => true,
            Some(why) => {
                let _ = group.events.send(Err(why));
                false
            }
        });
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
