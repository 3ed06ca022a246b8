//! What was seen, as histograms (HDR: three digits, whatever the range).
//!
//! Times of an open loop count from when a request was due, not from when it was sent: a driver that falls behind, or a
//! server that makes it wait, cannot hide what a user would have waited (coordinated omission).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::forecasts::{self, Forecasts};
use super::target::{Answered, Failure, Times};

/// One request's course.
pub struct Course {
    /// When it was due.
    pub due: Instant,
    /// When it was sent.
    pub sent: Instant,
    /// How it ended.
    pub outcome: Result<Answered, Failure>,
    /// When it ended.
    pub ended: Instant,
    /// Prompt tokens.
    pub prompt: usize,
}

/// What good is. Milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Slo {
    /// To the first token.
    pub ttft_ms: f64,
    /// Mean time between tokens of a request.
    pub tpot_ms: f64,
}

/// A distribution in ms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// Of ten the slowest begins here.
    pub p90: f64,
    /// Of a hundred.
    pub p99: f64,
    /// Of a thousand.
    pub p999: f64,
    /// The slowest.
    pub max: f64,
}

/// What one load brought.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// What was offered, in words.
    pub load: String,
    /// Requests that were counted: due after the warm-up.
    pub requests: usize,
    /// Of those, answered to the end.
    pub ok: usize,
    /// Refused as too many.
    pub shed: usize,
    /// Failed otherwise.
    pub failed: usize,
    /// The first failure, in words.
    pub first_failure: Option<String>,
    /// What the rates are over: from the end of the warm-up to the last token, or to the end of a closed loop's time.
    pub seconds: f64,
    /// Answered requests a second.
    pub requests_per_second: f64,
    /// Requests a second that were within the SLO.
    pub goodput: f64,
    /// Share of all counted requests that were within the SLO, 0 to 1.
    pub within_slo: f64,
    /// Prompt tokens a second of answered requests.
    pub prompt_tokens_per_second: f64,
    /// Output tokens a second.
    pub output_tokens_per_second: f64,
    /// Due until the first token.
    pub ttft_ms: Quantiles,
    /// Between two tokens; several that come at once share their gap.
    pub itl_ms: Quantiles,
    /// Mean between tokens, of each request.
    pub tpot_ms: Quantiles,
    /// Due until the end.
    pub e2e_ms: Quantiles,
    /// Due until sent: how far the driver fell behind.
    pub behind_ms: Quantiles,
    /// How placement's expectations did, by the way that was taken; none of those that tell nothing.
    pub placement: BTreeMap<&'static str, Forecasts>,
}

pub(super) struct Recorder(Histogram<u64>);

impl Recorder {
    pub(super) fn new() -> Self {
        // A microsecond to an hour.
        Self(Histogram::new_with_bounds(1, 3_600_000_000, 3).unwrap_or_else(|_| unreachable!("fixed bounds")))
    }

    pub(super) fn add(&mut self, time: Duration, times: u64) {
        let _ = self.0.record_n((time.as_micros() as u64).clamp(1, 3_600_000_000), times);
    }

    pub(super) fn quantiles(&self) -> Quantiles {
        if self.0.is_empty() {
            return Quantiles::default();
        }
        let at = |q| self.0.value_at_quantile(q) as f64 / 1e3;
        Quantiles {
            mean: self.0.mean() / 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: self.0.max() as f64 / 1e3,
        }
    }
}

/// What counts.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Requests due earlier are the warm-up.
    pub from: Instant,
    /// Where the load ends by its time: rates are then of what ended in the window, so that neither those begun before nor the
    /// emptying afterwards count as a slower server. Otherwise rates are of all that was due, until the last one ended.
    pub until: Option<Instant>,
}

/// What an answer was like.
struct Answer {
    tokens: u64,
    to_first: Option<Duration>,
    /// Mean between tokens.
    each: Duration,
}

impl Answer {
    fn of(course: &Course, times: &Times) -> Self {
        let tokens: u64 = times.iter().map(|(_, n)| u64::from(*n)).sum();
        let (first, last) = (times.first().map(|t| t.0), times.last().map(|t| t.0));
        let span = first.zip(last).map_or(Duration::ZERO, |(first, last)| last - first);
        let each = span.div_f64(tokens.saturating_sub(1).max(1) as f64);
        Self { tokens, to_first: first.map(|first| first - course.due), each }
    }

    fn is_good(&self, slo: Slo) -> bool {
        let within = |time: Duration, limit: f64| time.as_secs_f64() * 1e3 <= limit;
        self.to_first.is_some_and(|time| within(time, slo.ttft_ms)) && within(self.each, slo.tpot_ms)
    }
}

/// Sums behind the rates.
#[derive(Default)]
struct Rates {
    seconds: f64,
    requests: u64,
    good: u64,
    prompt: u64,
    output: u64,
}

