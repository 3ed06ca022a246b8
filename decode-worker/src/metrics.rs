//! What a decode worker counts. The table for operators is docs/METRICS.md, kept true by a test.

use std::time::Duration;

use kv_transport::{LandingEnd, Receiver};
use telemetry::{Counter, Family, Gauge, Histogram, Metrics};

use crate::outlook::{NoRoom, Outlook};

/// Counted by the engine's loop.
#[derive(Clone)]
pub(crate) struct LoopMetrics {
    pub steps: worker::metrics::Steps,
    pub preemptions: Counter,
    pub preempted_tokens: Counter,
    pub held_back: Gauge,
    pub local_prefills: Counter,
    pub corrupt_blocks: Counter,
    verified_bytes: Counter,
    verify_seconds: Histogram,
}

impl LoopMetrics {
    pub fn new(m: &Metrics) -> Self {
        Self {
            steps: worker::metrics::Steps::new(m),
            preemptions: m.counter(
                "tandem_preemptions_total",
                "Choices that gave their blocks back and are computed again.",
            ),
            preempted_tokens: m
                .counter("tandem_preempted_tokens_total", "Computed tokens that preempted choices lost."),
            held_back: m.gauge(
                "tandem_held_back_sequences",
                "Landed sequences that wait to join a batch that is at its ITL limit.",
            ),
            corrupt_blocks: m.counter(
                "tandem_kv_corrupt_blocks_total",
                "Landed blocks that changed in the pool before their first step, and were computed again.",
            ),
            verified_bytes: m.counter(
                "tandem_kv_verified_bytes_total",
                "Landed KV bytes compared with their checksums once more before the first step.",
            ),
            verify_seconds: m
                .seconds("tandem_kv_verify_duration_seconds", "How long one piece of that comparison takes."),
            local_prefills: m
                .counter("tandem_local_prefills_total", "Prompts prefilled on this decode worker."),
        }
    }
}

impl LoopMetrics {
    /// So many landed bytes were compared in that time.
    pub fn verified(&self, bytes: usize, took: Duration) {
        self.verified_bytes.increment(bytes as u64);
        self.verify_seconds.record(took.as_secs_f64());
    }
}

/// Requests that were refused since they would not fit.
pub(crate) fn no_room(m: &Metrics) -> Family<Counter> {
    let help = "Requests refused because they are expected not to fit: by KV growth, or by the ITL limit.";
    m.counters("tandem_no_room_total", help, "reason", &NoRoom::ALL)
}

/// What is read of the outlook when the page is asked for.
pub(crate) fn collect_outlook(m: &Metrics, outlook: Outlook) -> impl Fn() + Send + Sync + use<> {
    let growth = m.gauge(
        "tandem_expected_growth_blocks",
        "KV blocks that accepted sequences are expected to grow by, from the outputs so far.",
    );
    let most = m.gauge(
        "tandem_most_sequences",
        "Sequences that keep the ITL limit by the learned step time; 0: not bounded.",
    );
    move || {
        let (blocks, sequences) = outlook.numbers();
        growth.set(blocks as f64);
        most.set(sequences.unwrap_or(0) as f64);
    }
}

/// What is read of the receiving side of the transport when the page is asked for.
pub(crate) fn collect_receiver(m: &Metrics, receiver: Receiver) -> impl Fn() + Send + Sync + use<> {
    let outcomes: Vec<&'static str> =
        std::iter::once("committed").chain(LandingEnd::ALL.map(LandingEnd::name)).collect();
    let landings =
        m.counters("tandem_kv_landings_total", "Reservations by how they ended.", "outcome", &outcomes);
    let bytes = m.counter("tandem_kv_received_bytes_total", "KV bytes written into place.");
    let discarded =
        m.counter("tandem_kv_discarded_bytes_total", "KV bytes thrown away: duplicates and late writes.");
    let duplicates =
        m.counter("tandem_kv_duplicate_cells_total", "Cells that arrived once more although verified.");
    let failures =
        m.counter("tandem_kv_checksum_failures_total", "Cells whose checksum was wrong on arrival.");
    let help = "Connections and tickets refused: of another start or an ended transfer (stale), with a wrong secret (forged), in another worker's hands (misused), without TLS or that worker's certificate (identity).";
    let reasons = ["stale", "forged", "misused", "identity"];
    let refused = m.counters("tandem_kv_refused_total", help, "reason", &reasons);
    let nonsense = m.counter("tandem_kv_protocol_errors_total", "KV connections closed because of nonsense.");
    let rdma =
        m.counter("tandem_kv_rdma_received_bytes_total", "Of the KV bytes received, those written by RDMA.");
    let help = "Of the KV bytes received, those that came over TCP as int8, as they came.";
    let packed = m.counter("tandem_kv_packed_received_bytes_total", help);
    let help = "Of the KV bytes received, those copied from the memory of a peer on this host.";
    let shm = m.counter("tandem_kv_shm_received_bytes_total", help);
    let help = "Of the KV bytes received, those copied from the device of a peer on this host to ours.";
    let cuda_ipc = m.counter("tandem_kv_cuda_ipc_received_bytes_total", help);
    let lost = m.counter("tandem_kv_queue_pairs_lost_total", "Queue pairs that broke on this side.");
    let connections = m.gauge("tandem_kv_connections", "Open KV connections.");
    move || {
        let stats = receiver.stats();
        landings.of("committed").absolute(stats.committed_total);
        for (end, total) in stats.voided_total {
            landings.of(end.name()).absolute(total);
        }
        bytes.absolute(stats.bytes_total);
        packed.absolute(stats.packed_bytes_total);
        rdma.absolute(stats.rdma_bytes_total);
        shm.absolute(stats.shm_bytes_total);
        cuda_ipc.absolute(stats.cuda_ipc_bytes_total);
        lost.absolute(stats.queue_pairs_lost_total);
        discarded.absolute(stats.discarded_bytes_total);
        duplicates.absolute(stats.duplicate_cells_total);
        failures.absolute(stats.checksum_failures_total);
        refused.of("stale").absolute(stats.stale_refused_total);
        refused.of("forged").absolute(stats.forged_refused_total);
        refused.of("misused").absolute(stats.misused_refused_total);
        refused.of("identity").absolute(stats.identity_refused_total);
        nonsense.absolute(stats.protocol_errors_total);
        connections.set(stats.connections as f64);
    }
}
