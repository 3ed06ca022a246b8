//! What pairs of workers can do, measured by the workers themselves, and their clocks.

use std::collections::BTreeMap;

use super::{Finding, Verdict, finding};
use crate::dial;
use proto::v1::operator_client::OperatorClient;
use proto::v1::{ClockSkew, ProbeReply, ProbeRequest, WorkerStatus};

/// Pairs that are measured; more are left out, and said to be.
const MAX_PAIRS: usize = 64;
/// A clock that is off by more should be put right: traces and logs of several machines no longer fit together.
const SKEW_MS: f64 = 100.0;

/// Every prefill worker with every decode worker.
pub(super) async fn measure(
    mut client: OperatorClient<dial::Channel>,
    workers: &[WorkerStatus],
    mib: u64,
) -> Vec<Finding> {
    let of = |role: &'static str| workers.iter().filter(move |w| w.role == role && w.state == "ready");
    let pairs: Vec<_> = of("prefill").flat_map(|from| of("decode").map(move |to| (from, to))).collect();
    let (mut all, mut clocks) = (Vec::new(), BTreeMap::new());
    for (from, to) in pairs.iter().take(MAX_PAIRS) {
        let what = format!("{} → {}", from.worker, to.worker);
        let request = ProbeRequest { from: from.worker.clone(), to: to.worker.clone(), bytes: mib << 20 };
        match client.probe(request).await.map(tonic::Response::into_inner) {
            Ok(reply) => {
                all.push(pair(&what, &reply, from, to));
                clocks
                    .extend([(from, reply.from), (to, reply.to)].map(|(w, clock)| (w.worker.clone(), clock)));
            }
            Err(status) => all.push(refused(&what, &status)),
        }
    }
    if pairs.len() > MAX_PAIRS {
        let seen = format!("{MAX_PAIRS} of {} pairs were measured", pairs.len());
        all.push(finding(
            "other pairs",
            Verdict::Note,
            seen,
            "run it again after a change of the fleet's members",
        ));
    }
    all.extend(clocks.into_iter().filter_map(|(worker, clock)| Some(skew(&worker, &clock?))));
    all
}

fn pair(what: &str, reply: &ProbeReply, from: &WorkerStatus, to: &WorkerStatus) -> Finding {
    let rate = reply.large_bytes as f64 / 1e6 / reply.large_ms.max(1e-6);
    let seen = format!(
        "{rate:.2} GB/s over {} ({} MiB, best of 3), {:.2} ms for one block of {} KiB, opened to committed",
        reply.transport,
        reply.large_bytes >> 20,
        reply.small_ms,
        reply.small_bytes >> 10,
    );
    // Shared memory is for one host: two workers that can do it need not be on the same.
    let can_rdma = [from, to].iter().all(|w| w.transports.iter().any(|way| way == "rdma"));
    if reply.transport == "tcp" && can_rdma {
        let fix = "its queue pairs fail: see tandem_kv_fallbacks_total and the workers' logs";
        return finding(what, Verdict::Broken, format!("{seen}; both can do rdma"), fix);
    }
    finding(what, Verdict::Good, seen, "")
}

fn refused(what: &str, status: &tonic::Status) -> Finding {
    let (verdict, fix) = match status.code() {
        tonic::Code::PermissionDenied => (Verdict::Note, "an operator's API key may measure (--api-key)"),
        tonic::Code::ResourceExhausted => {
            (Verdict::Note, "the pool is full; try again when there is less load")
        }
        tonic::Code::FailedPrecondition => (
            Verdict::Note,
            "pools of different block sizes or types are not measured, since KV is converted there",
        ),
        _ => (Verdict::Broken, "the log of both workers says more"),
    };
    finding(what, verdict, status.message(), fix)
}

fn skew(worker: &str, clock: &ClockSkew) -> Finding {
    let (off, sure) = (clock.skew_ms, clock.round_trip_ms / 2.0);
    let seen = format!("{off:+.1} ms from the router's, give or take {sure:.1}");
    match off.abs() > SKEW_MS + sure {
        true => finding(
            &format!("clock of {worker}"),
            Verdict::Note,
            seen,
            "run chrony or another NTP client on both machines: traces and certificates go by the clock",
        ),
        false => finding(&format!("clock of {worker}"), Verdict::Good, seen, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(name: &str, transports: &[&str]) -> WorkerStatus {
        let transports = transports.iter().map(|t| (*t).to_owned()).collect();
        WorkerStatus { worker: name.into(), transports, ..WorkerStatus::default() }
    }

    #[test]
    fn a_pair_that_fell_back_is_told_from_one_that_can_do_no_better() {
        let reply = ProbeReply {
            transport: "tcp".into(),
            large_bytes: 64 << 20,
            large_ms: 20.0,
            ..ProbeReply::default()
        };
        let (plain, able) = (worker("a", &["tcp"]), worker("b", &["shm", "rdma", "tcp"]));
        let fine = pair("a → b", &reply, &plain, &able);
        assert_eq!(fine.verdict, Verdict::Good);
        assert!(fine.seen.starts_with("3.36 GB/s over tcp"), "{}", fine.seen);
        let bad = pair("b → b", &reply, &able, &able);
        assert!(bad.verdict == Verdict::Broken && bad.seen.ends_with("both can do rdma"), "{bad:?}");
        let rdma = ProbeReply { transport: "rdma".into(), ..reply };
        assert_eq!(pair("b → b", &rdma, &able, &able).verdict, Verdict::Good);
    }

    #[test]
    fn a_clock_is_off_only_beyond_doubt() {
        let verdict = |skew_ms, round_trip_ms| skew("a", &ClockSkew { skew_ms, round_trip_ms }).verdict;
        assert_eq!(verdict(-99.0, 1.0), Verdict::Good);
        assert_eq!(verdict(150.0, 1.0), Verdict::Note);
        assert_eq!(verdict(150.0, 200.0), Verdict::Good);
    }
}
