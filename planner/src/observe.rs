//! What the planner sees at one look, and what it remembers of earlier ones.

use std::collections::VecDeque;

/// Everything since the last look, and the state now. Times in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Observation {
    /// When, on any clock that only goes forward.
    pub now: f64,
    /// Requests that arrived.
    pub requests: f64,
    /// Worker-seconds that prefilling them takes, prefix hits taken off.
    pub prefill_work: f64,
    /// The same, squared and summed over the requests: tells even prompts from uneven ones.
    pub prefill_work_squared: f64,
    /// Requests that ended.
    pub finished: f64,
    /// Their prompt tokens.
    pub finished_prompt_tokens: f64,
    /// Their output tokens.
    pub finished_output_tokens: f64,
    /// Worker-seconds of prefill that wait now.
    pub prefill_backlog: f64,
    /// Requests that wait now for room on a decode worker.
    pub decode_waiting: f64,
    /// Sequences that decode now.
    pub running: f64,
    /// Tokens of KV that they hold.
    pub running_tokens: f64,
    /// Prefill workers that take requests.
    pub prefill_workers: usize,
    /// Decode workers that take requests.
    pub decode_workers: usize,
}

/// More of anything is a broken exporter.
const MOST: f64 = 1e12;

impl Observation {
    /// Every number finite, not negative and not absurd.
    fn sane(mut self) -> Self {
        let numbers = [
            &mut self.requests,
            &mut self.prefill_work,
            &mut self.prefill_work_squared,
            &mut self.finished,
            &mut self.finished_prompt_tokens,
            &mut self.finished_output_tokens,
            &mut self.prefill_backlog,
            &mut self.decode_waiting,
            &mut self.running,
            &mut self.running_tokens,
        ];
        for number in numbers {
            *number = if number.is_finite() { number.clamp(0.0, MOST) } else { 0.0 };
        }
        self
    }
}

/// The looks of the last minutes, and the shape of requests.
#[derive(Debug, Clone)]
pub struct History {
    looks: VecDeque<(f64, Observation)>,
    keep: f64,
    last: Option<f64>,
    /// Means over what ended, forgetting slowly: they exist long after a burst.
    prompt: Mean,
    output: Mean,
}

/// A mean that forgets, by weight.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    fn add(&mut self, sum: f64, weight: f64, forget: f64) {
        self.sum = self.sum * forget + sum;
        self.weight = self.weight * forget + weight;
    }

    fn get(&self) -> Option<f64> {
        (self.weight > 0.5).then(|| self.sum / self.weight)
    }
}

impl History {
    /// Remembers `keep` seconds.
    pub fn new(keep: f64) -> Self {
        Self { looks: VecDeque::new(), keep, last: None, prompt: Mean::default(), output: Mean::default() }
    }

    /// Takes a look in. One that goes back in time is ignored; numbers that cannot be are 0.
    pub fn add(&mut self, seen: Observation) {
        let seen = seen.sane();
        let since = match self.last {
            None => seen.now,
            Some(last) => seen.now - last,
        };
        if !seen.now.is_finite() || since < 0.0 || (self.last.is_some() && since == 0.0) {
            return;
        }
        // The first look covers an unknown time: it starts the clock and counts for nothing.
        if self.last.replace(seen.now).is_none() {
            return;
        }
        let forget = (-since / 300.0_f64).exp();
        self.prompt.add(seen.finished_prompt_tokens, seen.finished, forget);
        self.output.add(seen.finished_output_tokens, seen.finished, forget);
        self.looks.push_back((since, seen));
        while self.looks.front().is_some_and(|(_, o)| o.now < seen.now - self.keep) {
            self.looks.pop_front();
        }
    }

    /// Looks that count.
    pub fn len(&self) -> usize {
        self.looks.len()
    }

    /// Whether nothing was seen yet.
    pub fn is_empty(&self) -> bool {
        self.looks.is_empty()
    }

    /// The newest look.
    pub fn newest(&self) -> Option<&Observation> {
        self.looks.back().map(|(_, o)| o)
    }

