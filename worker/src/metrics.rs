//! What both kinds of worker count. The table for operators is docs/METRICS.md, kept true by a test.

use std::sync::Arc;
use std::time::Duration;

use cluster::Load;
use engine::kv::pool::BlockPool;
use kv_transport::{Fallback, Sender, SenderStats};
use telemetry::{Counter, Family, Histogram, Metrics};
use tls::Expiry;
use tokio::sync::watch;
use tonic::{Code, Status};

/// Why a call was refused.
const REFUSALS: [&str; 7] = ["stale", "superseded", "duplicate", "full", "draining", "invalid", "other"];
const BLOCK_STATES: [&str; 5] = ["free", "cached", "running", "reserved", "quarantined"];
const SEQUENCE_STATES: [&str; 2] = ["running", "waiting"];
const PUSH_OUTCOMES: [&str; 2] = ["committed", "failed"];

/// Engine steps.
#[derive(Clone)]
pub struct Steps {
    count: Counter,
    tokens: Counter,
    seconds: Histogram,
    errors: Histogram,
}

impl Steps {
    /// Registers them.
    pub fn new(m: &Metrics) -> Self {
        Self {
            count: m.counter("tandem_steps_total", "Engine steps."),
            tokens: m.counter("tandem_step_tokens_total", "Tokens computed in engine steps."),
            seconds: m.seconds("tandem_step_duration_seconds", "How long an engine step takes."),
            errors: m.seconds(
                "tandem_step_prediction_error_seconds",
                "How far the learned step time was from the real one.",
            ),
        }
    }

    /// What a step was predicted to take, and took.
    pub fn predicted(&self, predicted_ms: f64, actual_ms: f64) {
        self.errors.record((predicted_ms - actual_ms).abs() / 1e3);
    }

    /// One step of so many tokens.
    pub fn add(&self, tokens: usize, took: Duration) {
        self.count.increment(1);
        self.tokens.increment(tokens as u64);
        self.seconds.record(took.as_secs_f64());
    }
}

/// Calls of the router that a worker refuses.
#[derive(Clone)]
pub struct Refusals {
    by_reason: Arc<Family<Counter>>,
}

impl Refusals {
    /// Registers them.
    pub fn new(m: &Metrics) -> Self {
        let help = "Calls of a router that were refused: meant for another start of this worker, superseded by a newer attempt, ...";
        Self { by_reason: Arc::new(m.counters("tandem_calls_refused_total", help, "reason", &REFUSALS)) }
    }

    /// Counts a refusal and passes it on.
    pub fn count(&self, status: Status) -> Status {
        let reason = match status.code() {
            Code::FailedPrecondition => "stale",
            Code::Aborted => "superseded",
            Code::AlreadyExists => "duplicate",
            Code::ResourceExhausted => "full",
            Code::Unavailable => "draining",
            Code::InvalidArgument => "invalid",
            _ => "other",
        };
        self.by_reason.of(reason).increment(1);
        status
    }
}

/// What is read of any worker when the page is asked for: its blocks and sequences.
pub fn collect(
    m: &Metrics,
    pool: Arc<BlockPool>,
    load: watch::Receiver<Load>,
) -> impl Fn() + Send + Sync + use<> {
    let blocks =
        m.gauges("tandem_kv_blocks", "KV blocks by state; they add up to the pool.", "state", &BLOCK_STATES);
    let sequences = m.gauges("tandem_sequences", "Sequences on this worker.", "state", &SEQUENCE_STATES);
    let draining = m.gauge("tandem_draining", "1 while this worker takes nothing new.");
    let stuck = m.gauge("tandem_stuck", "1 while the engine has work and makes no steps.");
    let queued = m.gauge("tandem_queued_tokens", "Prompt tokens accepted and not computed.");
    let usage = m.gauge("tandem_kv_usage_ratio", "KV blocks in use, 0 to 1; cached ones are not.");
    move || {
        let counts = pool.counts();
        let by_state = [counts.free, counts.cached, counts.running, counts.reserved, counts.quarantined];
        for (state, count) in BLOCK_STATES.iter().zip(by_state) {
            blocks.of(state).set(count as f64);
        }
        let in_use = counts.total - counts.free - counts.cached;
        usage.set(in_use as f64 / counts.total.max(1) as f64);
        let load = load.borrow().clone();
        sequences.of("running").set(f64::from(load.running));
        sequences.of("waiting").set(f64::from(load.waiting));
        draining.set(if load.draining { 1.0 } else { 0.0 });
        stuck.set(if load.stuck { 1.0 } else { 0.0 });
        queued.set(load.queued_tokens as f64);
    }
}

