//! One request's grammar, followed by each of its choices.

use std::collections::HashMap;

use llguidance::Matcher;
use parking_lot::Mutex;

use crate::ConstraintError;

/// A compiled grammar. A choice that comes with more output than last time goes on from there; one that comes with
/// another output begins again.
pub struct Constraint {
    start: Matcher,
    tokens: usize,
    choices: Mutex<HashMap<u32, Following>>,
}

struct Following {
    matcher: Matcher,
    output: Vec<u32>,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

impl Constraint {
    pub(crate) fn new(start: Matcher, tokens: usize) -> Self {
        Self { start, tokens, choices: Mutex::default() }
    }

    /// Sets the logits of all tokens that may not follow `output` to minus infinity. When the grammar is complete only
    /// end tokens remain.
    pub fn restrict(&self, choice: u32, output: &[u32], logits: &mut [f32]) -> Result<(), ConstraintError> {
        let mut choices = self.choices.lock();
        let following = choices.entry(choice).or_insert_with(|| self.begin());
        if !output.starts_with(&following.output) {
            *following = self.begin();
        }
        let lost = |e: &dyn std::fmt::Display| ConstraintError::Lost(e.to_string());
        let new = &output[following.output.len()..];
        following.matcher.consume_tokens(new).map_err(|e| lost(&e))?;
        following.output.extend_from_slice(new);
        let mask = following.matcher.compute_mask_or_eos().map_err(|e| lost(&e))?;
        if mask.is_zero() {
            return Err(lost(&"no token may follow"));
        }
        let known = logits.len().min(self.tokens);
        let (inside, beyond) = logits.split_at_mut(known);
        mask.iter_unset_entries(|token| {
            if let Some(logit) = inside.get_mut(token) {
                *logit = f32::NEG_INFINITY;
            }
        });
        beyond.fill(f32::NEG_INFINITY);
        Ok(())
    }

    fn begin(&self) -> Following {
        Following { matcher: self.start.deep_clone(), output: Vec::new() }
    }
}
