//! The best tokens without sorting the vocabulary.

use super::best_first;

/// The `count` best tokens, best first.
pub(super) fn top(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    if count == 0 {
        return Vec::new();
    }
    let mut all: Vec<(u32, f32)> = candidates(logits, f32::NEG_INFINITY);
    keep_best(&mut all, count);
    all.sort_unstable_by(best_first);
    all
}

/// Every token with a logit of at least `floor`, by id; tokens at minus infinity only if `floor` is.
pub(super) fn candidates(logits: &[f32], floor: f32) -> Vec<(u32, f32)> {
    (0u32..).zip(logits.iter().copied()).filter(|&(_, logit)| logit >= floor).collect()
}

/// Cuts to the `count` best, in no order.
pub(super) fn keep_best(tokens: &mut Vec<(u32, f32)>, count: usize) {
    if count < tokens.len() {
        tokens.select_nth_unstable_by(count, best_first);
        tokens.truncate(count);
    }
}

/// The smallest set of best tokens whose weight reaches `share` of `total`, best first. Sorts only as much
/// as it takes: 64 candidates, then eight times as many, and so on.
pub(super) fn nucleus(tokens: &mut Vec<(u32, f32)>, total: f64, share: f64, weight: impl Fn(f32) -> f64) {
    let (mut done, mut sum) = (0, 0.0);
    let mut step = 64;
    while done < tokens.len() {
        let rest = &mut tokens[done..];
        let take = step.min(rest.len());
        if take < rest.len() {
            rest.select_nth_unstable_by(take, best_first);
        }
        rest[..take].sort_unstable_by(best_first);
        for (i, token) in rest[..take].iter().enumerate() {
            sum += weight(token.1);
            if sum >= share * total {
                tokens.truncate(done + i + 1);
                return;
            }
        }
        done += take;
        step *= 8;
    }
}
