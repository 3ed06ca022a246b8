//! `tandem plan` replays a trace through the planner; `tandem planner` runs it on a live cluster.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use planner::naive::Hpa;
use planner::replay::{self, Outcome};
use planner::trace::{self, Request};
use planner::{Bounds, Decision, Planner, Policy, Profile, Slo};

use crate::args::{PlanArgs, PlannerArgs, PlanningArgs};
use crate::{serve, signal};

/// Runs the command.
pub async fn run(args: PlanArgs) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(move || plan(&args)).await?
}

fn plan(args: &PlanArgs) -> anyhow::Result<()> {
    let (policy, profile) = planning(&args.planning)?;
    let (slo, prefill, decode) = (policy.slo, policy.prefill, policy.decode);
    let text = std::fs::read_to_string(&args.trace)
        .with_context(|| format!("--trace: cannot read {}", args.trace.display()))?;
    let requests = trace::parse(&text).with_context(|| format!("--trace {}", args.trace.display()))?;
    let requests = trace::multiply(&requests, args.load);

    let start = [
        args.start_prefill.unwrap_or(prefill.min.max(1)).clamp(prefill.min, prefill.max),
        args.start_decode.unwrap_or(decode.min).clamp(decode.min, decode.max),
    ];
    let mut planner = Planner::new(policy, profile.clone(), start[0], start[1]);
    let planned = replay::replay(&requests, &profile, slo, start, &mut planner);
    let mut rows = vec![("planner".to_owned(), planned)];
    if args.compare {
        compare(&mut rows, &requests, &profile, slo, [prefill, decode], start);
    }
    match args.json {
        true => println!("{}", json(&rows)),
        false => print(args, &requests, &rows),
    }
    Ok(())
}

/// Runs the planner until it is told to stop.
pub async fn serve(args: PlannerArgs) -> anyhow::Result<()> {
    let stop = signal::stop_token();
    let config = config(&args)?;
    let listener = serve::bind(args.listen).await?;
    Ok(autoscaler::run(config, listener, stop).await?)
}

/// What the planner would refuse at its start.
pub fn check(args: &PlannerArgs) -> anyhow::Result<()> {
    config(args).map(drop)
}

fn config(args: &PlannerArgs) -> anyhow::Result<autoscaler::Config> {
    let (policy, profile) = planning(&args.planning)?;
    let tls = args.dial.files();
    if let Some(files) = &tls {
        files.read()?;
    }
    let cluster_tls = args.cluster_tls.files();
    if let Some(files) = &cluster_tls {
        files.names()?;
    }
    Ok(autoscaler::Config {
        routers: args.routers.clone(),
        tls,
        cluster_tls,
        api_key: args.dial.api_key.key()?,
        policy,
        profile,
        interval: Duration::from_secs(args.look_seconds),
        switch_roles: args.switch_roles,
    })
}

fn planning(args: &PlanningArgs) -> anyhow::Result<(Policy, Profile)> {
    let slo = Slo { ttft: positive("--slo-ttft", args.slo_ttft)?, itl: positive("--slo-itl", args.slo_itl)? };
    let prefill = bounds("prefill", args.min_prefill, args.max_prefill)?;
    let decode = bounds("decode", args.min_decode, args.max_decode)?;
    if decode.min == 0 {
        bail!("--min-decode: at least 1, since every request ends on a decode worker");
    }
    let policy = Policy {
        down_window: f64::from(args.shrink_after_seconds),
        cooldown: f64::from(args.cooldown_seconds),
        ..Policy::new(slo, prefill, decode)
    };
    Ok((policy, profile(args.profile.as_deref())?))
}

fn compare(
    rows: &mut Vec<(String, Outcome)>,
    requests: &[Request],
    profile: &Profile,
    slo: Slo,
    bounds: [Bounds; 2],
    start: [usize; 2],
) {
    let share = rows[0].1.attained;
    let most = bounds[0].max.max(bounds[1].max);
    let ([p, d], fixed) = replay::cheapest_static(requests, profile, slo, share, most);
    rows.push((format!("static {p}+{d}, the cheapest that is as good"), fixed));
    let mut hpa = Hpa::new(0.7, bounds[0], bounds[1], start);
    rows.push(("HPA on busy share 70 %".to_owned(), replay::replay(requests, profile, slo, start, &mut hpa)));
}

fn positive(flag: &str, seconds: f64) -> anyhow::Result<f64> {
    match seconds > 0.0 && seconds.is_finite() {
        true => Ok(seconds),
        false => bail!("{flag}: a positive number of seconds"),
    }
}

fn bounds(pool: &str, min: usize, max: usize) -> anyhow::Result<Bounds> {
    match min <= max && max >= 1 {
        true => Ok(Bounds { min, max }),
        false => bail!("--min-{pool} {min} is above --max-{pool} {max}"),
    }
}

fn profile(file: Option<&Path>) -> anyhow::Result<Profile> {
    let Some(file) = file else { return Ok(Profile::H100_8B) };
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("--profile: cannot read {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("--profile {}", file.display()))
}

fn json(rows: &[(String, Outcome)]) -> serde_json::Value {
    rows.iter().map(|(name, outcome)| serde_json::json!({"fleet": name, "outcome": outcome})).collect()
}

fn print(args: &PlanArgs, requests: &[Request], rows: &[(String, Outcome)]) {
    let hours = requests.last().map_or(0.0, |r| r.at) / 3600.0;
    println!(
        "{} requests in {hours:.2} h, TTFT within {} s and ITL within {} s\n",
        requests.len(),
        args.planning.slo_ttft,
        args.planning.slo_itl
    );
    println!("  time    pool     from  to  why");
    for decision in &rows[0].1.decisions {
        println!("  {}", line(decision));
    }
    println!(
        "\n  {:<44} {:>9} {:>15} {:>17} {:>13} {:>6} {:>9}",
        "fleet", "SLO met", "TTFT p50/p99 s", "TPOT p50/p99 ms", "worker-hours", "dec/h", "reversals"
    );
    for (name, o) in rows {
        println!(
            "  {name:<44} {:>8.2}% {:>7.2}/{:<7.2} {:>8.1}/{:<8.1} {:>5.2}+{:<6.2} {:>6.1} {:>9}",
            o.attained * 100.0,
            o.ttft[0],
            o.ttft[1],
            o.tpot[0] * 1e3,
            o.tpot[1] * 1e3,
            o.worker_hours[0],
            o.worker_hours[1],
            o.decisions_per_hour,
            o.reversals
        );
    }
}

fn line(decision: &Decision) -> String {
    let minutes = (decision.at / 60.0) as u64;
    let reason = decision.reason.name().replace('_', " ");
    let pool = format!("{:?}", decision.pool).to_lowercase();
    format!(
        "{minutes:>3}:{:02}  {pool:<8} {:>4} {:>3}  {reason}",
        decision.at as u64 % 60,
        decision.from,
        decision.to
    )
}
