//! `tandem bench serve`: checks what was asked for, shows progress, prints.

use std::path::Path;
use std::time::Duration;

use ::bench::serve::load::{Arrivals, Shape};
use ::bench::serve::record::Slo;
use ::bench::serve::target::Target;
use ::bench::serve::{self as measurement, Settings, plot};
use anyhow::{Context, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use planner::trace;

use crate::args::{Api, BenchServeArgs};
use crate::dial;

/// Measures.
pub async fn run(args: BenchServeArgs) -> anyhow::Result<()> {
    let settings = settings(&args)?;
    let target = match args.api {
        Api::Grpc => {
            let (channel, dial::ApiKey(key)) = dial::parts(&args.addr, &args.dial).await?;
            Target::Grpc { channel, key }
        }
        Api::Openai => {
            let key = match args.dial.api_key.key()? {
                Some(key) => Some(key.to_string()),
                None => std::env::var("OPENAI_API_KEY").ok(),
            };
            Target::openai(&args.addr, &args.model, key).map_err(|why| anyhow!("--addr {why}"))?
        }
    };
    let bar = ProgressBar::new(0)
        .with_style(ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} {elapsed}")?);
    let progress = |load: &str, ended: usize, of: usize| {
        if bar.message() != load {
            bar.set_message(load.to_owned());
        }
        bar.set_length(of as u64);
        bar.set_position(ended as u64);
    };
    let report = measurement::run(&target, &args.addr, &settings, &progress);
    let report = tokio::select! {
        report = report => report,
        () = crate::signal::wait() => return Err(crate::exit::Interrupted.into()),
    };
    bar.finish_and_clear();
    if let Some(path) = &args.html {
        std::fs::write(path, plot::page(&report))
            .with_context(|| format!("--html: cannot write {}", path.display()))?;
    }
    match args.json {
        true => println!("{}", serde_json::to_string(&report)?),
        false => print!("{report}"),
    }
    match report.loads.iter().find(|load| load.ok == 0) {
        Some(load) => bail!(
            "no request of \"{}\" was answered: {}",
            load.load,
            load.first_failure.as_deref().unwrap_or("all were shed, or none was due after the warm-up")
        ),
        None => Ok(()),
    }
}

fn settings(args: &BenchServeArgs) -> anyhow::Result<Settings> {
    let seconds = |flag: &str, value: f64| match value.is_finite() && (0.0..=1e6).contains(&value) {
        true => Ok(Duration::from_secs_f64(value)),
        false => Err(anyhow!("{flag}: {value} is not a number of seconds up to 1000000")),
    };
    let (span, warm_up) = (seconds("--seconds", args.seconds)?, seconds("--warm-up", args.warm_up)?);
    if warm_up >= span {
        bail!("--warm-up: {} s leave nothing of --seconds {}", args.warm_up, args.seconds);
    }
    if !(0.0..=1.0).contains(&args.spread) {
        bail!("--spread: {} is not between 0 and 1", args.spread);
    }
    if args.in_flight == 0 || args.requests == 0 || args.prompt_tokens == 0 || args.output_tokens == 0 {
        bail!("--in-flight, --requests, --prompt-tokens and --output-tokens: at least 1");
    }
    Ok(Settings {
        loads: loads(args)?,
        shape: Shape {
            prompt: args.prompt_tokens,
            output: args.output_tokens,
            spread: args.spread,
            shared: args.shared_prefix,
            vocab: args.vocab,
            longest: args.longest_prompt,
        },
        span,
        warm_up,
        requests: args.requests,
        in_flight: args.in_flight,
        slo: Slo { ttft_ms: args.slo_ttft_ms, tpot_ms: args.slo_itl_ms },
        seed: args.seed,
    })
}

fn loads(args: &BenchServeArgs) -> anyhow::Result<Vec<Arrivals>> {
    if let Some(file) = &args.trace {
        return Ok(vec![from_trace(file, args.speed)?]);
    }
    if !args.concurrency.is_empty() {
        if args.concurrency.iter().any(|c| !(1..=100_000).contains(c)) {
            bail!("--concurrency: 1 to 100000 at a time");
        }
        return Ok(args.concurrency.iter().map(|&concurrency| Arrivals::Closed { concurrency }).collect());
    }
    if args.rate.is_empty() {
        bail!("what load? --rate 1,2,4 (open loop), --concurrency 8 (closed loop) or --trace FILE");
    }
    if let Some(bad) = args.rate.iter().find(|r| !(r.is_finite() && **r > 0.0 && **r <= 1e6)) {
        bail!("--rate: {bad} is not a number of requests a second, above 0 and up to 1000000");
    }
    Ok(args.rate.iter().map(|&rate| Arrivals::Poisson { rate, burst: args.burst }).collect())
}

fn from_trace(file: &Path, speed: f64) -> anyhow::Result<Arrivals> {
    if !(speed.is_finite() && speed > 0.0) {
        bail!("--speed: {speed} is not a factor above 0");
    }
    let text =
        std::fs::read_to_string(file).with_context(|| format!("--trace: cannot read {}", file.display()))?;
    let requests = trace::parse(&text).with_context(|| format!("--trace {}", file.display()))?;
    Ok(Arrivals::Trace { requests, speed })
}
