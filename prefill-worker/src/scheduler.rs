//! Which prompts run in the next step, and how many tokens of each. A pure function.
//!
//! Three orders, one after the other:
//!
//! 1. Prompts that sat out [`STARVED_STEPS`], oldest first: nobody starves, whatever else comes.
//! 2. Prompts whose deadline is near but can be met, earliest deadline first.
//! 3. Shortest remaining prompt first; every step spent waiting counts as if the prompt were [`AGING`] of a step shorter.
//!
//! So a long prompt gives way after any chunk, and a short one waits behind it for no longer than the step that runs
//! and one that it may have earned by waiting. While several prompts wait, a step ends at the compute knee: tokens
//! beyond it would not make it more efficient, only longer.

use engine::pace::{StepModel, StepShape};

/// Share of the step's budget that one step of waiting is worth.
const AGING: f64 = 0.25;
/// Who sat out that many steps comes before all others.
pub const STARVED_STEPS: usize = 64;
/// A deadline is near when it leaves less than this many times what the prompt itself takes.
const NEAR: f64 = 4.0;

/// One prompt as the scheduler sees it. Views come in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct View {
    /// Tokens not computed yet, at least 1.
    pub remaining: usize,
    /// Tokens whose KV is there; a multiple of the block size.
    pub computed: usize,
    /// Steps it has sat out.
    pub waited: usize,
    /// Blocks it needs before it can start; 0 once it has started.
    pub missing_blocks: usize,
    /// Until its deadline, ms.
    pub deadline_ms: Option<f64>,
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

/// A prompt's turn; smaller is earlier.
#[derive(PartialEq, PartialOrd)]
struct Turn(u8, f64);

fn turn(view: &View, rules: &Rules, model: &StepModel) -> Turn {
    if view.waited >= STARVED_STEPS {
        return Turn(0, -(view.waited as f64));
    }
    if let Some(left) = view.deadline_ms {
        let takes = model.predict_ms(&StepShape::default().with_prompt(view.computed, view.remaining));
        if takes <= left && left < takes * NEAR {
            return Turn(1, left);
        }
    }
    Turn(2, view.remaining as f64 - view.waited as f64 * AGING * rules.step_tokens as f64)
}

/// Tokens of a step: all that fit for one prompt, up to the knee for several. A multiple of the block size.
pub fn budget(prompts: usize, rules: &Rules, model: &StepModel) -> usize {
    if prompts < 2 || !model.is_fitted() {
        return rules.step_tokens;
    }
    let knee = model.knee_tokens().div_ceil(rules.block_tokens).saturating_mul(rules.block_tokens);
    // A fit of few shapes may be far off: half of the step's room is cut at most.
    knee.clamp(rules.step_tokens.div_ceil(2), rules.step_tokens).max(rules.block_tokens)
}

