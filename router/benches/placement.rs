//! One placement, at 1, 100 and 1,000 workers and prompts of 1,000 to 100,000 tokens: `cargo bench -p router`.
//!
//! First a table of p50 and p99 over many placements, with and without hashing the prompt, on an empty and on a full index;
//! then Criterion's own measurement of the largest case. It asks what the router asks: the fleet for candidates of both pools,
//! placement for a choice. Nothing is served; channels to workers are made and never connect.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::{Entry, Load, Member, Picture, Role};
use criterion::Criterion;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use router::fleet::{Chains, Fleet};
use router::placement::{self, Demand, Model, Policy};
use router::prefix_index::DEFAULT_BYTES;
use tokio::sync::watch;

const BLOCK_TOKENS: u32 = 16;
/// What every prompt begins with.
const SHARED: usize = 512;
const MODEL: Model = Model::new(5.0, 40_000.0);
const ROUNDS: usize = 2000;

fn entry(number: usize, role: Role) -> (String, Entry) {
    let worker = format!("{}-{number}", role.name());
    let member = Member {
        worker: worker.clone(),
        role,
        address: format!("10.{}.{}.{}:7000", number >> 16, (number >> 8) & 255, number & 255),
        model: "m".into(),
        compat_hash: "4be1b0c8e0d4a2f6".repeat(4),
        incarnation: 1,
        transports: vec!["tcp".into()],
        tls: false,
        zone: String::new(),
        block_tokens: BLOCK_TOKENS,
        total_blocks: 28_000,
        max_context_tokens: 131_072,
        max_sequences: 256,
        auto_role: false,
    };
    let load = Load { free_blocks: 20_000, running: (number % 13) as u32, ..Load::default() };
    (worker, Entry { member, load })
}

/// A fleet of so many workers, half of them for prefill; one alone decodes.
async fn fleet(workers: usize) -> Fleet {
    let role = |number| if number % 2 == 1 { Role::Prefill } else { Role::Decode };
    let members: BTreeMap<String, Entry> = (0..workers).map(|n| entry(n, role(n))).collect();
    let picture = Picture { members: Arc::new(members), connected: true };
    let fleet = Fleet::new(None, DEFAULT_BYTES);
    let (keep, picture) = watch::channel(picture);
    tokio::spawn(fleet.clone().follow(picture));
    while fleet.statuses().len() < workers {
        tokio::task::yield_now().await;
    }
    std::mem::forget(keep);
    fleet
}

/// A prompt of its own behind what all share.
fn prompt(tokens: usize, random: &mut StdRng) -> Vec<u32> {
    let own = (SHARED..tokens).map(|_| random.random_range(100..128_000));
    (0..SHARED.min(tokens) as u32).chain(own).collect()
}

/// Everybody holds what all share; prompts of 16,000 tokens fill the index; a tenth of the workers hold a piece of this one.
fn fill(fleet: &Fleet, workers: usize, asked: &[u32], random: &mut StdRng) {
    let names: Vec<String> = fleet.statuses().into_iter().map(|w| w.worker).collect();
    for name in &names {
        fleet.note_prefix(name, &prompt(SHARED + 64, random), &mut Chains::default());
    }
    let mut inserted = 0;
    loop {
        let (bytes, most) = fleet.prefix_bytes();
        if bytes > most - most / 50 || inserted > 20_000 {
            break;
        }
        let name = &names[random.random_range(0..workers)];
        fleet.note_prefix(name, &prompt(16_000, random), &mut Chains::default());
        inserted += 1;
    }
    for name in names.iter().step_by(10) {
        let piece = random.random_range(0..=asked.len());
        fleet.note_prefix(name, &asked[..piece], &mut Chains::default());
    }
}

fn place(fleet: &Fleet, asked: &[u32], chains: &mut Chains, random: &mut StdRng) {
    let mut pool = |role, random: &mut StdRng| fleet.candidates(role, asked, chains, &[], random);
    let (prefill, decode) = (pool(Role::Prefill, random), pool(Role::Decode, random));
    let demand = Demand { prompt_tokens: asked.len(), salt: random.random::<u32>() as usize };
    black_box(placement::place(&demand, &prefill, &decode, Policy::Adaptive, &MODEL)).ok();
}

