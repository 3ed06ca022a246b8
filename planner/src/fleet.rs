//! A simulated fleet in small steps of time: a prefill queue, decode workers that share their steps, workers that take time
//! to start and drain before they go. Costs are the profile's; nothing is random.

use std::collections::VecDeque;

use crate::profile::Profile;
use crate::{Observation, Pool};

/// What a controller sees at a look.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    /// For the planner.
    pub seen: Observation,
    /// Share of the time that the ready workers of each pool computed.
    pub busy: [f64; 2],
    /// Workers that take requests, of each pool.
    pub ready: [usize; 2],
}

/// A request on its way.
#[derive(Debug, Clone, Copy, Default)]
pub struct Job {
    /// When it arrived, seconds.
    pub at: f64,
    /// Prompt tokens.
    pub prompt: f64,
    /// Output tokens.
    pub output: f64,
    /// Seconds of prefill.
    pub service: f64,
}

/// How a request went.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Seconds to the first token.
    pub ttft: f64,
    /// Mean seconds between tokens.
    pub tpot: f64,
}

struct Prefiller {
    ready_at: f64,
    free_at: f64,
    leaving: bool,
}

struct Sequence {
    job: Job,
    first: f64,
    made: f64,
}

struct Decoder {
    ready_at: f64,
    leaving: bool,
    /// Tokens that reservations and sequences may come to hold.
    reserved: f64,
    coming: usize,
    running: Vec<Sequence>,
    /// Until then it computes a prompt itself.
    stalled: f64,
    id: u64,
}

/// The fleet.
pub struct Fleet {
    profile: Profile,
    now: f64,
    queue: VecDeque<Job>,
    prefill: Vec<Prefiller>,
    decode: Vec<Decoder>,
    /// Prefills that are under way, with the decode worker that reserved for them.
    coming: Vec<(f64, u64, Job)>,
    next_id: u64,
    done: Vec<Done>,
    seen: Observation,
    busy: [f64; 2],
    offered: [f64; 2],
    /// Seconds of workers that exist, starting and draining ones too.
    pub worker_seconds: [f64; 2],
}

impl Fleet {
    /// So many workers that are ready at once.
    pub fn new(profile: Profile, prefill: usize, decode: usize) -> Self {
        let mut fleet = Self {
            profile,
            now: 0.0,
            queue: VecDeque::new(),
            prefill: Vec::new(),
            decode: Vec::new(),
            coming: Vec::new(),
            next_id: 0,
            done: Vec::new(),
            seen: Observation::default(),
            busy: [0.0; 2],
            offered: [0.0; 2],
            worker_seconds: [0.0; 2],
        };
        (0..prefill).for_each(|_| fleet.add(Pool::Prefill, 0.0));
        (0..decode).for_each(|_| fleet.add(Pool::Decode, 0.0));
        fleet
    }

    /// A request arrives.
    pub fn arrive(&mut self, job: Job) {
        self.seen.requests += 1.0;
        self.seen.prefill_work += job.service;
        self.seen.prefill_work_squared += job.service * job.service;
        self.queue.push_back(job);
    }

    /// Prefill workers that take requests.
    pub fn prefill_ready(&self) -> usize {
        self.prefill.iter().filter(|p| !p.leaving && p.ready_at <= self.now).count()
    }

    fn decode_ready(&self) -> usize {
        self.decode.iter().filter(|d| !d.leaving && d.ready_at <= self.now).count()
    }