/// How long the certificates last.
pub fn collect_certificates(m: &Metrics, expiry: Expiry) -> impl Fn() + Send + Sync + use<> {
    let help = "Seconds until a plane's certificate, or the authority it trusts, ends; 0 when it cannot be read, +Inf when the plane has none.";
    let planes = Expiry::PLANES;
    let left = m.gauges("tandem_certificate_expiry_seconds", help, "plane", &planes);
    move || planes.iter().for_each(|plane| left.of(plane).set(expiry.seconds_left(plane)))
}

/// What is read of the sending side of the transport.
pub fn collect_sender(m: &Metrics, sender: Sender) -> impl Fn() + Send + Sync + use<> {
    let bytes = m.counter("tandem_kv_sent_bytes_total", "KV bytes handed to the network.");
    let pushes = m.counters("tandem_kv_pushes_total", "Pushes by how they ended.", "outcome", &PUSH_OUTCOMES);
    let refetched =
        m.counter("tandem_kv_refetched_cells_total", "Cells sent again because of a bad checksum.");
    let connects = m.counter("tandem_kv_connects_total", "KV connections made.");
    let rdma = m.counter("tandem_kv_rdma_sent_bytes_total", "Of the KV bytes sent, those written by RDMA.");
    let help = "Of the KV bytes sent, those that went over TCP as int8, as they went.";
    let packed = m.counter("tandem_kv_packed_sent_bytes_total", help);
    let help = "Of the KV bytes sent, those that a peer on this host copied from our memory.";
    let shm = m.counter("tandem_kv_shm_sent_bytes_total", help);
    let help = "Of the KV bytes sent, those that a peer on this host copied from our device to its own.";
    let cuda_ipc = m.counter("tandem_kv_cuda_ipc_sent_bytes_total", help);
    let help = "Peers with warm connections, by the way that KV takes to them.";
    let peers_by = m.gauges("tandem_kv_peers", help, "transport", &["cuda_ipc", "rdma", "shm", "tcp"]);
    let help = "RDMA ports in use, by the memory that their cards read and write: the GPU's (GPUDirect) or the host's.";
    let rails = m.gauges("tandem_kv_rdma_rails", help, "memory", &["device", "host"]);
    let help = "Times that a peer was used over TCP although RDMA was wanted.";
    let fallbacks =
        m.counters("tandem_kv_fallbacks_total", help, "reason", &Fallback::ALL.map(Fallback::name));
    move || {
        let SenderStats {
            committed_total,
            failed_total,
            bytes_total,
            refetched_cells_total,
            connects_total,
            packed_bytes_total,
            rdma_bytes_total,
            rdma_peers,
            rails: all_rails,
            direct_rails,
            shm_bytes_total,
            shm_peers,
            cuda_ipc_bytes_total,
            cuda_ipc_peers,
            peers,
            fallbacks_total,
            ..
        } = sender.stats();
        bytes.absolute(bytes_total);
        pushes.of("committed").absolute(committed_total);
        pushes.of("failed").absolute(failed_total);
        refetched.absolute(refetched_cells_total);
        connects.absolute(connects_total);
        packed.absolute(packed_bytes_total);
        rdma.absolute(rdma_bytes_total);
        peers_by.of("rdma").set(rdma_peers as f64);
        rails.of("device").set(direct_rails as f64);
        rails.of("host").set(all_rails.saturating_sub(direct_rails) as f64);
        shm.absolute(shm_bytes_total);
        peers_by.of("shm").set(shm_peers as f64);
        cuda_ipc.absolute(cuda_ipc_bytes_total);
        peers_by.of("cuda_ipc").set(cuda_ipc_peers as f64);
        // The counts are taken one after the other: links come and go meanwhile.
        peers_by.of("tcp").set(peers.saturating_sub(rdma_peers + shm_peers + cuda_ipc_peers) as f64);
        for (why, total) in fallbacks_total {
            fallbacks.of(why.name()).absolute(total);
        }
    }
}
