//! `tandem status`: the cluster as its router sees it, once.

use proto::v1::operator_client::OperatorClient;
use proto::v1::{self, GetStatusRequest};

use crate::args::StatusArgs;
use crate::dial;

/// Prints it.
pub async fn run(args: StatusArgs) -> anyhow::Result<()> {
    let status = fetch(&mut OperatorClient::new(dial::router(&args.addr, &args.dial).await?)).await?;
    match args.json {
        true => println!("{}", router::status::json::status(&status)),
        false => print!("{}", text(&status)),
    }
    Ok(())
}

/// Asks the router.
pub async fn fetch(client: &mut OperatorClient<dial::Channel>) -> anyhow::Result<v1::ClusterStatus> {
    Ok(client.get_status(GetStatusRequest {}).await?.into_inner())
}

/// What ended lately, per second and on average.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Rates {
    pub requests: f64,
    pub failed: f64,
    pub prompt_tokens: f64,
    pub output_tokens: f64,
    pub kv_bytes: f64,
    pub ttft_ms: f64,
    pub itl_ms: f64,
    /// Of the requests that ended, well or not, those within the limits, 0 to 1; nothing when none ended.
    pub within: Option<f64>,
}

/// Over the last `seconds`.
pub fn rates(status: &v1::ClusterStatus, seconds: f64) -> Rates {
    let recent: Vec<&v1::Moment> = status.history.iter().filter(|m| m.age_seconds < seconds).collect();
    let length: f64 = recent.iter().map(|m| m.length_seconds).sum::<f64>().max(1e-3);
    let sum = |of: &dyn Fn(&v1::Moment) -> f64| recent.iter().map(|m| of(m)).sum::<f64>();
    let ended = sum(&|m| f64::from(m.ended));
    let mean = |of: &dyn Fn(&v1::Moment) -> f64| {
        if ended > 0.0 { sum(&|m| of(m) * f64::from(m.ended)) / ended } else { 0.0 }
    };
    let all = ended + sum(&|m| f64::from(m.failed));
    Rates {
        requests: ended / length,
        failed: sum(&|m| f64::from(m.failed)) / length,
        prompt_tokens: sum(&|m| m.prompt_tokens as f64) / length,
        output_tokens: sum(&|m| m.output_tokens as f64) / length,
        kv_bytes: sum(&|m| m.kv_bytes as f64) / length,
        ttft_ms: mean(&|m| m.ttft_mean_ms),
        itl_ms: mean(&|m| m.itl_mean_ms),
        within: (all > 0.0).then(|| sum(&|m| f64::from(m.met)) / all),
    }
}

/// The first line: what, since when, how much.
pub fn headline(status: &v1::ClusterStatus) -> String {
    let registry = if status.registry_connected { "" } else { ", REGISTRY AWAY" };
    format!(
        "{} · {} running, {} queued · up {}{registry}",
        status.model,
        status.running,
        status.queued,
        duration(status.uptime_seconds)
    )
}

/// The rates in a line.
pub fn rates_line(rates: &Rates, status: &v1::ClusterStatus) -> String {
    let within = match rates.within {
        Some(share) => {
            format!("{:.1} % within {} ms / {} ms", share * 100.0, status.slo_ttft_ms, status.slo_itl_ms)
        }
        None => "none ended".to_owned(),
    };
    format!(
        "last minute: {:.2} req/s ({:.2} failed), in {:.0} tok/s, out {:.0} tok/s, KV {}/s, TTFT {:.0} ms, ITL {:.1} ms, {within}",
        rates.requests,
        rates.failed,
        rates.prompt_tokens,
        rates.output_tokens,
        bytes(rates.kv_bytes),
        rates.ttft_ms,
        rates.itl_ms
    )
}

fn text(status: &v1::ClusterStatus) -> String {
    let mut out = format!("{}\n{}\n", headline(status), rates_line(&rates(status, 60.0), status));
    let width = status.workers.iter().map(|w| w.worker.len()).max().unwrap_or(6).max(6);
    out += &format!(
        "\n{:width$}  {:7} {:8} {:>7} {:>7} {:>8} {:>6} {:>8}  {:10} {}\n",
        "WORKER", "POOL", "STATE", "RUNNING", "WAITING", "QUEUED", "KV", "TOK/S", "TRANSPORTS", "ADDRESS"
    );
    for w in &status.workers {
        out += &format!(
            "{:width$}  {:7} {:8} {:>7} {:>7} {:>8} {:>5.0}% {:>8.1}  {:10} {}\n",
            w.worker,
            w.role,
            w.state,
            w.running,
            w.waiting,
            w.queued_tokens,
            kv_in_use(w) * 100.0,
            w.tokens_per_second,
            w.transports.join(","),
            w.address
        );
    }
    if status.workers.is_empty() {
        out += "no worker has joined\n";
    }
    for p in &status.pairs {
        out += &format!(
            "KV {} → {}: {} requests, {} over {}, exposed {:.1} ms\n",
            p.from,
            p.to,
            p.requests,
            bytes(p.bytes as f64),
            p.transport,
            p.exposed_ms
        );
    }
    out
}

/// Share of a worker's blocks that are neither free nor only cached, 0 to 1.
pub fn kv_in_use(worker: &v1::WorkerStatus) -> f64 {
    let total = f64::from(worker.total_blocks.max(1));
    (1.0 - f64::from(worker.free_blocks) / total).clamp(0.0, 1.0)
}

/// A number of bytes in a unit that fits.
pub fn bytes(count: f64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let step = (count.max(1.0).log10() / 3.0).floor().clamp(0.0, 4.0);
    format!("{:.1} {}", count / 1000_f64.powf(step), units[step as usize])
}

/// Seconds in a unit that fits.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_means_over_what_ended() {
        let moment = |age_seconds, ended, met, ttft_mean_ms| v1::Moment {
            age_seconds,
            length_seconds: 5.0,
            ended,
            met,
            failed: 1,
            output_tokens: 50,
            ttft_mean_ms,
            ..Default::default()
        };
        let history = vec![moment(90.0, 9, 9, 1.0), moment(5.0, 1, 0, 100.0), moment(0.0, 3, 3, 20.0)];
        let status = v1::ClusterStatus { history, ..Default::default() };
        let seen = rates(&status, 60.0);
        assert_eq!((seen.requests, seen.failed, seen.output_tokens), (0.4, 0.2, 10.0));
        assert_eq!((seen.ttft_ms, seen.within), (40.0, Some(0.5)));
        assert_eq!(rates(&v1::ClusterStatus::default(), 60.0).within, None);
    }

    #[test]
    fn units_fit() {
        assert_eq!([bytes(0.0), bytes(999.0), bytes(45.7e6)], ["0.0 B", "999.0 B", "45.7 MB"]);
        assert_eq!([duration(61.0), duration(7199.0), duration(1e6)], ["61 s", "120 min", "11.6 days"]);
    }
}
