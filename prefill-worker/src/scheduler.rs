//! Which prompts run in the next step, and how many tokens of each. A pure function.
//!
//! Shortest remaining prompt first, so that a short prompt never waits behind a long one; every step
//! spent waiting counts as if the prompt were `AGING` of a step's budget shorter, so that a long one is
//! not starved either. What is packed together runs as one batch.

/// Share of the step's budget that one step of waiting is worth.
const AGING: f64 = 0.25;

/// One prompt as the scheduler sees it. Views come in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Tokens not computed yet, at least 1.
    pub remaining: usize,
    /// Tokens whose KV is there; a multiple of the block size.
    pub computed: usize,
    /// Steps it has sat out.
    pub waited: usize,
    /// Blocks it needs before it can start; 0 once it has started.
    pub missing_blocks: usize,
}

/// The bounds of a step.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Tokens in one step, over all prompts.
    pub step_tokens: usize,
    /// Prompts in one step.
    pub max_prompts: usize,
    /// Tokens per block.
    pub block_tokens: usize,
}

/// Plans one step with `available` blocks: indices into the views with their token counts.
pub fn plan(views: &[View], rules: &Rules, available: usize) -> Vec<(usize, usize)> {
    let score = |v: &View| v.remaining as f64 - v.waited as f64 * AGING * rules.step_tokens as f64;
    let mut order: Vec<usize> = (0..views.len()).collect();
    order.sort_by(|&a, &b| score(&views[a]).total_cmp(&score(&views[b])).then(a.cmp(&b)));

    let mut available = available;
    let mut may_start = true;
    let mut budget = rules.step_tokens;
    let mut run = Vec::new();
    for index in order {
        let view = &views[index];
        if budget == 0 || run.len() == rules.max_prompts {
            break;
        }
        if view.missing_blocks > 0 && (!may_start || view.missing_blocks > available) {
            // The next in order gets the next free blocks; nobody overtakes it.
            may_start = false;
            continue;
        }
        let tokens = chunk(view, budget, rules.block_tokens);
        if tokens > 0 {
            available -= view.missing_blocks;
            budget -= tokens;
            run.push((index, tokens));
        }
    }
    run
}

/// As much as the budget allows; a chunk that is not the last ends on a block's edge, so that every
/// pushed block is final.
fn chunk(view: &View, budget: usize, block_tokens: usize) -> usize {
    if view.remaining <= budget { view.remaining } else { budget / block_tokens * block_tokens }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RULES: Rules = Rules { step_tokens: 64, max_prompts: 4, block_tokens: 16 };

    fn fresh(remaining: usize) -> View {
        View { remaining, computed: 0, waited: 0, missing_blocks: remaining.div_ceil(16) }
    }

    #[test]
    fn short_prompts_overtake_long_ones() {
        assert_eq!(plan(&[fresh(1000), fresh(20)], &RULES, 100), [(1, 20), (0, 32)]);
    }

    #[test]
    fn waiting_wins_in_the_end() {
        let old = View { waited: 100, ..fresh(1000) };
        assert_eq!(plan(&[old, fresh(20)], &RULES, 100), [(0, 64)]);
    }

    #[test]
    fn nobody_overtakes_the_one_that_waits_for_blocks() {
        let started = View { remaining: 30, computed: 32, waited: 0, missing_blocks: 0 };
        let old = View { waited: 100, ..fresh(1000) };
        assert_eq!(plan(&[old, fresh(20), started], &RULES, 10), [(2, 30)]);
    }

    proptest! {
        #[test]
        fn bounds_hold(
            raw in proptest::collection::vec((1usize..500, 0usize..9, any::<bool>()), 0..20),
            available in 0usize..60,
        ) {
            let views: Vec<View> = raw.iter().map(|&(remaining, waited, started)| View {
                remaining, waited, computed: 0,
                missing_blocks: if started { 0 } else { remaining.div_ceil(16) },
            }).collect();
            let run = plan(&views, &RULES, available);
            prop_assert!(run.iter().map(|r| r.1).sum::<usize>() <= RULES.step_tokens);
            prop_assert!(run.len() <= RULES.max_prompts);
            prop_assert!(run.iter().map(|r| views[r.0].missing_blocks).sum::<usize>() <= available);
            for (i, t) in &run {
                prop_assert!(*t == views[*i].remaining || t % 16 == 0);
                prop_assert!(*t > 0);
            }
            // Work is never left lying when a started prompt exists.
            if views.iter().any(|v| v.missing_blocks == 0) {
                prop_assert!(!run.is_empty());
            }
        }
    }
}
