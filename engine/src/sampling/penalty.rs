//! What changes logits before the temperature: bias, penalties, bans.

use crate::batch::SampleRequest;

pub(super) fn apply(logits: &mut [f32], request: &SampleRequest<'_>) {
    let params = request.params;
    for &(token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    if params.repetition_penalty != 1.0 {
        repetition(logits, request, params.repetition_penalty);
    }
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        occurrence(logits, request.output, params.presence_penalty, params.frequency_penalty);
    }
    for &token in request.banned {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if let Some(constraint) = request.constraint {
        constraint.restrict(request.choice, request.output, logits);
    }
}

/// Once per token seen anywhere: positive logits are divided, negative ones multiplied.
fn repetition(logits: &mut [f32], request: &SampleRequest<'_>, penalty: f32) {
    let mut seen = vec![0u64; logits.len().div_ceil(64)];
    for &token in request.prompt.iter().chain(request.output) {
        let Some(logit) = logits.get_mut(token as usize) else {
            continue;
        };
        let (word, bit) = (token as usize / 64, 1u64 << (token % 64));
        if seen[word] & bit == 0 {
            seen[word] |= bit;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}

/// `presence` once per token of the output, `frequency` once per occurrence.
fn occurrence(logits: &mut [f32], output: &[u32], presence: f32, frequency: f32) {
    let mut sorted = output.to_vec();
    sorted.sort_unstable();
    for run in sorted.chunk_by(|a, b| a == b) {
        if let Some(logit) = logits.get_mut(run[0] as usize) {
            *logit -= frequency * run.len() as f32 + presence;
        }
    }
}
