//! What a request may ask for.

use crate::batch::SamplingParams;

/// Most alternatives a request may ask for, as in OpenAI's `top_logprobs`.
pub const MAX_LOGPROBS: u32 = 20;

impl SamplingParams {
    /// Refuses what cannot be sampled, naming the field. Ranges are those of OpenAI's API where it has the
    /// field, of vLLM otherwise:
    ///
    /// | field | range |
    /// |---|---|
    /// | `temperature` | 0 ..= 2 (below 1e-5: greedy) |
    /// | `top_p` | above 0, up to 1 |
    /// | `top_k` | any; 0 is off |
    /// | `min_p` | 0 ..= 1 |
    /// | `repetition_penalty` | above 0, up to 2 |
    /// | `presence_penalty`, `frequency_penalty` | −2 ..= 2 |
    /// | `logprobs` | up to 20 |
    /// | `logit_bias` | tokens below `vocab`, values −100 ..= 100 |
    pub fn validate(&self, vocab: usize) -> Result<(), String> {
        within("temperature", self.temperature, 0.0, 2.0)?;
        above_zero("top_p", self.top_p, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        above_zero("repetition_penalty", self.repetition_penalty, 2.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        if let Some(count) = self.logprobs.filter(|&count| count > MAX_LOGPROBS) {
            return Err(format!("logprobs is {count}, at most {MAX_LOGPROBS} allowed"));
        }
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocab {
                return Err(format!("logit_bias names token {token}, the vocabulary has {vocab}"));
            }
            within(&format!("logit_bias of token {token}"), bias, -100.0, 100.0)?;
        }
        Ok(())
    }
}

fn within(field: &str, value: f32, low: f32, high: f32) -> Result<(), String> {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        Err(format!("{field} is {value}, must be between {low} and {high}"))
    }
}

fn above_zero(field: &str, value: f32, high: f32) -> Result<(), String> {
    if value > 0.0 && value <= high {
        Ok(())
    } else {
        Err(format!("{field} is {value}, must be above 0 and at most {high}"))
    }
}
