//! Where a request goes: a pure function of the request and the picture of the fleet.
//!
//! The decode worker is chosen by what it already holds of the prompt and how busy it is, the prefill
//! worker by when it would be done. Prefill is placed on the decode worker itself when the uncached part
//! is short, when nobody else can do it, or when it would be faster there: a choice with a reason, never
//! an accident.

mod model;

use std::sync::Arc;

pub use model::Model;

/// A worker as placement sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Its name.
    pub worker: Arc<str>,
    /// Only equal hashes are paired.
    pub compat_hash: Arc<str>,
    /// Prompt tokens that it holds in its prefix cache, as far as the router knows.
    pub cached_tokens: usize,
    /// Prompt tokens accepted and not yet computed.
    pub queued_tokens: usize,
    /// Sequences running or waiting.
    pub sequences: usize,
    /// Of these, the ones that decode now: they wait while a prompt is prefilled beside them.
    pub running: usize,
    /// Blocks free or only cached.
    pub free_blocks: usize,
    /// Tokens per block.
    pub block_tokens: usize,
    /// Measured; 0 before any work.
    pub tokens_per_second: f64,
    /// How often its pool is taken anew while the average pool is once.
    pub churn: f64,
}

/// What is placed.
#[derive(Debug, Clone, Copy)]
pub struct Demand {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Any number; spreads ties.
    pub salt: usize,
}

/// When prefill may stay on the decode worker.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Policy {
    /// By predicted time.
    Adaptive,
    /// Always on the prefill pool, while it has a worker.
    Remote,
    /// Always on the decode worker.
    Local,
}

/// What the model expects of both ways, from now to the first token, ms: kept beside what comes, so that it can be judged.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Expected {
    /// Tokens to compute on the decode worker, those queued there included.
    pub local_tokens: usize,
    /// With the prompt prefilled on the decode worker.
    pub local_ms: f64,
    /// What the wait of the sequences that decode there counts for, on top ([`HARM`]).
    pub harm_ms: f64,
    /// On the best prefill worker; None where none fits.
    pub remote_ms: Option<f64>,
}

/// The choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    /// Decode worker.
    pub decode: String,
    /// Prefill worker; None: the decode worker itself.
    pub prefill: Option<String>,
    /// The decode worker prefills by itself when no more than this many tokens are uncached there.
    pub local_prefill_max_tokens: u32,
    /// Why, for metrics and the timeline.
    pub reason: &'static str,
    /// What speaks for it, and against.
    pub expected: Expected,
}

/// Nobody to place on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoPlace {
    /// No decode worker.
    NoDecodeWorker,
    /// The policy wants a prefill worker and none fits a decode worker.
    NoPrefillWorker,
}

/// One running sequence weighs as much as this many uncached prompt tokens when a decode worker is chosen.
const SEQUENCE_TOKENS: f64 = 64.0;

/// What a running sequence's wait beside a prompt counts for, of the prompt's own time: it is one gap of an answer and spreads over what is
/// left of it. Of 1, 1/5, 1/10, 1/20, 1/50, 1/100 and 0 in the simulator, 1/20 and 1/50 kept most requests in time where the prefill pool
/// is the bound (bench/RESULTS-simulator.md).
const HARM: f64 = 1.0 / 32.0;

/// How much of what a prompt drives out of a pool is wanted again, where its pool turns over as fast as the average one.
const REUSE: f64 = 1.0 / 8.0;

/// Measured speeds that differ by less than this say how the work differed: a worker that finds most of its prompts cached computes
/// few tokens a step, and looks slow for being useful.
const ALIKE: f64 = 4.0;

