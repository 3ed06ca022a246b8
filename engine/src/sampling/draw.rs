//! The random draw: temperature, top-k, top-p, min-p, then the token where the cumulative weight, in the order of ids, passes
//! a uniform number.

use super::{argmax, filter};
use crate::batch::SamplingParams;

/// `unit` is uniform in `[0, 1)`.
pub(super) fn draw(logits: &[f32], params: &SamplingParams, unit: f64) -> u32 {
    let best = argmax(logits);
    let max = logits.get(best as usize).copied().unwrap_or(f32::NEG_INFINITY);
    if max == f32::NEG_INFINITY {
        return best;
    }
    let temperature = f64::from(params.temperature);
    let weight = |logit: f32| ((f64::from(logit) - f64::from(max)) / temperature).exp();
    // A token's weight is its probability relative to the best one's.
    let min_weight = f64::from(params.min_p);

    let mut tokens = filter::candidates(logits, f32::MIN);
    if params.top_k > 0 {
        filter::keep_best(&mut tokens, params.top_k as usize);
    }
    if params.top_p < 1.0 {
        let total = tokens.iter().map(|t| weight(t.1)).sum();
        filter::nucleus(&mut tokens, total, f64::from(params.top_p), weight);
    }
    tokens.sort_unstable_by_key(|token| token.0);

    let mut cumulative = 0.0;
    let weights: Vec<(u32, f64)> = tokens
        .iter()
        .map(|&(id, logit)| (id, weight(logit)))
        .filter(|&(_, w)| w > 0.0 && w >= min_weight)
        .map(|(id, w)| {
            cumulative += w;
            (id, cumulative)
        })
        .collect();
    let at = unit * cumulative;
    let index = weights.partition_point(|&(_, sum)| sum <= at);
    weights.get(index).or(weights.last()).map_or(best, |&(id, _)| id)
}
