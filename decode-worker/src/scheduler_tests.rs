//! Tests of the scheduler: examples, and properties over random loads.

use super::*;
use proptest::prelude::*;

const RULES: Rules = Rules {
    step_tokens: 64,
    max_choices: 8,
    block_tokens: 16,
    prefill: LocalPrefill::Chunked,
    chunk_tokens: 64,
    itl_limit_ms: 100.0,
};

/// Plans with a step model that has seen nothing.
fn plan(views: &[View], rules: &Rules, available: usize) -> Plan {
    super::plan(views, rules, &StepModel::default(), available)
}

const POLICIES: [LocalPrefill; 3] = [LocalPrefill::Shared, LocalPrefill::Chunked, LocalPrefill::Priority];

fn fresh(pending: usize) -> View {
    View { pending, computed: 0, held: 0, waited: 0, joined: false }
}

fn decoding(computed: usize) -> View {
    View { pending: 1, computed, held: computed.div_ceil(16), waited: 0, joined: true }
}

#[test]
fn decode_goes_first_and_prompts_fill_the_rest() {
    let prompt = fresh(100);
    let mixed = [prompt, decoding(5), decoding(17)];
    assert_eq!(plan(&mixed, &RULES, 100).run, [(1, 1), (2, 1), (0, 48)]);
    let small = Rules { chunk_tokens: 32, ..RULES };
    assert_eq!(plan(&mixed, &small, 100).run, [(1, 1), (2, 1), (0, 32)]);
}

#[test]
fn who_loses_least_is_preempted_but_never_an_older_one() {
    let p = plan(&[decoding(16), decoding(20), decoding(40)], &RULES, 0);
    assert_eq!((p.run, p.preempt), (vec![(0, 1), (2, 1)], vec![1]));
    let p = plan(&[decoding(20), decoding(48), decoding(40)], &RULES, 0);
    assert_eq!((p.run, p.preempt), (vec![(0, 1), (1, 1)], vec![2]));
}

#[test]
fn a_prompt_waits_until_all_of_it_fits() {
    let prompt = fresh(100);
    assert_eq!(plan(&[prompt], &RULES, 6).run, []);
    assert_eq!(plan(&[prompt], &RULES, 7).run, [(0, 64)]);
}

#[test]
fn half_computed_prompts_do_not_wait_for_each_other() {
    let half = View { computed: 32, held: 2, ..fresh(80) };
    let p = plan(&[half, half], &RULES, 3);
    assert_eq!((p.run, p.preempt), (vec![(0, 64)], vec![1]));
}

/// A sequence of a simulated worker.
#[derive(Debug, Clone)]
struct Sequence {
    tokens: usize,
    last: usize,
    computed: usize,
    held: usize,
    waited: usize,
    joined: bool,
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
            .map(|s| View {
                pending: s.tokens - s.computed,
                computed: s.computed,
                held: s.held,
                waited: s.waited,
                joined: s.joined,
            })
            .collect();
        let held: usize = sequences.iter().map(|s| s.held).sum();
        let plan = plan(&views, rules, blocks - held);
        if plan.run.is_empty() {
            return Err(format!("nothing runs: {sequences:?} in {blocks} blocks"));
        }
        for &victim in &plan.preempt {
            (sequences[victim].computed, sequences[victim].held) = (0, 0);
        }
        sequences.iter_mut().for_each(|s| s.waited += 1);
        for &(index, count) in &plan.run {
            let s = &mut sequences[index];
            s.joined |= s.tokens - s.computed == 1;
            s.waited = 0;
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
        policy in 0usize..3,
    ) {
        let rules = Rules { step_tokens, prefill: POLICIES[policy], ..RULES };
        let sequences: Vec<Sequence> = raw.iter()
            .map(|&(prompt, output)| Sequence { tokens: prompt, last: prompt + output, computed: 0, held: 0, waited: 0, joined: false })
            .collect();
        let largest = raw.iter().map(|(p, o)| (p + o).div_ceil(16)).max().unwrap_or(1);
        let ended = run_to_the_end(sequences, largest + spare, &rules);
        prop_assert!(ended.is_ok(), "{}", ended.unwrap_err());
    }

