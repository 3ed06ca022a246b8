//! A [`v1::ClusterStatus`] as JSON, with the field names of the proto.

use proto::v1;
use serde_json::{Value, json};

use crate::timeline;

/// The whole status.
pub fn status(s: &v1::ClusterStatus) -> Value {
    json!({
        "model": s.model,
        "version": s.version,
        "uptime_seconds": s.uptime_seconds,
        "registry_connected": s.registry_connected,
        "running": s.running,
        "queued": s.queued,
        "slo_ttft_ms": s.slo_ttft_ms,
        "slo_itl_ms": s.slo_itl_ms,
        "workers": s.workers.iter().map(worker).collect::<Vec<_>>(),
        "history": s.history.iter().map(moment).collect::<Vec<_>>(),
        "slow": s.slow.iter().map(passed).collect::<Vec<_>>(),
        "pairs": s.pairs.iter().map(pair).collect::<Vec<_>>(),
    })
}

fn worker(w: &v1::WorkerStatus) -> Value {
    json!({
        "worker": w.worker,
        "role": w.role,
        "address": w.address,
        "incarnation": w.incarnation.to_string(),
        "compat_hash": w.compat_hash,
        "state": w.state,
        "transports": w.transports,
        "block_tokens": w.block_tokens,
        "total_blocks": w.total_blocks,
        "free_blocks": w.free_blocks,
        "running": w.running,
        "waiting": w.waiting,
        "queued_tokens": w.queued_tokens,
        "tokens_per_second": w.tokens_per_second,
        "auto_role": w.auto_role,
    })
}

fn moment(m: &v1::Moment) -> Value {
    json!({
        "age_seconds": m.age_seconds,
        "length_seconds": m.length_seconds,
        "ended": m.ended,
        "failed": m.failed,
        "met": m.met,
        "prompt_tokens": m.prompt_tokens,
        "cached_tokens": m.cached_tokens,
        "output_tokens": m.output_tokens,
        "kv_bytes": m.kv_bytes,
        "local": m.local,
        "ttft_max_ms": m.ttft_max_ms,
        "ttft_mean_ms": m.ttft_mean_ms,
        "itl_mean_ms": m.itl_mean_ms,
        "itl_max_ms": m.itl_max_ms,
    })
}

fn passed(p: &v1::Passed) -> Value {
    let usage = p.usage.unwrap_or_default();
    let complete = v1::Complete { timeline: p.timeline.clone(), kv: p.kv.clone(), ..Default::default() };
    let mut value = timeline::json(&complete);
    value["request_id"] = json!(p.request_id);
    value["age_seconds"] = json!(p.age_seconds);
    value["usage"] = json!({
        "prompt_tokens": usage.prompt_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
    });
    value
}

fn pair(p: &v1::Pair) -> Value {
    json!({
        "from": p.from,
        "to": p.to,
        "requests": p.requests,
        "bytes": p.bytes,
        "transport": p.transport,
        "exposed_ms": p.exposed_ms,
    })
}
