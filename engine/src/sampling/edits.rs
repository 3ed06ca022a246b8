//! What changes logits before the temperature, token by token: bias, penalties, bans.
//!
//! A request names few tokens of a vocabulary, so its changes are a short list, which a device can apply too.

use hashbrown::HashMap;

use crate::batch::SampleRequest;

/// What happens to one token's logit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Edit {
    /// Added first.
    pub(crate) bias: f32,
    /// Divides a positive logit, multiplies another; 1 is off.
    pub(crate) repetition: f32,
    /// Subtracted last; infinity bans the token.
    pub(crate) minus: f32,
}

impl Edit {
    const NOTHING: Self = Self { bias: 0.0, repetition: 1.0, minus: 0.0 };

    pub(super) fn of(self, logit: f32) -> f32 {
        let logit = logit + self.bias;
        let logit = if logit > 0.0 { logit / self.repetition } else { logit * self.repetition };
        logit - self.minus
    }
}

/// The request's edits, each token once, tokens below `vocab` only.
pub(crate) fn edits(request: &SampleRequest<'_>, vocab: usize) -> HashMap<u32, Edit> {
    let params = request.params;
    let penalised = params.repetition_penalty != 1.0;
    let seen = if penalised { request.prompt.len() + request.output.len() } else { request.output.len() };
    let mut edits = HashMap::with_capacity(seen + params.logit_bias.len() + request.banned.len());
    let mut change = |token: u32, how: &dyn Fn(&mut Edit)| {
        if (token as usize) < vocab {
            how(edits.entry(token).or_insert(Edit::NOTHING));
        }
    };
    for &(token, bias) in &params.logit_bias {
        change(token, &|edit| edit.bias += bias);
    }
    // Once per token seen anywhere.
    if penalised {
        for &token in request.prompt.iter().chain(request.output) {
            change(token, &|edit| edit.repetition = params.repetition_penalty);
        }
    }
    // `presence` once per token of the output, `frequency` once per occurrence.
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        request.output.iter().for_each(|&token| change(token, &|edit| edit.minus += 1.0));
        for edit in edits.values_mut().filter(|edit| edit.minus > 0.0) {
            edit.minus = params.frequency_penalty * edit.minus + params.presence_penalty;
        }
    }
    for &token in request.banned {
        if (token as usize) < vocab {
            edits.entry(token).or_insert(Edit::NOTHING).minus = f32::INFINITY;
        }
    }
    edits
}

/// Applies them, and the constraint.
pub(super) fn apply(logits: &mut [f32], request: &SampleRequest<'_>) {
    for (token, edit) in edits(request, logits.len()) {
        logits[token as usize] = edit.of(logits[token as usize]);
    }
    if let Some(constraint) = request.constraint {
        constraint.restrict(request.choice, request.output, logits);
    }
}