    #[test]
    fn bounds_hold(
        raw in proptest::collection::vec((1usize..80, 0usize..200, any::<bool>(), 0usize..20), 0..20),
        policy in 0usize..3,
        available in 0usize..40,
    ) {
        let views: Vec<View> = raw.iter().map(|&(pending, computed, decode, waited)| View {
            pending: if decode { 1 } else { pending },
            computed,
            held: computed.div_ceil(16),
            waited,
            joined: decode,
        }).collect();
        let p = plan(&views, &Rules { prefill: POLICIES[policy], ..RULES }, available);
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

#[test]
fn a_whole_prompt_is_not_cut_while_it_fits() {
    let shared = Rules { prefill: LocalPrefill::Shared, chunk_tokens: 16, ..RULES };
    assert_eq!(plan(&[decoding(5), fresh(60)], &shared, 100).run, [(0, 1), (1, 60)]);
    // Longer than a step: it runs alone until the last piece, which decoding choices share.
    assert_eq!(plan(&[decoding(5), fresh(100)], &shared, 100).run, [(1, 64)]);
    let last = View { computed: 64, held: 4, ..fresh(36) };
    assert_eq!(plan(&[decoding(5), last], &shared, 100).run, [(0, 1), (1, 36)]);
}

/// A machine whose steps take what they take, and a model that learned it.
struct Clock {
    fixed: f64,
    sequence: f64,
    prompt: f64,
}

impl Clock {
    fn ms(&self, shape: &StepShape) -> f64 {
        self.fixed + self.sequence * shape.sequences as f64 + self.prompt * shape.prompt_tokens as f64
    }

    fn learned(&self) -> StepModel {
        let mut model = StepModel::default();
        for i in 0..400 {
            let sequences = i % 47;
            let kv_tokens = sequences * (20 + i * 37 % 180);
            let shape = StepShape { sequences, kv_tokens, ..StepShape::default() };
            let shape = shape.with_prompt(100 * (i % 3), 16 * (i % 11));
            model.add(&shape, self.ms(&shape));
        }
        model
    }
}

const PRIORITY: Rules = Rules {
    step_tokens: 2048,
    max_choices: 64,
    block_tokens: 16,
    prefill: LocalPrefill::Priority,
    chunk_tokens: 2048,
    itl_limit_ms: 50.0,
};

proptest! {
    /// Under priority no step in which somebody decodes takes longer than the limit, but for the block that a prompt gets
    /// when it has waited for its patience; and every prompt comes to its end in time.
    #[test]
    fn the_limit_is_kept_and_no_prompt_starves(
        fixed in 2.0f64..20.0, sequence in 0.1f64..2.0, prompt in 0.05f64..2.0,
        decoding_count in 1usize..40, prompts in proptest::collection::vec(2usize..600, 1..5),
    ) {
        let clock = Clock { fixed, sequence, prompt };
        let model = clock.learned();
        let mut views: Vec<View> = (0..decoding_count).map(|_| decoding(100)).collect();
        views.extend(prompts.iter().map(|tokens| fresh(*tokens)));
        let blocks: usize = prompts.iter().map(|tokens| tokens.div_ceil(16)).sum();
        let most = (blocks + prompts.len()) * (PATIENCE_STEPS + 1);
        for step in 0.. {
            prop_assert!(step <= most, "not done after {} steps: {:?}", most, views);
            let p = super::plan(&views, &PRIORITY, &model, 10_000);
            let forced = p.run.iter().any(|(i, _)| views[*i].pending > 1 && views[*i].waited >= PATIENCE_STEPS);
            let alone = clock.ms(&StepShape { sequences: decoding_count, ..StepShape::default() });
            if !forced {
                prop_assert!(clock.ms(&p.shape) <= 50.0_f64.max(alone) * 1.05 + 1.0, "{:?}", p);
            }
            views.iter_mut().for_each(|v| v.waited += 1);
            for (index, tokens) in p.run {
                let view = &mut views[index];
                view.waited = 0;
                if view.pending > 1 {
                    view.computed += tokens;
                    view.pending -= tokens;
                    view.held = view.computed.div_ceil(16);
                }
            }
            // Computed prompts leave, so that the decoding ones stay as they were.
            let mut at = 0;
            views.retain(|v| { at += 1; at <= decoding_count || (v.pending > 0 && v.pending + v.computed > v.computed + 1) });
            if views.len() == decoding_count {
                break;
            }
        }
    }

    /// The batch grows while its step stays within the limit; who waits joins in the end.
    #[test]
    fn the_batch_grows_to_the_limit(sequence in 0.5f64..5.0, landed in 1usize..60) {
        let clock = Clock { fixed: 10.0, sequence, prompt: 1.0 };
        let model = clock.learned();
        let views: Vec<View> = (0..landed).map(|_| View { joined: false, ..decoding(40) }).collect();
        let p = super::plan(&views, &PRIORITY, &model, 10_000);
        prop_assert!(p.run.len() == 1 || clock.ms(&p.shape) <= 52.0);
        prop_assert_eq!(p.run.len() + p.held_back, landed);
        if p.held_back > 0 {
            prop_assert!(clock.ms(&p.shape.with_sequence(40)) > 48.0);
        }
        let old: Vec<View> = views.iter().map(|v| View { waited: GROWTH_STEPS, ..*v }).collect();
        prop_assert_eq!(super::plan(&old, &PRIORITY, &model, 10_000).run.len(), landed);
    }
}