    /// Whether nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.coming.is_empty() && self.decode.iter().all(|d| d.running.is_empty())
    }

    /// Makes a pool have `target` workers that stay.
    pub fn resize(&mut self, pool: Pool, target: usize) {
        let staying = match pool {
            Pool::Prefill => self.prefill.iter().filter(|p| !p.leaving).count(),
            Pool::Decode => self.decode.iter().filter(|d| !d.leaving).count(),
        };
        (staying..target).for_each(|_| self.add(pool, self.profile.start_seconds));
        (target..staying).for_each(|_| self.remove(pool));
    }

    fn add(&mut self, pool: Pool, start: f64) {
        let ready_at = self.now + start;
        match pool {
            Pool::Prefill => self.prefill.push(Prefiller { ready_at, free_at: ready_at, leaving: false }),
            Pool::Decode => {
                self.next_id += 1;
                let id = self.next_id;
                self.decode.push(Decoder {
                    ready_at,
                    leaving: false,
                    reserved: 0.0,
                    coming: 0,
                    running: Vec::new(),
                    stalled: 0.0,
                    id,
                });
            }
        }
    }

    /// The one that starts last, else the one with the least to do.
    fn remove(&mut self, pool: Pool) {
        match pool {
            Pool::Prefill => {
                let last = self
                    .prefill
                    .iter_mut()
                    .filter(|p| !p.leaving)
                    .max_by(|a, b| a.ready_at.total_cmp(&b.ready_at));
                if let Some(worker) = last {
                    worker.leaving = true;
                }
            }
            Pool::Decode => {
                let now = self.now;
                let load = |d: &Decoder| if d.ready_at > now { -1.0 } else { d.reserved };
                let least =
                    self.decode.iter_mut().filter(|d| !d.leaving).min_by(|a, b| load(a).total_cmp(&load(b)));
                if let Some(worker) = least {
                    worker.leaving = true;
                }
            }
        }
    }

    /// One step of time.
    pub fn tick(&mut self, dt: f64) {
        self.now += dt;
        self.account(dt);
        self.start_prefills(dt);
        self.land();
        self.step(dt);
        self.move_away();
        let now = self.now;
        self.prefill.retain(|p| !p.leaving || (p.free_at > now && p.ready_at <= now));
        self.decode.retain(|d| !d.leaving || d.coming > 0 || !d.running.is_empty());
    }

    fn account(&mut self, dt: f64) {
        self.worker_seconds[0] += dt * self.prefill.len() as f64;
        self.worker_seconds[1] += dt * self.decode.len() as f64;
        let now = self.now;
        self.offered[0] += dt * self.prefill.iter().filter(|p| p.ready_at <= now).count() as f64;
        for worker in self.decode.iter().filter(|d| d.ready_at <= now) {
            self.offered[1] += dt;
            self.busy[1] += if worker.running.is_empty() { 0.0 } else { dt };
        }
    }

    /// Reserve before work: a prompt starts once a decode worker has room.
    fn start_prefills(&mut self, dt: f64) {
        while let Some(job) = self.queue.front().copied() {
            let Some(room) = self.room(job) else { return };
            let now = self.now;
            let any = self.prefill.iter().any(|p| !p.leaving && p.ready_at <= now);
            let free =
                self.prefill.iter_mut().filter(|p| !p.leaving && p.free_at <= now && p.ready_at <= now);
            let done_at = match (free.min_by(|a, b| a.free_at.total_cmp(&b.free_at)), any) {
                (Some(worker), _) => {
                    // Within this step of time: no sooner than the worker, the request and the room were there.
                    worker.free_at = worker.free_at.max(job.at).max(now - dt) + job.service;
                    self.busy[0] += job.service;
                    worker.free_at
                }
                (None, true) => return,
                (None, false) => {
                    // Local prefill: the decode worker's sequences wait meanwhile.
                    let worker = &mut self.decode[room];
                    worker.stalled = worker.stalled.max(now) + job.service;
                    worker.stalled
                }
            };
            self.queue.pop_front();
            let worker = &mut self.decode[room];
            worker.reserved += job.prompt + job.output;
            worker.coming += 1;
            self.coming.push((done_at, worker.id, job));
        }
    }

    /// The decode worker with the least to hold that has room.
    fn room(&self, job: Job) -> Option<usize> {
        let fits = |d: &Decoder| {
            let alone = d.running.is_empty() && d.coming == 0;
            let room = d.reserved + job.prompt + job.output <= self.profile.kv_tokens;
            !d.leaving
                && d.ready_at <= self.now
                && (d.running.len() + d.coming) as f64 + 1.0 <= self.profile.max_sequences
                && (room || alone)
        };
        let candidates = self.decode.iter().enumerate().filter(|(_, d)| fits(d));
        candidates.min_by(|(_, a), (_, b)| a.reserved.total_cmp(&b.reserved)).map(|(i, _)| i)
    }

    fn land(&mut self) {
        let now = self.now;
        let (landed, coming) = std::mem::take(&mut self.coming).into_iter().partition(|(at, ..)| *at <= now);
        self.coming = coming;
        for (first, id, job) in landed {
            if let Some(worker) = self.decode.iter_mut().find(|d| d.id == id) {
                worker.coming -= 1;
                worker.running.push(Sequence { job, first, made: 1.0 });
            }
        }
    }

    fn step(&mut self, dt: f64) {
        for worker in &mut self.decode {
            if worker.running.is_empty() || worker.stalled > self.now {
                continue;
            }
            let tokens: f64 = worker.running.iter().map(|s| s.job.prompt + s.made).sum();
            let step = self.profile.step_seconds(worker.running.len() as f64, tokens);
            let (now, seen, done) = (self.now, &mut self.seen, &mut self.done);
            let mut freed = 0.0;
            worker.running.retain_mut(|s| {
                // One that landed within this step of time has only the rest of it.
                s.made += dt.min(now - s.first) / step;
                if s.made < s.job.output {
                    return true;
                }
                freed += s.job.prompt + s.job.output;
                seen.finished += 1.0;
                seen.finished_prompt_tokens += s.job.prompt;
                seen.finished_output_tokens += s.job.output;
                let ended = now - (s.made - s.job.output) * step;
                let tpot = if s.job.output > 1.0 { (ended - s.first) / (s.job.output - 1.0) } else { 0.0 };
                done.push(Done { ttft: s.first - s.job.at, tpot });
                false
            });
            worker.reserved -= freed;
        }
    }

    /// Sequences of leaving workers move to others that have room.
    fn move_away(&mut self) {
        for leaving in 0..self.decode.len() {
            if !self.decode[leaving].leaving {
                continue;
            }
            for sequence in std::mem::take(&mut self.decode[leaving].running) {
                let to = self.room(sequence.job).unwrap_or(leaving);
                let tokens = sequence.job.prompt + sequence.job.output;
                self.decode[leaving].reserved -= tokens;
                self.decode[to].reserved += tokens;
                self.decode[to].running.push(sequence);
            }
        }
    }

    /// What a controller sees; counters begin anew.
    pub fn look(&mut self) -> Look {
        let mut seen = std::mem::take(&mut self.seen);
        seen.now = self.now;
        let started = self.queue.iter().map(|j| j.service).sum::<f64>();
        let running =
            self.prefill.iter().map(|p| (p.free_at - self.now).max(0.0)).filter(|left| left.is_finite());
        seen.prefill_backlog = started + if self.prefill_ready() > 0 { running.sum() } else { 0.0 };
        let blocked = self.queue.front().is_some_and(|job| self.room(*job).is_none());
        seen.decode_waiting = if blocked { self.queue.len() as f64 } else { 0.0 };
        seen.running = self.decode.iter().map(|d| (d.running.len() + d.coming) as f64).sum();
        seen.running_tokens =
            self.decode.iter().flat_map(|d| &d.running).map(|s| s.job.prompt + s.made).sum();
        seen.prefill_workers = self.prefill_ready();
        seen.decode_workers = self.decode_ready();
        let (busy, offered) = (std::mem::take(&mut self.busy), std::mem::take(&mut self.offered));
        let share = |i: usize| if offered[i] > 0.0 { busy[i] / offered[i] } else { 0.0 };
        Look { seen, busy: [share(0), share(1)], ready: [seen.prefill_workers, seen.decode_workers] }
    }

    /// What has ended, once.
    pub fn take_done(&mut self) -> Vec<Done> {
        std::mem::take(&mut self.done)
    }
}