/// Microseconds: p50, p99, the longest.
fn quantiles(mut once: impl FnMut() -> Duration) -> [f64; 3] {
    (0..ROUNDS / 10).for_each(|_| {
        once();
    });
    let mut took: Vec<f64> = (0..ROUNDS).map(|_| once().as_secs_f64() * 1e6).collect();
    took.sort_by(f64::total_cmp);
    [took[ROUNDS / 2], took[ROUNDS * 99 / 100], took[ROUNDS - 1]]
}

fn row(what: &str, [p50, p99, most]: [f64; 3]) -> String {
    format!("| {what} | {p50:.1} | {p99:.1} | {most:.0} |")
}

fn resident_mib() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<f64>().ok()).unwrap_or(0.0);
    pages * 4096.0 / f64::from(1 << 20)
}

fn table(runtime: &tokio::runtime::Runtime) {
    println!("| workers, prompt, index | p50 µs | p99 µs | longest µs |\n|---|---|---|---|");
    let mut random = StdRng::seed_from_u64(1);
    for workers in [1, 100, 1000] {
        for tokens in [1_000, 10_000, 100_000] {
            for is_full in [false, true] {
                let fleet = runtime.block_on(fleet(workers));
                let asked = prompt(tokens, &mut random);
                if is_full {
                    fill(&fleet, workers, &asked, &mut random);
                }
                let state = if is_full { "full" } else { "empty" };
                let what = format!("{workers}, {tokens} tokens, {state}");
                let mut chains = Chains::default();
                place(&fleet, &asked, &mut chains, &mut random);
                let known = quantiles(|| {
                    let began = Instant::now();
                    place(&fleet, &asked, &mut chains, &mut random);
                    began.elapsed()
                });
                println!("{}", row(&what, known));
                let hashed = quantiles(|| {
                    let began = Instant::now();
                    place(&fleet, &asked, &mut Chains::default(), &mut random);
                    began.elapsed()
                });
                println!("{}", row(&format!("{what}, with hashing"), hashed));
            }
        }
    }
}

/// What the index says it uses, beside what the process grew by; and how long an insertion that evicts takes.
fn memory(runtime: &tokio::runtime::Runtime) {
    let fleet = runtime.block_on(fleet(1000));
    let mut random = StdRng::seed_from_u64(2);
    let names: Vec<String> = fleet.statuses().into_iter().map(|w| w.worker).collect();
    for (what, tokens, prompts) in [("16,000", 16_000, 40_000), ("600", 600, 800_000)] {
        let before = resident_mib();
        let asked: Vec<Vec<u32>> = (0..64).map(|_| prompt(tokens, &mut random)).collect();
        let mut took: Vec<f64> = Vec::with_capacity(prompts);
        for number in 0..prompts {
            // Another prompt each time, hashed before the clock runs.
            let mut own = asked[number % 64].clone();
            own[SHARED] = number as u32;
            let name = &names[random.random_range(0..names.len())];
            let mut chains = Chains::default();
            let member = fleet.get(name).unwrap().member;
            black_box(chains.of(&own, &member));
            let began = Instant::now();
            fleet.note_prefix(name, &own, &mut chains);
            took.push(began.elapsed().as_secs_f64() * 1e6);
        }
        took.sort_by(f64::total_cmp);
        let (bytes, most) = fleet.prefix_bytes();
        println!(
            "{prompts} prompts of {what} tokens: the index says {:.1} of {:.1} MiB, the process grew by {:.1} MiB; an insertion takes p50 {:.1}, p99 {:.1}, at most {:.0} µs",
            bytes as f64 / f64::from(1 << 20),
            most as f64 / f64::from(1 << 20),
            resident_mib() - before,
            took[prompts / 2],
            took[prompts * 99 / 100],
            took[prompts - 1],
        );
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    if std::env::args().any(|arg| arg == "--test" || arg == "--list") {
        return;
    }
    memory(&runtime);
    table(&runtime);
    let mut criterion = Criterion::default().configure_from_args();
    let mut random = StdRng::seed_from_u64(3);
    let fleet = runtime.block_on(fleet(1000));
    let asked = prompt(100_000, &mut random);
    fill(&fleet, 1000, &asked, &mut random);
    let mut chains = Chains::default();
    criterion.bench_function("1000 workers, 100000 tokens, full index", |bencher| {
        bencher.iter(|| place(&fleet, &asked, &mut chains, &mut random));
    });
    criterion.bench_function("1000 workers, 100000 tokens, full index, with hashing", |bencher| {
        bencher.iter(|| place(&fleet, &asked, &mut Chains::default(), &mut random));
    });
    criterion.final_summary();
}