/// Chooses among `prefill` and `decode` workers.
pub fn place(
    demand: &Demand,
    prefill: &[Candidate],
    decode: &[Candidate],
    policy: Policy,
    model: &Model,
) -> Result<Placement, NoPlace> {
    let d = best(decode, demand.salt, |c| decode_cost(demand, c)).ok_or(NoPlace::NoDecodeWorker)?;
    let partners = prefill.iter().filter(|p| p.compat_hash == d.compat_hash);
    let partners = with_speeds(partners, model);
    let p = best(&partners, demand.salt, |c| prefill_cost(demand, c));
    let uncached = demand.prompt_tokens.saturating_sub(d.cached_tokens);
    let expected = expected(demand, uncached, d, p, model);
    let local = |reason| {
        Ok(Placement {
            decode: d.worker.to_string(),
            prefill: None,
            local_prefill_max_tokens: proto::ALWAYS_LOCAL,
            reason,
            expected,
        })
    };
    let remote = |p: &Candidate, local_prefill_max_tokens, reason| {
        Ok(Placement {
            decode: d.worker.to_string(),
            prefill: Some(p.worker.to_string()),
            local_prefill_max_tokens,
            reason,
            expected,
        })
    };
    match (policy, p) {
        (Policy::Local, _) => local("local:policy"),
        (Policy::Remote, Some(p)) => remote(p, 0, "remote:policy"),
        (Policy::Remote, None) => Err(NoPlace::NoPrefillWorker),
        (Policy::Adaptive, None) => local("local:no-prefill-worker"),
        (Policy::Adaptive, Some(p)) => {
            let short = break_even_tokens(d, p, model);
            if uncached <= short {
                return local("local:short");
            }
            match expected.remote_ms.is_none_or(|there| expected.local_ms + expected.harm_ms < there) {
                true => local("local:faster"),
                false => remote(p, u32::try_from(short).unwrap_or(u32::MAX - 1), "remote"),
            }
        }
    }
}

/// A worker counts as fast as the fastest of its peers unless it is far slower ([`ALIKE`]), also where it has not measured itself: taken
/// for slower, that one would get no work while they have room, and never measure.
fn with_speeds<'a>(pool: impl Iterator<Item = &'a Candidate>, model: &Model) -> Vec<Candidate> {
    let mut pool: Vec<Candidate> = pool.cloned().collect();
    let fastest = pool.iter().map(|c| c.tokens_per_second).fold(0.0, f64::max);
    let assumed = if fastest > 0.0 { fastest } else { model.prefill_tokens_per_second() };
    let like_it = |c: &&mut Candidate| c.tokens_per_second <= 0.0 || c.tokens_per_second * ALIKE >= assumed;
    pool.iter_mut().filter(like_it).for_each(|c| c.tokens_per_second = assumed);
    pool
}

/// Until the prefill worker has computed this prompt too.
fn prefill_ms(demand: &Demand, p: &Candidate) -> f64 {
    let work = p.queued_tokens + demand.prompt_tokens.saturating_sub(p.cached_tokens);
    work as f64 / p.tokens_per_second * 1e3
}

/// What is compared among prefill workers: that time, and what the prompt drives out of the pool.
fn prefill_cost(demand: &Demand, p: &Candidate) -> f64 {
    prefill_ms(demand, p) + driven_out(demand, p) / p.tokens_per_second * 1e3
}

/// Tokens to compute again some day because the prompt takes the place of others. Without it everybody follows what all prompts begin
/// with to the few that have it already, whose pools turn over while the others' stand empty.
fn driven_out(demand: &Demand, c: &Candidate) -> f64 {
    demand.prompt_tokens.saturating_sub(c.cached_tokens) as f64 * c.churn * REUSE
}

/// Both ways. On the decode worker every running sequence waits while this prompt computes, and that
/// waiting counts too ([`HARM`]). Its measured speed is of decode steps: what such prefills took rules.
fn expected(
    demand: &Demand,
    uncached: usize,
    d: &Candidate,
    p: Option<&Candidate>,
    model: &Model,
) -> Expected {
    let local_tokens = d.queued_tokens + uncached;
    let local_ms = local_tokens as f64 / model.local_tokens_per_second() * 1e3;
    Expected {
        local_tokens,
        local_ms,
        harm_ms: local_ms * HARM * d.running as f64,
        remote_ms: p.map(|p| prefill_ms(demand, p) + model.remote_overhead_ms),
    }
}

/// Prompts of up to this many uncached tokens are done locally before a remote one could even begin.
fn break_even_tokens(d: &Candidate, p: &Candidate, model: &Model) -> usize {
    let wait = model.remote_overhead_ms + p.queued_tokens as f64 / p.tokens_per_second * 1e3;
    let tokens = wait / 1e3 * model.local_tokens_per_second() / (1.0 + HARM * d.running as f64);
    (tokens - d.queued_tokens as f64).max(0.0) as usize
}

