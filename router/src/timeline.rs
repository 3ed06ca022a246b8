//! Where a request's time went. Each duration is measured on one clock.

use std::time::{Duration, Instant};

use proto::v1;
use serde_json::{Value, json};
use telemetry::trace::Span;

use crate::placement::Expected;

/// Where a finished request's time went, for scripts: `stages` (ms, and by whom) and `kv` (what moved).
pub fn json(complete: &v1::Complete) -> Value {
    let t = complete.timeline.clone().unwrap_or_default();
    let kv = complete.kv.clone().unwrap_or_default();
    json!({
        "stages": {
            "tokenize_ms": t.tokenize_ms,
            "queue_ms": t.queue_ms,
            "placement_ms": t.placement_ms,
            "reserve_ms": t.reserve_ms,
            "prefill_ms": t.prefill_ms,
            "exposed_transfer_ms": t.exposed_transfer_ms,
            "ttft_ms": t.ttft_ms,
            "decode_ms": t.decode_ms,
            "itl_mean_ms": t.itl_mean_ms,
            "itl_p99_ms": t.itl_p99_ms,
            "itl_max_ms": t.itl_max_ms,
            "attempts": t.attempts,
            "moves": t.moves,
            "total_ms": t.total_ms,
            "prefill_worker": t.prefill_worker,
            "decode_worker": t.decode_worker,
            "placement_reason": t.placement_reason,
            "expected": t.expected.map(|e| json!({
                "local_ms": e.local_ms,
                "remote_ms": e.remote_ms,
                "harm_ms": e.harm_ms,
                "measured_ms": e.measured_ms,
            })),
        },
        "kv": {
            "bytes": kv.bytes,
            "blocks": kv.blocks,
            "cached_blocks": kv.cached_blocks,
            "transport": kv.transport,
            "refetched": kv.refetched,
            "packed_bytes": kv.packed_bytes,
        },
    })
}

/// Marks set as a request passes.
#[derive(Debug)]
pub struct Timeline {
    received: Instant,
    first_text: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    /// When the attempt that brought the first token began, and what was expected of it.
    placed: Option<(Instant, Expected)>,
    /// Durations and names that are known already.
    pub known: v1::Timeline,
    /// Gaps between tokens of one choice, ms.
    gaps: Vec<f64>,
    /// Stages on this router: name, begin, end.
    stages: Vec<(&'static str, Instant, Instant)>,
}

impl Timeline {
    /// A request received at that instant.
    pub fn new(received: Instant) -> Self {
        Self {
            received,
            first_text: None,
            first_token: None,
            last_token: None,
            placed: None,
            known: v1::Timeline::default(),
            gaps: Vec::new(),
            stages: Vec::new(),
        }
    }

    /// A stage of the request ends now.
    pub fn mark(&mut self, stage: &'static str, began: Instant) {
        self.stages.push((stage, began, Instant::now()));
    }

    /// The stages as parts of the request's span.
    pub fn trace(&self, span: &Span) {
        if !span.is_on() {
            return;
        }
        let decode = self.first_token.zip(self.last_token).map(|(first, last)| ("decode", first, last));
        for (stage, began, ended) in self.stages.iter().copied().chain(decode) {
            span.part(stage, began, ended);
        }
        if let Some(seconds) = self.ttft() {
            span.set("gen_ai.server.time_to_first_token", seconds);
        }
        span.set("tandem.placement.reason", self.known.placement_reason.clone());
        span.set("tandem.attempts", i64::from(self.known.attempts));
    }

    /// Workers were chosen at that instant. Of several attempts the first that brings a token counts.
    pub fn placed(&mut self, at: Instant, expected: Expected) {
        if !self.has_token() {
            self.placed = Some((at, expected));
        }
    }

    /// Since when the first token is waited for, and what was expected of that; None once it is there.
    pub fn first_wait(&self) -> Option<(Instant, Expected)> {
        self.placed.filter(|_| !self.has_token())
    }

    /// A token arrived; `previous` is when the same choice's last one did.
    pub fn token(&mut self, now: Instant, previous: Option<Instant>) {
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        if let Some(previous) = previous {
            self.gaps.push(millis(now - previous));
        }
    }

    /// Whether a token has come.
    pub fn has_token(&self) -> bool {
        self.first_token.is_some()
    }

    /// Text is about to be sent.
    pub fn text(&mut self, now: Instant) {
        self.first_text.get_or_insert(now);
    }

    /// Seconds from received to first text, if any came.
    pub fn ttft(&self) -> Option<f64> {
        self.first_text.or(self.first_token).map(|at| (at - self.received).as_secs_f64())
    }

    /// Gaps between tokens of one choice.
    pub fn gaps_ms(&self) -> &[f64] {
        &self.gaps
    }

    /// Seconds since received.
    pub fn elapsed(&self) -> f64 {
        self.received.elapsed().as_secs_f64()
    }

    /// Everything, at the end.
    pub fn finish(mut self) -> v1::Timeline {
        let now = Instant::now();
        let since = |at: Option<Instant>| at.map_or(0.0, |at| millis(at - self.received));
        let mut known = self.known;
        known.ttft_ms = since(self.first_text.or(self.first_token));
        known.decode_ms = match (self.first_token, self.last_token) {
            (Some(first), Some(last)) => millis(last - first),
            _ => 0.0,
        };
        known.total_ms = millis(now - self.received);
        known.expected =
            self.placed.zip(self.first_token).map(|((placed, expected), first)| v1::Expectation {
                local_ms: expected.local_ms,
                remote_ms: expected.remote_ms.unwrap_or_default(),
                harm_ms: expected.harm_ms,
                measured_ms: millis(first - placed),
            });
        if !self.gaps.is_empty() {
            self.gaps.sort_by(f64::total_cmp);
            known.itl_mean_ms = self.gaps.iter().sum::<f64>() / self.gaps.len() as f64;
            known.itl_max_ms = self.gaps.last().copied().unwrap_or(0.0);
            known.itl_p99_ms = self.gaps[(self.gaps.len() * 99 / 100).min(self.gaps.len() - 1)];
        }
        known
    }
}

/// A duration in milliseconds.
pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
