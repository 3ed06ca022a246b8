//! What a router counts. The table for operators is docs/METRICS.md, kept true by a test.

use proto::v1;
use telemetry::{Counter, Family, Gauge, Histogram, NamedCounters};
use tonic::{Code, Status};

use crate::admission::Admission;
use crate::fleet::Fleet;
use crate::status::Slo;

/// How requests end.
const OUTCOMES: [&str; 12] = [
    "ok",
    "cancelled",
    "invalid_argument",
    "not_found",
    "already_exists",
    "resource_exhausted",
    "deadline_exceeded",
    "unavailable",
    "data_loss",
    "aborted",
    "internal",
    "other",
];
/// Why an attempt was given up for another one.
const LOSSES: [&str; 6] = ["unreachable", "unavailable", "aborted", "corrupt", "full", "other"];
/// Where prompts are prefilled, and why.
const PLACEMENTS: [&str; 9] = [
    "remote",
    "remote:policy",
    "local:short",
    "local:faster",
    "local:policy",
    "local:no-prefill-worker",
    "local:prefix-hit",
    "local:resume",
    "other",
];
/// Why a request was shed here.
const SHEDS: [&str; 3] = ["queue_full", "queue_timeout", "workers_full"];
const WORKER_STATES: [&str; 4] = ["ready", "suspect", "draining", "stuck"];

/// Why a call was refused for its API key.
const KEY_REFUSALS: [&str; 6] =
    ["missing", "unknown", "not_operator", "requests_per_minute", "tokens_per_minute", "concurrent"];
/// Stands for all calls where no keys are wanted.
const NO_KEY: &str = "none";

/// Where a prompt was prefilled, as a label.
const WAYS: [&str; 2] = ["local", "remote"];

/// What is counted for API keys, by the name of who has them.
pub struct KeyMetrics {
    /// Calls refused, by why.
    pub refused: Family<Counter>,
    calls: NamedCounters,
    tokens: NamedCounters,
}

impl KeyMetrics {
    /// Registers them.
    pub fn new(m: &telemetry::Metrics) -> Self {
        let refused = "Calls refused for their API key: none was shown (missing), it is not known, it is no operator's, or one of its limits is reached.";
        let calls = "Calls by whose API key they show; none: no key is wanted.";
        let tokens = "Prompt and output tokens by whose API key asked for them.";
        Self {
            refused: m.counters("tandem_key_refused_total", refused, "reason", &KEY_REFUSALS),
            calls: m.named_counters("tandem_key_calls_total", calls, "key", NO_KEY),
            tokens: m.named_counters("tandem_key_tokens_total", tokens, "key", NO_KEY),
        }
    }

    /// A call with that client's key, or without any.
    pub fn call(&self, name: Option<&str>) {
        self.calls.add(name.unwrap_or(NO_KEY), 1);
    }

    /// Tokens that were used.
    pub fn tokens(&self, name: Option<&str>, tokens: usize) {
        self.tokens.add(name.unwrap_or(NO_KEY), tokens as u64);
    }
}

/// The router's counters and histograms.
pub struct Metrics {
    /// Requests by how they ended.
    pub requests: Family<Counter>,
    /// Attempts that were followed by another one.
    pub retries: Family<Counter>,
    /// Attempts that went on from tokens already sent.
    pub resumes: Counter,
    /// Running sequences that were to move to another decode worker.
    pub moves: Family<Counter>,
    /// Attempts by where the prompt was prefilled.
    pub placements: Family<Counter>,
    /// Requests shed.
    pub shed: Family<Counter>,
    /// Request ids refused because they are running.
    pub duplicates: Counter,
    /// Connections closed because their address had too many.
    pub turned_away: Counter,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    output_tokens: Counter,
    within_slo: Counter,
    first_token: Histogram,
    /// Of both ways: what placement expected, what came, how far apart.
    expected: Family<Histogram>,
    measured: Family<Histogram>,
    missed: Family<Histogram>,
    token_gap: Histogram,
    per_token: Histogram,
    duration: Histogram,
    queue: Histogram,
    prefill: Histogram,
    exposed: Histogram,
    decode: Histogram,
}

