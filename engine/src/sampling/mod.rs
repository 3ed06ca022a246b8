//! From logits to a token: a pure function of the logits, the request and the draw's coordinates.
//!
//! Order: log-probabilities (of the raw logits) → logit bias → repetition, presence and frequency
//! penalties → banned tokens → constraint → temperature → top-k → top-p → min-p → draw. The draw is a function of
//! `(seed, output position, choice)`, so a sequence that moves to another worker goes on as if it had not.

mod draw;
mod edits;
mod filter;
mod params;
mod philox;

pub(crate) use edits::{Edit, edits};
pub use params::MAX_LOGPROBS;

use std::cmp::Ordering;

use crate::batch::{SampleRequest, Sampled};

/// Below this temperature sampling is greedy: dividing by it would leave one token anyway.
pub const GREEDY_BELOW: f32 = 1e-5;

/// Draws one token. `logits` is scratch: its content afterwards is meaningless. Never panics; a NaN
/// counts as minus infinity. With nothing left to draw (all banned) it returns the lowest token id.
pub fn sample(logits: &mut [f32], request: &SampleRequest<'_>) -> Sampled {
    sanitise(logits);
    let params = request.params;
    let raw = params.logprobs.map(|count| Logprobs::of(logits, count as usize));
    let kept = raw.is_some().then(|| logits.to_vec());

    edits::apply(logits, request);
    let token = if params.temperature < GREEDY_BELOW {
        argmax(logits)
    } else {
        draw::draw(logits, params, unit(request))
    };

    let logprob = match (&raw, &kept) {
        (Some(raw), Some(kept)) => kept.get(token as usize).map_or(f32::NAN, |&l| raw.of_logit(l)),
        _ => f32::NAN,
    };
    Sampled { token, logprob, top: raw.map(|raw| raw.top).unwrap_or_default() }
}

/// The draw's random number, uniform in `[0, 1)`.
pub(crate) fn unit(request: &SampleRequest<'_>) -> f64 {
    philox::unit(request.params.seed, request.output.len() as u64, request.choice)
}

/// Whether [`sample`] returns [`argmax`] of the unchanged logits and nothing else.
pub(crate) fn is_argmax(request: &SampleRequest<'_>) -> bool {
    let params = request.params;
    let plain = params.logprobs.is_none() && request.constraint.is_none() && !is_edited(request);
    plain && params.temperature < GREEDY_BELOW
}

/// Whether the request changes logits.
pub(crate) fn is_edited(request: &SampleRequest<'_>) -> bool {
    let params = request.params;
    !params.logit_bias.is_empty()
        || params.repetition_penalty != 1.0
        || params.presence_penalty != 0.0
        || params.frequency_penalty != 0.0
        || !request.banned.is_empty()
}

/// The token with the largest logit, the lowest id among equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (id, logit);
        }
    }
    best.0 as u32
}

/// Best first: larger logit, then lower id. Total, because NaN was removed.
pub(crate) fn best_first(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

fn sanitise(logits: &mut [f32]) {
    for logit in logits {
        if logit.is_nan() {
            *logit = f32::NEG_INFINITY;
        } else {
            // -0.0 must equal 0.0 under total_cmp, and an infinity must not become inf - inf.
            *logit = logit.min(f32::MAX) + 0.0;
        }
    }
}

/// Log-probabilities under the unchanged model.
struct Logprobs {
    log_sum: f64,
    top: Vec<(u32, f32)>,
}

impl Logprobs {
    fn of(logits: &[f32], count: usize) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
        let mut raw = Self { log_sum: f64::from(max) + sum.ln(), top: Vec::new() };
        let mut top = filter::top(logits, count.min(logits.len()));
        for entry in &mut top {
            entry.1 = raw.of_logit(entry.1);
        }
        raw.top = top;
        raw
    }

    fn of_logit(&self, logit: f32) -> f32 {
        (f64::from(logit) - self.log_sum) as f32
    }
}

#[cfg(test)]
mod tests;
