//! A request inside the loop: what its choices have in common.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::Sampled;
use proto::v1::{self, decode_event::Event};
use worker::Request;
use worker::request::sampled_to_wire;

use crate::choice::Choice;
use crate::order::{Events, Hold};

/// A request.
pub(super) struct Group {
    pub request: Arc<Request>,
    pub events: Events,
    pub open: u32,
    pub finishes: Vec<v1::ChoiceFinish>,
    pub submitted: Instant,
    pub started: Option<Instant>,
    /// Prefill happens here; otherwise the KV has landed.
    pub local: bool,
    pub cached_tokens: u32,
    /// Stands still because it is about to run elsewhere.
    pub stopped: bool,
    /// The router was asked to move it.
    pub leaving: bool,
    pub hold: Hold,
}

impl Group {
    /// A step that began at `started` ran tokens of this choice and drew those at its end. What happens
    /// until the first draw of a request without landed KV is its local prefill.
    pub fn ran(&mut self, started: Instant, choice: &Choice, drawn: &[Sampled]) {
        let began = *self.started.get_or_insert(started);
        if drawn.is_empty() {
            return;
        }
        let local_prefill = (self.local && choice.is_stem()).then(|| v1::PrefillTiming {
            queue_ms: millis(began - self.submitted),
            prefill_ms: millis(began.elapsed()),
            exposed_transfer_ms: 0.0,
            cached_tokens: self.cached_tokens,
        });
        let indices: Vec<u32> = match choice.is_stem() {
            true => choice.request.drawn_at_stem().collect(),
            false => vec![choice.index],
        };
        let position = choice.output().len();
        self.hold.expected.grew(drawn.len());
        let to_wire = |(index, s)| sampled_to_wire(index, position, s, &choice.request.sampling);
        let tokens = indices.into_iter().zip(drawn).map(to_wire).collect();
        let event = Some(Event::Tokens(v1::Tokens { tokens, local_prefill }));
        let _ = self.events.send(Ok(v1::DecodeEvent { event, load: None }));
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
