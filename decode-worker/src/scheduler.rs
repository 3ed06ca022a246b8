//! Which choices run in the next step, and which give their blocks back. A pure function.
//!
//! Continuous batching: every decoding choice gets its one token, then prompt tokens (local prefill,
//! recomputation after a preemption) fill what is left of the step's token budget, oldest first. When
//! a decoding choice needs a block and none is left, the youngest choice is preempted: it drops its
//! blocks and later computes its tokens again. When nothing at all could run, the oldest takes the blocks of the
//! youngest. The oldest is never preempted, so it always comes to its end, and then the next is the oldest.

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
    if plan.run.is_empty() {
        make_way(views, rules, available, &mut plan);
    }
    plan
}

/// Half-computed prompts may hold what each other lacks: the oldest gets it.
fn make_way(views: &[View], rules: &Rules, mut available: usize, plan: &mut Plan) {
    let Some(oldest) = views.first() else { return };
    let need = (oldest.computed + oldest.pending).div_ceil(rules.block_tokens).saturating_sub(oldest.held);
    let gone = plan.preempt.clone();
    for index in (1..views.len()).rev().filter(|i| views[*i].held > 0 && !gone.contains(i)) {
        if need <= available {
            break;
        }
        available += views[index].held;
        plan.preempt.push(index);
    }
    let tokens = chunk(oldest, rules.step_tokens, rules.block_tokens);
    if need <= available && tokens > 0 {
        plan.run.push((0, tokens));
    }
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

    #[test]
    fn half_computed_prompts_do_not_wait_for_each_other() {
        let half = View { pending: 80, computed: 32, held: 2 };
        assert_eq!(plan(&[half, half], &RULES, 3), Plan { run: vec![(0, 64)], preempt: vec![1] });
    }

    /// A sequence of a simulated worker.
    #[derive(Debug, Clone)]
    struct Sequence {
        tokens: usize,
        last: usize,
        computed: usize,
        held: usize,
    }

    /// Runs plans until all sequences have ended, as the engine's loop does; the number of steps.
    fn run_to_the_end(mut sequences: Vec<Sequence>, blocks: usize, rules: &Rules) -> Result<usize, String> {
        let work: usize = sequences.iter().map(|s| s.last).sum();
        // Each preemption repeats work, but the oldest always advances.
        let most = (work + 1) * (sequences.len() + 1);
        for step in 0..=most {
            if sequences.is_empty() {
                return Ok(step);
            }
            let views: Vec<View> = sequences
                .iter()
                .map(|s| View { pending: s.tokens - s.computed, computed: s.computed, held: s.held })
                .collect();
            let held: usize = sequences.iter().map(|s| s.held).sum();
            let plan = plan(&views, rules, blocks - held);
            if plan.run.is_empty() {
                return Err(format!("nothing runs: {sequences:?} in {blocks} blocks"));
            }
            for &victim in &plan.preempt {
                (sequences[victim].computed, sequences[victim].held) = (0, 0);
            }
            for &(index, count) in &plan.run {
                let s = &mut sequences[index];
                s.computed += count;
                s.held = s.held.max(s.computed.div_ceil(rules.block_tokens));
                s.tokens += usize::from(s.computed == s.tokens);
            }
            if sequences.iter().map(|s| s.held).sum::<usize>() > blocks {
                return Err(format!("more blocks than there are: {sequences:?}"));
            }
            sequences.retain(|s| s.tokens <= s.last);
        }
        Err(format!("no end after {most} steps: {sequences:?}"))
    }

    proptest! {
        /// Any load of sequences that each fit the pool comes to its end, however little room there is.
        #[test]
        fn never_stands_still(
            raw in proptest::collection::vec((1usize..200, 1usize..60), 1..10),
            spare in 0usize..12,
            step_tokens in 16usize..100,
        ) {
            let rules = Rules { step_tokens, ..RULES };
            let sequences: Vec<Sequence> = raw.iter()
                .map(|&(prompt, output)| Sequence { tokens: prompt, last: prompt + output, computed: 0, held: 0 })
                .collect();
            let largest = raw.iter().map(|(p, o)| (p + o).div_ceil(16)).max().unwrap_or(1);
            let ended = run_to_the_end(sequences, largest + spare, &rules);
            prop_assert!(ended.is_ok(), "{}", ended.unwrap_err());
        }

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