fn decode_cost(demand: &Demand, d: &Candidate) -> f64 {
    let uncached = demand.prompt_tokens.saturating_sub(d.cached_tokens);
    let needed = uncached.div_ceil(d.block_tokens.max(1));
    let no_room = if needed > d.free_blocks { 1e12 } else { 0.0 };
    no_room
        + uncached as f64
        + driven_out(demand, d)
        + d.sequences as f64 * SEQUENCE_TOKENS
        + d.queued_tokens as f64
}

/// The cheapest; among equals the one that the salt points at.
fn best<'a>(
    candidates: impl IntoIterator<Item = &'a Candidate>,
    salt: usize,
    cost: impl Fn(&Candidate) -> f64,
) -> Option<&'a Candidate> {
    let costs: Vec<(f64, &Candidate)> = candidates.into_iter().map(|c| (cost(c), c)).collect();
    let least = costs.iter().map(|(cost, _)| *cost).min_by(f64::total_cmp)?;
    let equals: Vec<_> = costs.iter().filter(|(cost, _)| *cost <= least).collect();
    equals.get(salt % equals.len()).map(|(_, c)| *c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MODEL: Model = Model::new(10.0, 1000.0);

    fn candidate(worker: &str) -> Candidate {
        Candidate {
            worker: worker.into(),
            compat_hash: "a".into(),
            cached_tokens: 0,
            queued_tokens: 0,
            sequences: 0,
            running: 0,
            free_blocks: 100,
            block_tokens: 16,
            tokens_per_second: 1000.0,
            churn: 0.0,
        }
    }

    fn adaptive(prompt_tokens: usize, prefill: &[Candidate], decode: &[Candidate]) -> Placement {
        let demand = Demand { prompt_tokens, salt: 0 };
        place(&demand, prefill, decode, Policy::Adaptive, &MODEL).unwrap()
    }

    #[test]
    fn short_prompts_stay_long_ones_go() {
        let (p, d) = ([candidate("p")], [candidate("d")]);
        assert_eq!(adaptive(5, &p, &d).reason, "local:short");
        let busy = [Candidate { sequences: 40, running: 32, ..candidate("d") }];
        let long = adaptive(500, &p, &busy);
        assert_eq!((long.reason, long.prefill.as_deref()), ("remote", Some("p")));
        assert_eq!(long.local_prefill_max_tokens, 5);
        // Behind a long enough queue it stays after all.
        let behind = [Candidate { queued_tokens: 600, ..candidate("p") }];
        assert_eq!(adaptive(500, &behind, &busy).reason, "local:faster");
    }

    #[test]
    fn what_was_expected_of_both_ways_is_told() {
        let busy = [Candidate { sequences: 40, running: 32, queued_tokens: 100, ..candidate("d") }];
        let behind = [Candidate { queued_tokens: 200, tokens_per_second: 2000.0, ..candidate("p") }];
        let placed = adaptive(500, &behind, &busy);
        let both = Expected { local_tokens: 600, local_ms: 600.0, harm_ms: 600.0, remote_ms: Some(360.0) };
        assert_eq!((placed.reason, placed.expected), ("remote", both));
        assert_eq!(adaptive(500, &[], &busy).expected, Expected { remote_ms: None, ..both });
    }

    #[test]
    fn a_local_prefill_is_expected_to_take_what_such_took() {
        let (p, d) = ([candidate("p")], [candidate("d")]);
        let mut model = Model::new(600.0, 1000.0);
        let placed = |model: &Model| {
            place(&Demand { prompt_tokens: 5000, salt: 0 }, &p, &d, Policy::Adaptive, model).unwrap()
        };
        assert_eq!((placed(&model).reason, placed(&model).expected.local_ms), ("local:faster", 5000.0));
        // Beside decoding sequences it has a quarter of the speed; short ones say nothing about that.
        (0..3).for_each(|_| model.learn_local(4000, 16_000.0));
        model.learn_local(10, 16_000.0);
        assert_eq!((placed(&model).reason, placed(&model).expected.local_ms), ("remote", 20_000.0));
        // What is not tried any more is tried again some day.
        (0..2000).for_each(|_| model.learn_remote(1000, 1000.0, 600.0));
        assert_eq!(placed(&model).reason, "local:faster");
    }

    #[test]
    fn a_new_worker_gets_work() {
        let known = Candidate { tokens_per_second: 50_000.0, queued_tokens: 10, ..candidate("known") };
        let new = Candidate { tokens_per_second: 0.0, ..candidate("new") };
        let busy = [Candidate { sequences: 4, running: 4, ..candidate("d") }];
        assert_eq!(adaptive(5000, &[known, new], &busy).prefill.as_deref(), Some("new"));
    }

    #[test]
    fn an_empty_prefill_pool_is_named() {
        assert_eq!(adaptive(500, &[], &[candidate("d")]).reason, "local:no-prefill-worker");
        let demand = Demand { prompt_tokens: 9, salt: 0 };
        let remote = place(&demand, &[], &[candidate("d")], Policy::Remote, &MODEL);
        assert_eq!(remote, Err(NoPlace::NoPrefillWorker));
        assert_eq!(place(&demand, &[], &[], Policy::Local, &MODEL), Err(NoPlace::NoDecodeWorker));
    }

    #[test]
    fn prefix_attracts_and_load_repels() {
        let holder = Candidate { cached_tokens: 300, ..candidate("holder") };
        let idle = candidate("idle");
        assert_eq!(adaptive(400, &[], &[idle.clone(), holder.clone()]).decode, "holder");
        let busy = Candidate { sequences: 10, ..holder };
        assert_eq!(adaptive(400, &[], &[idle, busy]).decode, "idle");
    }

    #[test]
    fn what_all_prompts_share_does_not_draw_them_all_to_few() {
        let d = [candidate("d")];
        let busy = [Candidate { sequences: 40, running: 32, ..d[0].clone() }];
        let hot = Candidate { cached_tokens: 512, churn: 3.0, ..candidate("hot") };
        let cold = candidate("cold");
        let place = |hot: Candidate| adaptive(12_000, &[hot, cold.clone()], &busy).prefill.unwrap();
        assert_eq!(place(hot.clone()), "cold");
        // Most of a conversation is worth following all the same.
        assert_eq!(place(Candidate { cached_tokens: 8000, ..hot }), "hot");
    }

    #[test]
    fn small_steps_are_no_slow_worker() {
        let d = [Candidate { sequences: 40, running: 32, ..candidate("d") }];
        let known = Candidate { tokens_per_second: 40_000.0, ..candidate("known") };
        let holder = Candidate { tokens_per_second: 12_000.0, cached_tokens: 6000, ..candidate("holder") };
        assert_eq!(adaptive(9000, &[known.clone(), holder.clone()], &d).prefill.unwrap(), "holder");
        let slow = Candidate { tokens_per_second: 2_000.0, ..holder };
        assert_eq!(adaptive(9000, &[known, slow], &d).prefill.unwrap(), "known");
    }

    #[test]
    fn different_versions_are_never_paired() {
        let other = Candidate { compat_hash: "b".into(), ..candidate("p") };
        assert_eq!(adaptive(500, &[other], &[candidate("d")]).prefill, None);
    }

    proptest! {
        #[test]
        fn always_a_known_worker_and_compatible(
            raw in proptest::collection::vec((0usize..3, 0usize..500, 0usize..9, 0usize..60), 1..12),
            prompt_tokens in 1usize..2000, salt in any::<usize>(),
        ) {
            let workers: Vec<Candidate> = raw.iter().enumerate().map(|(i, &(compat, queued_tokens, sequences, free_blocks))| Candidate {
                compat_hash: compat.to_string().into(), queued_tokens, sequences, free_blocks, ..candidate(&i.to_string())
            }).collect();
            let (p, d) = workers.split_at(workers.len() / 2);
            let placed = place(&Demand { prompt_tokens, salt }, p, d, Policy::Adaptive, &MODEL).unwrap();
            let chosen = d.iter().find(|c| *c.worker == *placed.decode).unwrap();
            if let Some(name) = placed.prefill {
                let partner = p.iter().find(|c| *c.worker == *name).unwrap();
                prop_assert_eq!(&partner.compat_hash, &chosen.compat_hash);
            }
        }
    }
}
