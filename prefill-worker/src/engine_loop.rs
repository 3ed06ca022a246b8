//! The thread that owns the engine: packs prompts, runs a step, queues each layer's KV for the push
//! while the next layer computes. No async here.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use cluster::Load;
use engine::kv::pool::BlockPool;
use engine::pace::{StepModel, StepShape};
use engine::{Batch, Engine, EngineError, KvLayout, SampleRequest, Sampled, Segment};
use tokio::sync::watch;
use tonic::Status;
use worker::progress::Progress;
use worker::rate::Rate;

use crate::job::{Computed, Job};
use crate::metrics::LoopMetrics;
use crate::scheduler::{self, Rules};

/// How long to wait for blocks when no prompt can start because pushes still hold them.
const BLOCKED_WAIT: Duration = Duration::from_millis(2);

/// The loop's whole state.
pub(crate) struct EngineLoop {
    engine: Box<dyn Engine>,
    pool: Arc<BlockPool>,
    rules: Rules,
    inbox: Receiver<Job>,
    load: Arc<watch::Sender<Load>>,
    layout: KvLayout,
    jobs: Vec<Job>,
    rate: Rate,
    model: StepModel,
    metrics: LoopMetrics,
    progress: Progress,
}

impl EngineLoop {
    pub fn new(
        engine: Box<dyn Engine>,
        pool: Arc<BlockPool>,
        rules: Rules,
        inbox: Receiver<Job>,
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
            jobs: Vec::new(),
            rate: Rate::default(),
            model: StepModel::default(),
            metrics,
            progress,
        }
    }

    /// Runs until every sender of jobs is gone and the last job has ended.
    pub fn run(mut self) -> Result<(), EngineError> {
        loop {
            if self.jobs.is_empty() {
                self.publish_load();
                self.progress.idle();
                match self.inbox.recv() {
                    Ok(job) => self.jobs.push(job),
                    Err(_) => return Ok(()),
                }
                self.progress.step();
            }
            while let Ok(job) = self.inbox.try_recv() {
                self.jobs.push(job);
            }
            self.jobs.retain(|job| !job.done.is_closed());
            self.drop_expired();
            self.hand_back();
            self.publish_load();
            self.step()?;
            debug_assert_eq!(self.pool.check(), Ok(()));
        }
    }

    /// What nobody waits for any more is not computed.
    fn drop_expired(&mut self) {
        let now = Instant::now();
        let is_late = |job: &mut Job| job.request.deadline.is_some_and(|at| at <= now);
        for job in self.jobs.extract_if(.., is_late) {
            self.metrics.expired.increment(1);
            let _ = job.done.send(Err(Status::deadline_exceeded("the deadline passed before prefill ended")));
        }
    }

    /// While draining, prompts that were not started go elsewhere.
    fn hand_back(&mut self) {
        if !self.load.borrow().draining {
            return;
        }
        let (started, queued): (Vec<Job>, Vec<Job>) =
            std::mem::take(&mut self.jobs).into_iter().partition(|job| job.progress.started.is_some());
        self.jobs = started;
        for job in queued {
            let _ = job
                .done
                .send(Err(Status::unavailable("this prefill worker drains and hands back its queue")));
        }
    }

    fn step(&mut self) -> Result<(), EngineError> {
        let views: Vec<_> = self.jobs.iter().map(|job| job.view(&self.layout)).collect();
        let plan = scheduler::plan(&views, &self.rules, &self.model, self.pool.available());
        self.metrics.budget.set(scheduler::budget(views.len(), &self.rules, &self.model) as f64);
        let run = self.started(plan);
        if run.is_empty() {
            return self.wait_for_blocks();
        }
        let began = Instant::now();
        let tokens = run.iter().map(|(_, count)| count).sum();
        match self.forward(&run) {
            Ok(drawn) => {
                self.rate.add(tokens, began.elapsed());
                self.metrics.steps.add(tokens, began.elapsed());
                self.learn(&run, began.elapsed());
                self.progress.step();
                self.apply(&run, drawn);
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

    /// What the step that ran teaches.
    fn learn(&mut self, run: &[(usize, usize)], took: Duration) {
        let add = |shape: StepShape, &(index, count): &(usize, usize)| {
            shape.with_prompt(self.jobs[index].progress.computed, count)
        };
        let shape = run.iter().fold(StepShape::default(), add);
        let actual = took.as_secs_f64() * 1e3;
        if self.model.is_fitted() {
            self.metrics.steps.predicted(self.model.predict_ms(&shape), actual);
        }
        self.model.add(&shape, actual);
        let gave_way = |(index, job): (usize, &Job)| {
            job.progress.started.is_some()
                && job.progress.waited == 0
                && !run.iter().any(|(i, _)| *i == index)
        };
        let gave_way = self.jobs.iter().enumerate().filter(|(i, job)| gave_way((*i, job))).count();
        self.metrics.gave_way.increment(gave_way as u64);
    }

    /// Gives new prompts their blocks and queues what the prefix cache had for the push.
    fn started(&mut self, plan: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
        let kv = self.engine.kv();
        let mut run = Vec::with_capacity(plan.len());
        for (index, count) in plan {
            let job = &mut self.jobs[index];
            let is_new = job.progress.started.is_none();
            if !job.start(&self.pool, &self.layout) {
                continue;
            }
            let p = &job.progress;
            if is_new {
                failpoints::at("prefill-started", 0, String::new);
            }
            if is_new && p.cached_tokens > 0 {
                for layer in 0..self.layout.layers {
                    job.push(kv.as_ref(), layer, 0, p.cached_tokens);
                }
            }
            run.push((index, count.min(job.request.stem.len() - p.computed)));
        }
        run
    }

    fn wait_for_blocks(&mut self) -> Result<(), EngineError> {
        if self.jobs.is_empty() {
            return Ok(());
        }
        match self.inbox.recv_timeout(BLOCKED_WAIT) {
            Ok(job) => self.jobs.push(job),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(BLOCKED_WAIT),
        }
        Ok(())
    }

    fn forward(&mut self, run: &[(usize, usize)]) -> Result<Vec<Vec<Sampled>>, EngineError> {
        let (jobs, layout) = (&self.jobs, &self.layout);
        let draws: Vec<Vec<SampleRequest<'_>>> =
            run.iter().map(|&(index, count)| jobs[index].draws(count)).collect();
        let segments = run
            .iter()
            .zip(&draws)
            .map(|(&(index, count), samples)| {
                let job = &jobs[index];
                let at = job.progress.computed;
                Segment {
                    tokens: &job.request.stem[at..at + count],
                    position: at,
                    blocks: &job.progress.table,
                    samples,
                }
            })
            .collect();
        let kv = self.engine.kv();
        let mut on_layer = |layer| {
            for &(index, count) in run {
                let job = &jobs[index];
                let (from, to) = (job.final_tokens_after(0, layout), job.final_tokens_after(count, layout));
                job.push(kv.as_ref(), layer, from, to);
            }
        };
        self.engine.forward(&Batch { segments }, &mut on_layer)
    }

    fn apply(&mut self, run: &[(usize, usize)], drawn: Vec<Vec<Sampled>>) {
        let mut drawn_by: Vec<Option<Vec<Sampled>>> = self.jobs.iter().map(|_| None).collect();
        for (&(index, count), drawn) in run.iter().zip(drawn) {
            self.jobs[index].advance(count, &self.pool, &self.layout);
            drawn_by[index] = Some(drawn);
        }
        for (mut job, drawn) in std::mem::take(&mut self.jobs).into_iter().zip(drawn_by) {
            match drawn {
                Some(first) if job.is_computed() => finish(job, first),
                drawn => {
                    job.progress.waited += usize::from(drawn.is_none());
                    self.jobs.push(job);
                }
            }
        }
    }

    fn fail(&mut self, run: &[(usize, usize)], why: &str) {
        tracing::error!(why, prompts = run.len(), "a step failed; its requests are failed");
        let failed: Vec<usize> = run.iter().map(|(index, _)| *index).collect();
        let jobs = std::mem::take(&mut self.jobs);
        for (index, job) in jobs.into_iter().enumerate() {
            if failed.contains(&index) {
                let _ = job.done.send(Err(Status::internal(format!("prefill step failed: {why}"))));
            } else {
                self.jobs.push(job);
            }
        }
    }

    fn publish_load(&self) {
        let started = self.jobs.iter().filter(|job| job.progress.started.is_some()).count();
        let remaining = |job: &Job| job.request.stem.len() - job.progress.computed;
        let queued: usize = self.jobs.iter().map(remaining).sum();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let now = Load {
            queued_tokens: queued as u64,
            running: count(started),
            waiting: count(self.jobs.len() - started),
            free_blocks: count(self.pool.available()),
            tokens_per_second: self.rate.tokens_per_second(),
            ..Load::default()
        };
        self.load.send_if_modified(|load| load.update(now));
    }
}

fn finish(job: Job, first: Vec<Sampled>) {
    if let Some(why) = job.request.form_failure() {
        let _ = job.done.send(Err(why));
        return;
    }
    let now = Instant::now();
    let started = job.progress.started.unwrap_or(now);
    let computed = Computed {
        first,
        queue_ms: (started - job.submitted).as_secs_f64() * 1e3,
        prefill_ms: (now - started).as_secs_f64() * 1e3,
        cached_tokens: job.progress.cached_tokens,
        at: now,
    };
    let _ = job.done.send(Ok(computed));
}