impl Metrics {
    /// Registers all of them.
    pub fn new(m: &telemetry::Metrics, model: &str) -> Self {
        m.info(&[("role", "router"), ("model", model), ("version", env!("CARGO_PKG_VERSION"))]);
        Self {
            requests: m.counters(
                "tandem_requests_total",
                "Generate calls by how they ended.",
                "outcome",
                &OUTCOMES,
            ),
            retries: m.counters(
                "tandem_retries_total",
                "Attempts that were followed by another one.",
                "reason",
                &LOSSES,
            ),
            resumes: m.counter("tandem_resumes_total", "Attempts that went on from tokens already sent."),
            moves: m.counters(
                "tandem_migrations_total",
                "Tries to move a running sequence, KV and all, to another decode worker.",
                "outcome",
                &["moved", "failed"],
            ),
            placements: m.counters(
                "tandem_placements_total",
                "Attempts by where the prompt is prefilled.",
                "reason",
                &PLACEMENTS,
            ),
            shed: m.counters("tandem_shed_total", "Requests shed.", "reason", &SHEDS),
            duplicates: m
                .counter("tandem_duplicate_requests_total", "Requests refused because their id is running."),
            turned_away: m.counter(
                "tandem_connections_refused_total",
                "Connections closed at once because their address had too many.",
            ),
            prompt_tokens: m
                .counter("tandem_prompt_tokens_total", "Prompt tokens of requests that ended well."),
            cached_tokens: m.counter(
                "tandem_cached_prompt_tokens_total",
                "Prompt tokens of requests that ended well whose KV the decode worker held already.",
            ),
            within_slo: m.counter(
                "tandem_requests_within_slo_total",
                "Requests that ended well within the router's limits for TTFT and mean ITL.",
            ),
            per_token: m.seconds(
                "tandem_time_per_output_token_seconds",
                "(Duration - TTFT) / (output tokens of a choice - 1).",
            ),
            queue: m.seconds("tandem_queue_seconds", "Waiting in the router and in the prefilling worker."),
            prefill: m.seconds("tandem_prefill_seconds", "Computing the prompt, first chunk to last."),
            exposed: m.seconds(
                "tandem_exposed_transfer_seconds",
                "Prefill computed to sequence runnable, of requests whose KV was pushed.",
            ),
            decode: m.seconds("tandem_decode_seconds", "First token to last."),
            output_tokens: m
                .counter("tandem_output_tokens_total", "Output tokens of requests that ended well."),
            first_token: m
                .seconds("tandem_time_to_first_token_seconds", "Received to first text, queueing included."),
            expected: m.seconds_by(
                "tandem_placement_expected_seconds",
                "Placed to first token as placement expected it, by where the prompt was prefilled.",
                "way",
                &WAYS,
            ),
            measured: m.seconds_by("tandem_placement_measured_seconds", "The same as it came.", "way", &WAYS),
            missed: m.seconds_by(
                "tandem_placement_error_seconds",
                "How far the two are apart.",
                "way",
                &WAYS,
            ),
            token_gap: m
                .seconds("tandem_inter_token_latency_seconds", "Gaps between the tokens of a choice."),
            duration: m.seconds("tandem_request_duration_seconds", "Received to last message."),
        }
    }

    /// A request ended with this status.
    pub fn ended_badly(&self, status: &Status) {
        self.requests.of(outcome(status.code())).increment(1);
    }

    /// Gaps between the tokens of a request that ended well.
    pub fn gaps(&self, gaps_ms: &[f64]) {
        for gap_ms in gaps_ms {
            self.token_gap.record(gap_ms / 1e3);
        }
    }

