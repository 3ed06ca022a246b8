//! Load on a running cluster, or on any OpenAI endpoint: open loop, closed loop or a trace; latencies and goodput.

pub mod forecasts;
pub mod load;
pub mod plot;
pub mod record;
mod report;
pub mod target;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, StreamExt};
use serde::Serialize;
use tokio::sync::Semaphore;

use load::{Arrivals, Planned, Shape};
use record::{Course, Measured, Slo};
use target::Target;

/// What is done.
pub struct Settings {
    /// The loads, one after the other.
    pub loads: Vec<Arrivals>,
    /// Prompts and answers.
    pub shape: Shape,
    /// How long requests come, of each load; warm-up included.
    pub span: Duration,
    /// Requests due before this are not counted.
    pub warm_up: Duration,
    /// Most requests of one load.
    pub requests: usize,
    /// Most at a time; what is due later waits, and its waiting counts.
    pub in_flight: usize,
    /// What good is.
    pub slo: Slo,
    /// Same seed, same requests at the same times.
    pub seed: u64,
}

/// Everything measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Who was asked.
    pub target: String,
    /// The seed.
    pub seed: u64,
    /// What good was.
    pub slo: Slo,
    /// In the order of the loads.
    pub loads: Vec<Measured>,
}

/// Puts every load on the target; `progress` hears how many requests have ended, of how many.
pub async fn run(
    target: &Target,
    name: &str,
    settings: &Settings,
    progress: &(dyn Fn(&str, usize, usize) + Sync),
) -> Report {
    let mut loads = Vec::new();
    for arrivals in &settings.loads {
        let what = words(arrivals);
        let plan = load::plan(arrivals, &settings.shape, settings.span, settings.requests, settings.seed);
        let said = |ended, of| progress(&what, ended, of);
        let start = Instant::now();
        let (courses, until) = match arrivals {
            Arrivals::Closed { concurrency } => {
                let courses = closed(target, plan, *concurrency, settings.span, &said).await;
                (courses, Some(start + settings.span))
            }
            _ => (open(target, plan, settings.in_flight, &said).await, None),
        };
        let window = record::Window { from: start + settings.warm_up, until };
        loads.push(record::measure(what, &courses, window, settings.slo));
    }
    Report { target: name.to_owned(), seed: settings.seed, slo: settings.slo, loads }
}

fn words(arrivals: &Arrivals) -> String {
    match arrivals {
        Arrivals::Poisson { rate, burst: 1 } => format!("{rate} req/s"),
        Arrivals::Poisson { rate, burst } => format!("{rate} req/s in bursts of {burst}"),
        Arrivals::Closed { concurrency } => format!("{concurrency} at a time"),
        Arrivals::Trace { speed, .. } if *speed == 1.0 => "trace".to_owned(),
        Arrivals::Trace { speed, .. } => format!("trace × {speed}"),
    }
}

/// Every request at its time, whatever became of the others.
async fn open(
    target: &Target,
    plan: Vec<Planned>,
    in_flight: usize,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Vec<Course> {
    let (start, of) = (Instant::now(), plan.len());
    let room = Arc::new(Semaphore::new(in_flight));
    let mut running = FuturesUnordered::new();
    let mut courses = Vec::with_capacity(of);
    for planned in plan {
        let due = start + planned.at;
        let wait = tokio::time::sleep_until(due.into());
        tokio::pin!(wait);
        loop {
            tokio::select! {
                () = &mut wait => break,
                Some(Ok(course)) = running.next() => {
                    courses.push(course);
                    progress(courses.len(), of);
                }
            }
        }
        let (target, room) = (target.clone(), Arc::clone(&room));
        running.push(tokio::spawn(async move {
            let _room = room.acquire_owned().await;
            one(&target, &planned, due).await
        }));
    }
    while let Some(ended) = running.next().await {
        courses.extend(ended);
        progress(courses.len(), of);
    }
    courses
}

/// So many at a time until the plan or the time is over.
async fn closed(
    target: &Target,
    plan: Vec<Planned>,
    concurrency: usize,
    span: Duration,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Vec<Course> {
    let (plan, next) = (Arc::new(plan), Arc::new(AtomicUsize::new(0)));
    let (end, of) = (Instant::now() + span, plan.len());
    let (told, mut ended) = tokio::sync::mpsc::channel(concurrency.max(1));
    for _ in 0..concurrency {
        let (target, plan, next, told) = (target.clone(), Arc::clone(&plan), Arc::clone(&next), told.clone());
        tokio::spawn(async move {
            while Instant::now() < end
                && let Some(planned) = plan.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let course = one(&target, planned, Instant::now()).await;
                // Refused at once and asked again at once would only be a loop.
                let rest = if course.outcome.is_err() { Duration::from_millis(100) } else { Duration::ZERO };
                if told.send(course).await.is_err() {
                    return;
                }
                tokio::time::sleep(rest).await;
            }
        });
    }
    drop(told);
    let mut courses = Vec::new();
    while let Some(course) = ended.recv().await {
        courses.push(course);
        progress(courses.len(), of);
    }
    courses
}

async fn one(target: &Target, planned: &Planned, due: Instant) -> Course {
    let sent = Instant::now().max(due);
    let outcome = target.ask(planned).await;
    Course { due, sent, outcome, ended: Instant::now().max(sent), prompt: planned.prompt.len() }
}