    /// Sum of something over the last `seconds`, per second.
    pub fn rate(&self, seconds: f64, of: impl Fn(&Observation) -> f64) -> f64 {
        let Some(now) = self.newest().map(|o| o.now) else { return 0.0 };
        let recent = self.looks.iter().filter(|(_, o)| o.now > now - seconds);
        let (time, sum) = recent.fold((0.0, 0.0), |(time, sum), (since, o)| (time + since, sum + of(o)));
        if time > 0.0 { sum / time } else { 0.0 }
    }

    /// The rate of something that only a share of all remembered looks exceeded, per second.
    pub fn busy_rate(&self, share: f64, of: impl Fn(&Observation) -> f64) -> f64 {
        let mut rates: Vec<f64> = self.looks.iter().map(|(since, o)| of(o) / since).collect();
        rates.sort_by(f64::total_cmp);
        let at = (rates.len() as f64 * (1.0 - share)) as usize;
        rates.get(at.min(rates.len().saturating_sub(1))).copied().unwrap_or(0.0)
    }

    /// Mean prompt and output tokens of what ended; `None` before anything has.
    pub fn lengths(&self) -> Option<(f64, f64)> {
        Some((self.prompt.get()?, self.output.get()?))
    }

    /// Seconds since the last request; infinite when none is remembered.
    pub fn idle_seconds(&self) -> f64 {
        let Some(now) = self.newest().map(|o| o.now) else { return 0.0 };
        let busy = |o: &Observation| o.requests > 0.0 || o.prefill_backlog > 0.0;
        self.looks.iter().rev().find(|(_, o)| busy(o)).map_or(f64::INFINITY, |(_, o)| now - o.now)
    }

    /// How uneven arrivals are: variance of the work per look over what even (Poisson) arrivals of such prompts would
    /// have. 1 is even; at least that.
    pub fn burstiness(&self) -> f64 {
        let count = self.looks.len() as f64;
        if count < 4.0 {
            return 1.0;
        }
        let work = |(_, o): &(f64, Observation)| o.prefill_work;
        let mean = self.looks.iter().map(work).sum::<f64>() / count;
        let variance = self.looks.iter().map(|l| (work(l) - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let even = self.looks.iter().map(|(_, o)| o.prefill_work_squared).sum::<f64>() / count;
        if even > 0.0 { (variance / even).clamp(1.0, 20.0) } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn look(now: f64, requests: f64) -> Observation {
        Observation { now, requests, prefill_work: requests * 0.1, ..Observation::default() }
    }

    #[test]
    fn the_first_look_only_starts_the_clock() {
        let mut history = History::new(100.0);
        history.add(look(1000.0, 1e9));
        assert_eq!(history.rate(60.0, |o| o.requests), 0.0);
        history.add(look(1010.0, 20.0));
        assert_eq!(history.rate(60.0, |o| o.requests), 2.0);
    }

    #[test]
    fn nonsense_is_ignored() {
        let mut history = History::new(100.0);
        for seen in [look(0.0, 0.0), look(10.0, 10.0), look(5.0, 1e9), look(f64::NAN, 1e9), look(10.0, 1e9)] {
            history.add(seen);
        }
        assert_eq!((history.len(), history.rate(60.0, |o| o.requests)), (1, 1.0));
    }

    #[test]
    fn old_looks_are_forgotten_and_lengths_stay() {
        let mut history = History::new(30.0);
        history.add(look(0.0, 0.0));
        let ended = Observation {
            finished: 4.0,
            finished_prompt_tokens: 400.0,
            finished_output_tokens: 80.0,
            ..look(10.0, 5.0)
        };
        history.add(ended);
        for i in 2..20 {
            history.add(look(10.0 * f64::from(i), 0.0));
        }
        assert!(history.len() <= 4);
        let (prompt, output) = history.lengths().unwrap();
        assert!((prompt - 100.0).abs() < 1e-6 && (output - 20.0).abs() < 1e-6);
        assert_eq!(history.idle_seconds(), f64::INFINITY);
    }
}
