//! What a router counts. The table for operators is docs/METRICS.md, kept true by a test.

use telemetry::{Counter, Family, Gauge, Histogram};
use tonic::{Code, Status};

use crate::admission::Admission;
use crate::fleet::Fleet;
use crate::timeline::Timeline;

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
    prompt_tokens: Counter,
    output_tokens: Counter,
    first_token: Histogram,
    token_gap: Histogram,
    duration: Histogram,
}

impl Metrics {
    /// Registers all of them.
    pub fn new(m: &telemetry::Metrics) -> Self {
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
            prompt_tokens: m
                .counter("tandem_prompt_tokens_total", "Prompt tokens of requests that ended well."),
            output_tokens: m
                .counter("tandem_output_tokens_total", "Output tokens of requests that ended well."),
            first_token: m
                .seconds("tandem_time_to_first_token_seconds", "Received to first text, queueing included."),
            token_gap: m
                .seconds("tandem_inter_token_latency_seconds", "Gaps between the tokens of a choice."),
            duration: m.seconds("tandem_request_duration_seconds", "Received to last message."),
        }
    }

    /// A request ended with this status.
    pub fn ended_badly(&self, status: &Status) {
        self.requests.of(outcome(status.code())).increment(1);
    }

    /// A request ended well.
    pub fn ended_well(&self, timeline: &Timeline, prompt_tokens: usize, output_tokens: u32) {
        self.requests.of("ok").increment(1);
        self.prompt_tokens.increment(prompt_tokens as u64);
        self.output_tokens.increment(u64::from(output_tokens));
        if let Some(ttft) = timeline.ttft() {
            self.first_token.record(ttft);
        }
        for gap_ms in timeline.gaps_ms() {
            self.token_gap.record(gap_ms / 1e3);
        }
        self.duration.record(timeline.elapsed());
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
) -> impl Fn() + Send + Sync + use<> {
    let running: Gauge = m.gauge("tandem_requests_running", "Requests admitted and not ended.");
    let queued = m.gauge("tandem_requests_queued", "Requests waiting in the router.");
    let connected = m.gauge("tandem_registry_connected", "1 while the registry answers.");
    let workers = m.gauges("tandem_workers", "Workers the router knows.", "state", &WORKER_STATES);
    move || {
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