/// Plans one step with `available` blocks: indices into the views with their token counts.
pub fn plan(views: &[View], rules: &Rules, model: &StepModel, available: usize) -> Vec<(usize, usize)> {
    let turns: Vec<Turn> = views.iter().map(|view| turn(view, rules, model)).collect();
    let mut order: Vec<usize> = (0..views.len()).collect();
    order.sort_by(|&a, &b| {
        turns[a].partial_cmp(&turns[b]).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(&b))
    });

    let mut available = available;
    let mut may_start = true;
    let mut budget = budget(views.len(), rules, model);
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

    fn plan(views: &[View], rules: &Rules, available: usize) -> Vec<(usize, usize)> {
        super::plan(views, rules, &StepModel::default(), available)
    }

    fn fresh(remaining: usize) -> View {
        View { remaining, computed: 0, waited: 0, missing_blocks: remaining.div_ceil(16), deadline_ms: None }
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
        let started = View { remaining: 30, computed: 32, waited: 0, missing_blocks: 0, deadline_ms: None };
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
                deadline_ms: None,
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

        /// A prompt of 100,000 tokens is under way. A short one waits for it, and for others that are not longer than
        /// itself, but never behind the long one, however long that has waited before.
        #[test]
        fn a_short_prompt_never_waits_behind_a_long_one(
            short in 1usize..64, sat_out in 0usize..STARVED_STEPS, others in proptest::collection::vec(1usize..64, 0..6),
        ) {
            let long = View { remaining: 100_000, computed: 64, waited: sat_out, missing_blocks: 0, deadline_ms: None };
            let mut views = vec![long, fresh(short)];
            views.extend(others.iter().map(|tokens| fresh(*tokens)));
            let ahead: usize = others.iter().filter(|o| **o <= short).sum();
            for step in 0.. {
                // One step for what is ahead of it, one that the long one may have earned, and its own.
                prop_assert!(step <= ahead.div_ceil(16) + 2, "{step} steps: {:?}", views);
                let run = plan(&views, &Rules { max_prompts: 8, ..RULES }, 10_000);
                views.iter_mut().for_each(|v| v.waited += 1);
                for (index, tokens) in run {
                    let view = &mut views[index];
                    (view.computed, view.remaining) = (view.computed + tokens, view.remaining - tokens);
                    (view.waited, view.missing_blocks) = (0, 0);
                }
                if views[1].remaining == 0 {
                    break;
                }
                let mut at = 0;
                views.retain(|v| { at += 1; at <= 2 || v.remaining > 0 });
            }
        }

        /// New prompts with near deadlines come at every step; one without still runs.
        #[test]
        fn deadlines_starve_nobody(tokens in 1usize..2000, urgent in 1usize..64) {
            let mut old = fresh(tokens);
            let most = (tokens.div_ceil(16) + 1) * (STARVED_STEPS + 1);
            for step in 0.. {
                prop_assert!(step <= most);
                let takes = StepModel::default().predict_ms(&StepShape::default().with_prompt(0, urgent));
                let new = View { deadline_ms: Some(takes * 2.0), ..fresh(urgent) };
                let run = plan(&[old, new, new, new, new], &RULES, 10_000);
                old.waited += 1;
                if let Some((_, count)) = run.iter().find(|(index, _)| *index == 0) {
                    old = View { remaining: old.remaining - count, waited: 0, missing_blocks: 0, ..old };
                }
                if old.remaining == 0 {
                    break;
                }
            }
        }
    }

    #[test]
    fn a_near_deadline_goes_first_and_a_hopeless_one_does_not() {
        let model = StepModel::default();
        let takes = model.predict_ms(&StepShape::default().with_prompt(0, 50));
        let due = |times: f64| View { deadline_ms: Some(takes * times), ..fresh(50) };
        let first = |views: &[View]| plan(views, &RULES, 100)[0].0;
        assert_eq!(first(&[fresh(10), due(2.0)]), 1);
        assert_eq!(first(&[fresh(10), due(3.0), due(2.0)]), 2);
        assert_eq!(first(&[fresh(10), due(0.5)]), 0);
        assert_eq!(first(&[fresh(10), due(50.0)]), 0);
    }

    #[test]
    fn several_prompts_share_a_step_up_to_the_knee() {
        let mut model = StepModel::default();
        for i in 1..100 {
            let shape = StepShape::default().with_prompt(0, 16 * (i % 30 + 1));
            model.add(&shape, 10.0 + 0.5 * shape.prompt_tokens as f64);
        }
        let rules = Rules { step_tokens: 512, ..RULES };
        let knee = budget(2, &rules, &model);
        assert!((368..=400).contains(&knee), "{knee}");
        assert_eq!(budget(1, &rules, &model), 512);
        assert_eq!(budget(2, &rules, &StepModel::default()), 512);
        let run = super::plan(&[fresh(300), fresh(300)], &rules, &model, 100);
        let tokens = run.iter().map(|r| r.1).sum::<usize>();
        assert!(tokens <= knee && tokens > knee - 16, "{tokens}");
    }
}