    /// A request ended well.
    pub fn ended_well(&self, complete: &v1::Complete, slo: Slo) {
        let usage = complete.usage.unwrap_or_default();
        self.requests.of("ok").increment(1);
        self.prompt_tokens.increment(u64::from(usage.prompt_tokens));
        self.cached_tokens.increment(u64::from(usage.cached_tokens));
        self.output_tokens.increment(u64::from(usage.output_tokens));
        let Some(timeline) = &complete.timeline else { return };
        let choices = complete.choices.len().max(1) as f64;
        let later_tokens = f64::from(usage.output_tokens) / choices - 1.0;
        for (histogram, ms) in [
            (&self.first_token, timeline.ttft_ms),
            (&self.duration, timeline.total_ms),
            (&self.queue, timeline.queue_ms),
            (&self.prefill, timeline.prefill_ms),
            (&self.decode, timeline.decode_ms),
        ] {
            histogram.record(ms / 1e3);
        }
        if later_tokens > 0.0 {
            self.per_token.record((timeline.total_ms - timeline.ttft_ms) / later_tokens / 1e3);
        }
        self.judge(timeline);
        if complete.kv.as_ref().is_some_and(|kv| kv.bytes > 0) {
            self.exposed.record(timeline.exposed_transfer_ms / 1e3);
        }
        if slo.is_met(timeline) {
            self.within_slo.increment(1);
        }
    }

    /// What placement expected beside what came.
    fn judge(&self, timeline: &v1::Timeline) {
        let Some(came) = timeline.expected else { return };
        let is_local = timeline.prefill_worker == timeline.decode_worker;
        let (way, expected_ms) = if is_local { ("local", came.local_ms) } else { ("remote", came.remote_ms) };
        self.expected.of(way).record(expected_ms / 1e3);
        self.measured.of(way).record(came.measured_ms / 1e3);
        self.missed.of(way).record((expected_ms - came.measured_ms).abs() / 1e3);
    }

    /// An attempt ended with this status and is followed by another one.
    pub fn lost(&self, status: &Status, is_dead: bool) {
        let reason = match status.code() {
            _ if is_dead => "unreachable",
            Code::Unavailable => "unavailable",
            Code::Aborted => "aborted",
            Code::DataLoss => "corrupt",
            Code::ResourceExhausted => "full",
            _ => "other",
        };
        self.retries.of(reason).increment(1);
    }
}

/// What is read when the page is asked for.
pub fn collect(
    m: &telemetry::Metrics,
    fleet: Fleet,
    admission: Admission,
    expiry: tls::Expiry,
) -> impl Fn() + Send + Sync + use<> {
    let running: Gauge = m.gauge("tandem_requests_running", "Requests admitted and not ended.");
    let queued = m.gauge("tandem_requests_queued", "Requests waiting in the router.");
    let connected = m.gauge("tandem_registry_connected", "1 while the registry answers.");
    let workers = m.gauges("tandem_workers", "Workers the router knows.", "state", &WORKER_STATES);
    let help = "Seconds until a plane's certificate, or the authority it trusts, ends; 0 when it cannot be read, +Inf when the plane has none.";
    let planes = tls::Expiry::PLANES;
    let certificates = m.gauges("tandem_certificate_expiry_seconds", help, "plane", &planes);
    let index =
        m.gauge("tandem_prefix_index_bytes", "Memory of which worker holds which prompt's beginning.");
    let most = m.gauge("tandem_prefix_index_max_bytes", "What that memory may use.");
    move || {
        let (bytes, max_bytes) = fleet.prefix_bytes();
        index.set(bytes as f64);
        most.set(max_bytes as f64);
        planes.iter().for_each(|plane| certificates.of(plane).set(expiry.seconds_left(plane)));
        running.set(admission.running() as f64);
        queued.set(admission.queued() as f64);
        connected.set(if fleet.is_connected() { 1.0 } else { 0.0 });
        let states = fleet.statuses();
        for state in WORKER_STATES {
            workers.of(state).set(states.iter().filter(|w| w.state == state).count() as f64);
        }
    }
}

/// A status by name, as a label.
pub fn outcome(code: Code) -> &'static str {
    match code {
        Code::Cancelled => "cancelled",
        Code::InvalidArgument => "invalid_argument",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::ResourceExhausted => "resource_exhausted",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Aborted => "aborted",
        Code::Internal => "internal",
        _ => "other",
    }
}
