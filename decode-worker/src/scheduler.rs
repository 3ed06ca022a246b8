//! Which choices run in the next step, and which give their blocks back. A pure function.
//!
//! Continuous batching: every decoding choice gets its one token, then prompt tokens (local prefill,
//! recomputation after a preemption) fill what is left of the step's token budget, oldest first. When
//! a decoding choice needs a block and none is left, the youngest choice is preempted: it drops its
//! blocks and later computes its tokens again. The oldest is never preempted, so the loop always ends.

/// One choice as the scheduler sees it. Views come in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Tokens whose KV is not computed yet, at least 1.
    pub pending: usize,
    /// Tokens whose KV is in its blocks.
    pub computed: usize,
    /// Blocks it holds.
    pub held: usize,
}

/// The bounds of a step.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Tokens in one step, over all choices.
    pub step_tokens: usize,
    /// Choices in one step.
    pub max_choices: usize,
    /// Tokens per block.
    pub block_tokens: usize,
}

/// What to do next. Numbers are indices into the views.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Choices that run, with how many tokens.
    pub run: Vec<(usize, usize)>,
    /// Choices that give their blocks back first.
    pub preempt: Vec<usize>,
}

/// Plans one step with `available` blocks to hand out.
pub fn plan(views: &[View], rules: &Rules, available: usize) -> Plan {
    let mut plan = Plan::default();
    let mut available = available;
    let mut budget = rules.step_tokens;
    let mut gone = vec![false; views.len()];
    let needs = |view: &View, tokens: usize| {
        (view.computed + tokens).div_ceil(rules.block_tokens).saturating_sub(view.held)
    };

    for (index, view) in views.iter().enumerate().filter(|(_, v)| v.pending == 1) {
        if gone[index] || budget == 0 || plan.run.len() == rules.max_choices {
            continue;
        }
        let need = needs(view, 1);
        while need > available {
            // Younger than this one, holding blocks, not planned: decoding ones are planned in order of
            // arrival, so every younger one is still free to go.
            let youngest = (index + 1..views.len()).rev().find(|&i| !gone[i] && views[i].held > 0);
            let Some(victim) = youngest else { break };
            gone[victim] = true;
            plan.preempt.push(victim);
            available += views[victim].held;
        }
        if need <= available {
            available -= need;
            budget -= 1;
            plan.run.push((index, 1));
        }
    }

    for (index, view) in views.iter().enumerate().filter(|(_, v)| v.pending > 1) {
        if gone[index] || budget == 0 || plan.run.len() == rules.max_choices {
            continue;
        }
        // Starting needs room for all of it, or two half-computed prompts could wait for each other.
        if needs(view, view.pending) > available {
            continue;
        }
        let tokens = chunk(view, budget, rules.block_tokens);
        if tokens == 0 {
            continue;
        }
        available -= needs(view, view.pending);
        budget -= tokens;
        plan.run.push((index, tokens));
    }
    plan
}

/// As much as the budget allows; a chunk that is not the last ends on a block's edge.
fn chunk(view: &View, budget: usize, block_tokens: usize) -> usize {
    if view.pending <= budget {
        return view.pending;
    }
    let end = (view.computed + budget) / block_tokens * block_tokens;
    end.saturating_sub(view.computed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RULES: Rules = Rules { step_tokens: 64, max_choices: 8, block_tokens: 16 };

    fn decoding(computed: usize) -> View {
        View { pending: 1, computed, held: computed.div_ceil(16) }
    }

    #[test]
    fn decode_goes_first_and_prompts_fill_the_rest() {
        let prompt = View { pending: 100, computed: 0, held: 0 };
        let plan = plan(&[prompt, decoding(5), decoding(17)], &RULES, 100);
        assert_eq!(plan.run, [(1, 1), (2, 1), (0, 48)]);
    }

    #[test]
    fn the_youngest_is_preempted() {
        let plan = plan(&[decoding(16), decoding(20), decoding(40)], &RULES, 0);
        assert_eq!(plan, Plan { run: vec![(0, 1), (1, 1)], preempt: vec![2] });
    }

    #[test]
    fn a_prompt_waits_until_all_of_it_fits() {
        let prompt = View { pending: 100, computed: 0, held: 0 };
        assert_eq!(plan(&[prompt], &RULES, 6).run, []);
        assert_eq!(plan(&[prompt], &RULES, 7).run, [(0, 64)]);
    }

    proptest! {
        #[test]
        fn bounds_hold(
            raw in proptest::collection::vec((1usize..80, 0usize..200, any::<bool>()), 0..20),
            available in 0usize..40,
        ) {
            let views: Vec<View> = raw.iter().map(|&(pending, computed, decode)| View {
                pending: if decode { 1 } else { pending },
                computed,
                held: computed.div_ceil(16),
            }).collect();
            let p = plan(&views, &RULES, available);
            let freed: usize = p.preempt.iter().map(|&i| views[i].held).sum();
            let used: usize = p.run.iter().map(|&(i, t)| {
                (views[i].computed + t).div_ceil(16).saturating_sub(views[i].held)
            }).sum();
            prop_assert!(used <= available + freed);
            prop_assert!(p.run.iter().map(|r| r.1).sum::<usize>() <= RULES.step_tokens);
            prop_assert!(p.run.len() <= RULES.max_choices);
            for (i, t) in &p.run {
                prop_assert!(*t >= 1 && *t <= views[*i].pending);
                prop_assert!(!p.preempt.contains(i));
                let ends = views[*i].computed + t;
                prop_assert!(*t == views[*i].pending || ends.is_multiple_of(16));
            }
            prop_assert!(!p.preempt.contains(&0));
        }
    }
}
