//! How many workers a pool needs for what is seen, with the reason. A function, no memory.
//!
//! Prefill: a queue of uneven jobs before n servers. The mean wait follows Sakasegawa's approximation for G/G/n,
//! `W = (ca² + cs²)/2 · s/n · ρ^(√(2(n+1))−1)/(1−ρ)`; three of it stand for the slow end. Decode: by Little's law so many
//! sequences run at once; each worker takes as many as its steps stay within the ITL limit and its KV holds.

use serde::Serialize;

use crate::observe::History;
use crate::profile::Profile;

/// What clients are promised.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Slo {
    /// Seconds to the first token.
    pub ttft: f64,
    /// Seconds between tokens.
    pub itl: f64,
}

/// Why a pool needs what it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Nothing arrives.
    Idle,
    /// The wait in the queue would pass the TTFT limit.
    Wait,
    /// Bursts of the last minutes.
    Bursts,
    /// What waits already would not be done in time.
    Backlog,
    /// Prompts alone take longer than the TTFT limit, whatever the number of workers: kept at a healthy load.
    PromptsTooLong,
    /// Steps would take longer than the ITL limit.
    StepTime,
    /// The KV of what runs would not fit.
    KvRoom,
    /// Requests wait for room on decode workers.
    Waiting,
    /// A limit of the configuration.
    Bounds,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Idle,
        Self::Wait,
        Self::Bursts,
        Self::Backlog,
        Self::PromptsTooLong,
        Self::StepTime,
        Self::KvRoom,
        Self::Waiting,
        Self::Bounds,
    ];

    /// As it is written in logs, metrics and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Wait => "wait",
            Self::Bursts => "bursts",
            Self::Backlog => "backlog",
            Self::PromptsTooLong => "prompts_too_long",
            Self::StepTime => "step_time",
            Self::KvRoom => "kv_room",
            Self::Waiting => "waiting",
            Self::Bounds => "bounds",
        }
    }
}

/// Workers, and why not one fewer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Need {
    /// How many.
    pub workers: usize,
    /// Why.
    pub reason: Reason,
}

/// More is never asked for: a bound on loops, far above any fleet.
const MOST: usize = 4096;
/// The wait that only few exceed, over the mean wait.
const SLOW_END: f64 = 3.0;
/// Busy share above which no queue is planned, however loose the limit.
const HIGHEST_LOAD: f64 = 0.9;
/// Share of the TTFT limit that slow prompts must leave for waiting; with less, more workers would buy nothing.
const LEAST_SLACK: f64 = 0.25;
/// Busy share where prompts are too long for the limit anyway.
const HEALTHY_LOAD: f64 = 0.75;
/// Share of a worker's steps and KV that is planned with: arrivals vary.
const FILL: f64 = 0.85;

/// Share of looks that may exceed what bursts are planned for.
const BURSTS: f64 = 0.1;
/// Seconds of the two windows that are looked at; the busier one counts.
const WINDOWS: [f64; 2] = [60.0, 300.0];

/// Prefill workers; `load` scales what is seen (1 is as seen).
pub fn prefill(history: &History, profile: &Profile, slo: Slo, load: f64) -> Need {
    let busier = |of: fn(&crate::Observation) -> f64| {
        WINDOWS.map(|w| history.rate(w, of)).into_iter().fold(0.0, f64::max)
    };
    let work = busier(|o| o.prefill_work) * load;
    let bursts = history.busy_rate(BURSTS, |o| o.prefill_work) * load;
    let requests = busier(|o| o.requests) * load;
    let backlog = history.newest().map_or(0.0, |o| o.prefill_backlog);
    if work <= 0.0 && backlog <= 0.0 {
        return Need { workers: 0, reason: Reason::Idle };
    }
    let service = if requests > 0.0 { work / requests } else { backlog };
    let squared = history.rate(WINDOWS[1], |o| o.prefill_work_squared);
    let seen = history.rate(WINDOWS[1], |o| o.requests);
    // Second moment over squared mean, less one: how uneven prompts are.
    let uneven = if seen > 0.0 { (squared / seen / (service * service) - 1.0).clamp(0.0, 10.0) } else { 1.0 };
    let slow_prompt = service * (1.0 + uneven.sqrt());
    let slack = slo.ttft - slow_prompt;
    let reachable = slack > slo.ttft * LEAST_SLACK;
    let steady = match reachable {
        true => (1..MOST).find(|&n| waits_within(n, work, service, history.burstiness() + uneven, slack)),
        false => Some((work / HEALTHY_LOAD).ceil().max(1.0) as usize),
    };
    let steady = Need {
        workers: steady.unwrap_or(MOST),
        reason: if reachable { Reason::Wait } else { Reason::PromptsTooLong },
    };
    // Bursts longer than the limit are no queue that empties in time: they need the workers while they last.
    let steady = match bursts.ceil() as usize {
        peak if peak > steady.workers => Need { workers: peak.min(MOST), reason: Reason::Bursts },
        _ => steady,
    };
    // A worker that is asked for now helps only with what still waits when it has started.
    let time = slack.max(profile.start_seconds).max(slo.ttft / 4.0);
    let clearing = (backlog / time + work).ceil().min(MOST as f64) as usize;
    match clearing > steady.workers {
        true => Need { workers: clearing, reason: Reason::Backlog },
        false => steady,
    }
}

