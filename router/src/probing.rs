//! What a pair of workers can do, measured: `Operator.Probe`, for `tandem doctor`.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proto::v1;
use proto::v1::worker_control_client::WorkerControlClient;
use tonic::{Status, transport::Channel};

use crate::fleet::Worker;
use crate::operator_service::told;

/// Bytes of a probe at most; the room on the decode worker may be less.
const MAX_BYTES: u64 = 1 << 30;
/// Looks at a clock; the quickest answer counts.
const LOOKS: usize = 5;
/// Pushes of one block, then of all bytes; the quickest counts.
const SMALL: usize = 9;
const LARGE: usize = 3;
/// One push.
const PATIENCE: Duration = Duration::from_secs(10);

/// Measures pushes from one worker to another, and both clocks.
pub(crate) async fn probe(from: &Worker, to: &Worker, bytes: u64) -> Result<v1::ProbeReply, Status> {
    if bytes == 0 || bytes > MAX_BYTES {
        return Err(Status::invalid_argument(format!("bytes: {bytes} is not between 1 and {MAX_BYTES}")));
    }
    let (ours, theirs) = (&from.member, &to.member);
    if ours.block_tokens != theirs.block_tokens {
        return Err(Status::failed_precondition(format!(
            "{} has blocks of {} tokens and {} of {}: KV between them is converted, which is not measured",
            ours.worker, ours.block_tokens, theirs.worker, theirs.block_tokens
        )));
    }
    let (from_clock, to_clock) = (clock(from).await?, clock(to).await?);
    let small = best(from, to, 1, SMALL).await?;
    let large = best(from, to, bytes, LARGE).await?;
    Ok(v1::ProbeReply {
        transport: large.transport,
        small_bytes: small.bytes,
        small_ms: small.total_ms,
        large_bytes: large.bytes,
        large_ms: large.total_ms,
        from: Some(from_clock),
        to: Some(to_clock),
    })
}

fn control(worker: &Worker) -> WorkerControlClient<Channel> {
    WorkerControlClient::new(worker.channel.clone())
}

/// How far a worker's clock is from ours: by its quickest answer, whose middle is when it looked, give or take half its time.
async fn clock(worker: &Worker) -> Result<v1::ClockSkew, Status> {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64() * 1e3);
    let mut best = v1::ClockSkew { skew_ms: 0.0, round_trip_ms: f64::INFINITY };
    for _ in 0..LOOKS {
        let (began, asked) = (now(), Instant::now());
        let theirs = told(&worker.member.worker, control(worker).clock(v1::ClockRequest {}))
            .await?
            .into_inner()
            .unix_ms;
        let round_trip_ms = asked.elapsed().as_secs_f64() * 1e3;
        if round_trip_ms < best.round_trip_ms {
            best = v1::ClockSkew { skew_ms: theirs - began - round_trip_ms / 2.0, round_trip_ms };
        }
    }
    Ok(best)
}

async fn best(from: &Worker, to: &Worker, bytes: u64, times: usize) -> Result<v1::PushProbeReply, Status> {
    let mut best: Option<v1::PushProbeReply> = None;
    for _ in 0..times {
        let request = v1::ReserveProbeRequest { bytes, from: from.member.worker.clone() };
        let room = told(&to.member.worker, control(to).reserve_probe(request)).await?.into_inner();
        let mut control = control(from);
        let push = control.push_probe(v1::PushProbeRequest { ticket: room.ticket });
        let pushed = tokio::time::timeout(PATIENCE, push)
            .await
            .map_err(|_| Status::unavailable(format!("worker {} does not end its push", from.member.worker)))?
            .map_err(|e| Status::new(e.code(), format!("worker {}: {}", from.member.worker, e.message())))?
            .into_inner();
        if best.as_ref().is_none_or(|best| pushed.total_ms < best.total_ms) {
            best = Some(pushed);
        }
    }
    best.ok_or_else(|| Status::internal("nothing was pushed"))
}
