//! `tandem sim`: checks what was asked for, shows progress, prints; the simulation is in the `sim` crate.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use engine::roofline::kv_bytes_per_token;
use engine::roofline::links::GOOD_SHARE;
use engine::sim::{Exchange, Profile};
use indicatif::{ProgressBar, ProgressStyle};
use planner::trace;
use sim::{Arrivals, Cluster, Lengths, Report, Slo, Strategy};

use crate::args::{SimArgs, StrategyChoice};

/// Runs every strategy on every load.
pub async fn run(args: SimArgs) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(move || simulate(&args)).await?
}

fn simulate(args: &SimArgs) -> anyhow::Result<()> {
    let cluster = cluster(args)?;
    let loads = loads(args)?;
    let bar = ProgressBar::new(0)
        .with_style(ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} {elapsed}")?);
    bar.enable_steady_tick(Duration::from_millis(500));
    let mut reports = Vec::new();
    let mut out = std::io::stdout().lock();
    for (what, arrivals) in &loads {
        let mut rows = Vec::new();
        for choice in &args.policy {
            let cluster = Cluster { strategy: strategy(*choice), ..cluster.clone() };
            let started = Instant::now();
            let report = sim::run(&cluster, arrivals, args.seed, args.warm_up, &mut |ended, of, seconds| {
                bar.set_length(of as u64);
                bar.set_position(ended as u64);
                bar.set_message(format!("{what}, {}, {seconds:.0} s", cluster.strategy.name()));
            })?;
            if report.ok + report.shed == 0 {
                bail!("--warm-up: no request came after {} s, so none counts", args.warm_up);
            }
            let (events, took) = (report.events, started.elapsed().as_secs_f64());
            tracing::info!(strategy = cluster.strategy.name(), load = what, events, took, "simulated");
            rows.push((report, took));
        }
        if !args.json {
            bar.suspend(|| table(&mut out, what, &rows))?;
        }
        reports.extend(rows.into_iter().map(|(report, _)| report));
    }
    bar.finish_and_clear();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&reports)?)?;
    }
    Ok(())
}

fn table(out: &mut impl Write, what: &str, rows: &[(Report, f64)]) -> std::io::Result<()> {
    writeln!(out, "\n{what}\n\n{}", Report::head())?;
    rows.iter().try_for_each(|(report, _)| writeln!(out, "{}", report.row()))?;
    let seconds: f64 = rows.iter().map(|(_, took)| took).sum();
    let events: u64 = rows.iter().map(|(report, _)| report.events).sum();
    let memory = peak_memory_mib().map_or_else(String::new, |mib| format!(", {mib} MiB of memory at most"));
    writeln!(out, "\n{events} events in {seconds:.1} s{memory}")
}

/// The largest resident set of this process so far.
fn peak_memory_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib / 1024)
}