fn waits_within(n: usize, work: f64, service: f64, variation: f64, slack: f64) -> bool {
    let n = n as f64;
    let busy = work / n;
    if busy >= HIGHEST_LOAD {
        return false;
    }
    let wait = variation / 2.0 * service / n * busy.powf((2.0 * (n + 1.0)).sqrt() - 1.0) / (1.0 - busy);
    SLOW_END * wait <= slack
}

/// Decode workers; `load` scales what is seen (1 is as seen).
pub fn decode(history: &History, profile: &Profile, slo: Slo, load: f64) -> Need {
    let Some(newest) = history.newest() else { return Need { workers: 0, reason: Reason::Idle } };
    let requests = WINDOWS.map(|w| history.rate(w, |o| o.requests)).into_iter().fold(0.0, f64::max) * load;
    let (running, waiting) = (newest.running * load, newest.decode_waiting);
    if requests <= 0.0 && running + waiting <= 0.0 {
        return Need { workers: 0, reason: Reason::Idle };
    }
    let Some((prompt, output)) = history.lengths() else {
        // Nothing has ended yet: what runs is all that is known of the requests' shape.
        let context = (newest.running_tokens / newest.running.max(1.0)).max(1.0);
        let reason = if waiting > 0.0 { Reason::Waiting } else { limit(profile, slo, context) };
        return Need { workers: by_batch(running + waiting, context, profile, slo), reason };
    };
    let context = prompt + output / 2.0;
    let largest = profile.largest_batch(slo.itl, context) * FILL;
    let tokens = requests * output;
    let flow = (1..MOST).find(|&n| {
        let batch = profile.batch_at(tokens / n as f64, context);
        // Poisson: twice the root above the mean happens now and then.
        batch.is_some_and(|b| b + 2.0 * b.sqrt() <= largest.max(1.0) || b <= 0.5)
    });
    let flow = flow.unwrap_or(MOST);
    let flow = Need {
        workers: flow.max(by_batch(running, context, profile, slo)),
        reason: limit(profile, slo, context),
    };
    // As for prompts that wait: what new workers find when they have started has to be done in that time.
    let seconds = output * profile.step_seconds(largest, largest * context) / largest.max(1.0);
    let extra = (waiting * seconds / profile.start_seconds.max(slo.ttft)).ceil() as usize;
    match waiting > 0.0 {
        true => Need { workers: flow.workers.saturating_add(extra).min(MOST), reason: Reason::Waiting },
        false => flow,
    }
}

/// Workers for sequences that are there.
fn by_batch(running: f64, context: f64, profile: &Profile, slo: Slo) -> usize {
    (running / profile.largest_batch(slo.itl, context)).ceil().clamp(1.0, MOST as f64) as usize
}

/// What bounds a decode worker's batch.
fn limit(profile: &Profile, slo: Slo, context: f64) -> Reason {
    let unlimited = Profile { kv_tokens: f64::INFINITY, ..profile.clone() };
    match profile.largest_batch(slo.itl, context) < unlimited.largest_batch(slo.itl, context) {
        true => Reason::KvRoom,
        false => Reason::StepTime,
    }
}