impl Rates {
    fn of(courses: &[Course], Window { from, until }: Window, slo: Slo) -> Self {
        let last = courses.iter().filter(|c| c.due >= from).map(|c| c.ended).max().unwrap_or(from);
        let end = until.map_or(last, |until| until.min(last));
        let counts = |course: &&Course| match until {
            Some(_) => (from..=end).contains(&course.ended),
            None => course.due >= from,
        };
        let mut sums = Self { seconds: (end - from).as_secs_f64().max(1e-9), ..Self::default() };
        for course in courses.iter().filter(counts) {
            let Ok(answered) = &course.outcome else { continue };
            let answer = Answer::of(course, &answered.times);
            sums.requests += 1;
            sums.good += u64::from(answer.is_good(slo));
            sums.prompt += course.prompt as u64;
            sums.output += answer.tokens;
        }
        sums
    }

    fn rate(&self, count: u64) -> f64 {
        count as f64 / self.seconds
    }
}

/// Adds up what was due in the window.
pub fn measure(load: String, courses: &[Course], window: Window, slo: Slo) -> Measured {
    let counted: Vec<&Course> = courses.iter().filter(|c| c.due >= window.from).collect();
    let [mut ttft, mut itl, mut tpot, mut e2e, mut behind] = [(); 5].map(|()| Recorder::new());
    let (mut ok, mut shed, mut failed, mut good, mut first_failure) = (0, 0, 0, 0, None);
    for course in &counted {
        behind.add(course.sent - course.due, 1);
        let times = match &course.outcome {
            Ok(answered) => &answered.times,
            Err(Failure::Shed) => {
                shed += 1;
                continue;
            }
            Err(Failure::Failed(why)) => {
                failed += 1;
                first_failure.get_or_insert_with(|| why.clone());
                continue;
            }
        };
        ok += 1;
        let answer = Answer::of(course, times);
        good += usize::from(answer.is_good(slo));
        e2e.add(course.ended - course.due, 1);
        let Some(to_first) = answer.to_first else { continue };
        ttft.add(to_first, 1);
        for pair in times.windows(2) {
            let share = u64::from(pair[1].1.max(1));
            itl.add((pair[1].0 - pair[0].0) / pair[1].1.max(1), share);
        }
        if answer.tokens > 1 {
            tpot.add(answer.each, 1);
        }
    }
    let rates = Rates::of(courses, window, slo);
    Measured {
        load,
        requests: counted.len(),
        ok,
        shed,
        failed,
        first_failure,
        seconds: rates.seconds,
        requests_per_second: rates.rate(rates.requests),
        goodput: rates.rate(rates.good),
        within_slo: good as f64 / counted.len().max(1) as f64,
        prompt_tokens_per_second: rates.rate(rates.prompt),
        output_tokens_per_second: rates.rate(rates.output),
        ttft_ms: ttft.quantiles(),
        itl_ms: itl.quantiles(),
        tpot_ms: tpot.quantiles(),
        e2e_ms: e2e.quantiles(),
        behind_ms: behind.quantiles(),
        placement: forecasts::by_way(&counted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLO: Slo = Slo { ttft_ms: 150.0, tpot_ms: 25.0 };

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn near(got: f64, want: f64) {
        assert!((got / want - 1.0).abs() < 0.01, "{got}, wanted {want}");
    }

    #[test]
    fn waiting_before_sending_counts_and_warm_up_does_not() {
        let start = Instant::now();
        let course = |due: u64, sent: u64, tokens: &[(u64, u32)]| Course {
            due: start + ms(due),
            sent: start + ms(sent),
            outcome: Ok(Answered {
                times: tokens.iter().map(|(at, n)| (start + ms(*at), *n)).collect(),
                forecast: None,
            }),
            ended: start + ms(tokens.last().map_or(sent, |t| t.0)),
            prompt: 10,
        };
        let courses = [
            course(0, 0, &[(5000, 1)]),
            course(1000, 1090, &[(1100, 1), (1120, 1), (1160, 2)]),
            course(1000, 1000, &[(1200, 1), (1210, 1)]),
            Course { outcome: Err(Failure::Shed), ..course(1500, 1500, &[]) },
            Course { outcome: Err(Failure::Failed("x".into())), ..course(1500, 1500, &[]) },
        ];
        let all = Window { from: start + ms(500), until: None };
        let seen = measure("l".into(), &courses, all, SLO);
        assert_eq!((seen.requests, seen.ok, seen.shed, seen.failed), (4, 2, 1, 1));
        near(seen.ttft_ms.p50, 100.0);
        near(seen.ttft_ms.max, 200.0);
        near(seen.behind_ms.max, 90.0);
        // Gaps 20, 20, 20 and 10.
        near(seen.itl_ms.mean, 17.5);
        near(seen.tpot_ms.max, 20.0);
        near(seen.within_slo, 0.25);
        near(seen.output_tokens_per_second, 6.0 / 1.0);
        // A closed loop: what was begun in the warm-up counts when it ends, what ends too late does not.
        let closed = Window { from: start + ms(1050), until: Some(start + ms(1180)) };
        let seen = measure("l".into(), &courses, closed, SLO);
        near(seen.seconds, 0.13);
        near(seen.requests_per_second, 1.0 / 0.13);
        near(seen.output_tokens_per_second, 4.0 / 0.13);
        let seen = measure("l".into(), &courses, all, SLO);
        assert_eq!(seen.first_failure.as_deref(), Some("x"));
        assert_eq!(measure("l".into(), &[], all, SLO).ttft_ms, Quantiles::default());
    }
}