fn cluster(args: &SimArgs) -> anyhow::Result<Cluster> {
    let shape = crate::bench::shape(&args.shape)?;
    let mut profile = Profile::load(&args.profile).context("--profile")?;
    if let Some(name) = &args.link {
        let link = crate::roofline::link(name)?;
        profile.link = Exchange {
            latency_seconds: link.latency_seconds,
            bytes_per_second: link.bytes_per_second * GOOD_SHARE,
        };
    }
    if let Some(rate) = args.link_gb_per_second {
        if !(rate.is_finite() && rate > 0.0) {
            bail!("--link-gb-per-second: {rate} is not above 0");
        }
        profile.link.bytes_per_second = rate * 1e9;
    }
    let room = match args.kv_gib {
        Some(gib) if gib.is_finite() && gib > 0.0 => gib * f64::from(1 << 30),
        Some(gib) => bail!("--kv-gib: {gib} is not a size above 0"),
        None => profile.kv_room_bytes(&shape),
    };
    if args.block_tokens == 0 || args.block_tokens > 4096 {
        bail!("--block-tokens: {} is not between 1 and 4096", args.block_tokens);
    }
    let block = kv_bytes_per_token(&shape, profile.kv) * args.block_tokens as f64;
    let blocks = room / block;
    if blocks < 2.0 {
        bail!(
            "the weights leave no room for KV on {}; share a copy among more devices (--profile h100x4) or give --kv-gib",
            profile.name
        );
    }
    if blocks > 1e7 {
        bail!(
            "--kv-gib: {blocks:.0} blocks on each worker are more than 10 million; use larger --block-tokens"
        );
    }
    for (flag, value) in [
        ("--slo-ttft-ms", args.slo_ttft_ms),
        ("--slo-itl-ms", args.slo_itl_ms),
        ("--queue-seconds", args.queue_seconds),
    ] {
        if !(value.is_finite() && value > 0.0 && value < 1e7) {
            bail!("{flag}: {value} is not above 0");
        }
    }
    let workers = args.prefill.saturating_add(args.decode);
    Ok(Cluster {
        shape,
        profile,
        strategy: Strategy::Adaptive,
        prefill: args.prefill,
        decode: args.decode,
        block_tokens: args.block_tokens,
        blocks: blocks as u32,
        prefill_step_tokens: args.prefill_step_tokens,
        chunk_tokens: args.chunk_tokens,
        max_sequences: args.max_sequences,
        max_waiting: args.max_waiting,
        max_running: args.max_running.unwrap_or(args.max_sequences.saturating_mul(workers)).max(1),
        patience_seconds: args.queue_seconds,
        seals: args.host_seals,
        slo: Slo { ttft_ms: args.slo_ttft_ms, itl_ms: args.slo_itl_ms },
    })
}

fn loads(args: &SimArgs) -> anyhow::Result<Vec<(String, Arrivals)>> {
    if let Some(file) = &args.trace {
        return Ok(vec![from_trace(args, file)?]);
    }
    if args.rate.is_empty() {
        bail!("what load? --rate 10,20 (requests a second) or --trace FILE");
    }
    if !(args.seconds.is_finite() && args.seconds > 0.0 && args.seconds <= 1e6 && args.warm_up < args.seconds)
    {
        bail!("--seconds: {} is not above --warm-up and up to 1000000", args.seconds);
    }
    if args.prompt_tokens == 0 || args.output_tokens == 0 || !(0.0..=1.0).contains(&args.spread) {
        bail!("--prompt-tokens and --output-tokens: at least 1; --spread: 0 to 1");
    }
    let lengths = Lengths {
        prompt: args.prompt_tokens,
        output: args.output_tokens,
        spread: args.spread,
        shared: args.shared_prefix,
        vocab: args.vocab,
    };
    let load = |rate: &f64| match rate.is_finite() && *rate > 0.0 && rate * args.seconds <= 1e8 {
        true => {
            Ok((format!("{rate} req/s"), Arrivals::Poisson { rate: *rate, seconds: args.seconds, lengths }))
        }
        false => bail!("--rate: {rate} is not above 0, or makes more than 100 million requests"),
    };
    args.rate.iter().map(load).collect()
}

fn from_trace(args: &SimArgs, file: &Path) -> anyhow::Result<(String, Arrivals)> {
    if !(args.speed.is_finite() && args.speed > 0.0) {
        bail!("--speed: {} is not a factor above 0", args.speed);
    }
    let text =
        std::fs::read_to_string(file).with_context(|| format!("--trace: cannot read {}", file.display()))?;
    let requests = trace::parse(&text).with_context(|| format!("--trace {}", file.display()))?;
    let requests = trace::multiply(&requests, args.load);
    let name = file.file_stem().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let what = format!("{name} × {}, {} times as fast", args.load, args.speed);
    Ok((what, Arrivals::Trace { requests, speed: args.speed, longest: args.longest_prompt }))
}

fn strategy(choice: StrategyChoice) -> Strategy {
    match choice {
        StrategyChoice::Shared => Strategy::Shared,
        StrategyChoice::Chunked => Strategy::Chunked,
        StrategyChoice::Priority => Strategy::Priority,
        StrategyChoice::Disaggregated => Strategy::Disaggregated,
        StrategyChoice::Adaptive => Strategy::Adaptive,
    }
}
