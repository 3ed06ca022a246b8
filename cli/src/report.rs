//! What `generate` prints: a JSON object a prompt, or where the time went in words.

use proto::v1;
use serde_json::{Value, json};

/// One finished prompt.
#[derive(Debug, Default)]
pub struct Outcome {
    pub id: String,
    pub choices: Vec<ChoiceOutcome>,
    pub complete: v1::Complete,
}

/// One choice of it.
#[derive(Debug, Default, Clone)]
pub struct ChoiceOutcome {
    pub text: String,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<v1::TokenLogprob>,
}

impl Outcome {
    /// The object of `--json`. The first choice stands at the top; all of them under `choices` when n > 1.
    pub fn to_json(&self) -> Value {
        let usage = self.complete.usage.unwrap_or_default();
        let mut object = self.choice_json(0);
        object["id"] = json!(self.id);
        object["request_id"] = json!(self.complete.request_id);
        object["seed"] = json!(self.complete.seed);
        object["prompt_token_count"] = json!(usage.prompt_tokens);
        object["usage"] = json!({
            "prompt_tokens": usage.prompt_tokens,
            "output_tokens": usage.output_tokens,
            "cached_tokens": usage.cached_tokens,
        });
        let mut timeline = router::timeline::json(&self.complete);
        object["kv"] = timeline["kv"].take();
        object["timeline"] = timeline["stages"].take();
        if self.choices.len() > 1 {
            object["choices"] = (0..self.choices.len()).map(|i| self.choice_json(i)).collect();
        }
        object
    }

    fn choice_json(&self, index: usize) -> Value {
        let choice = self.choices.get(index).cloned().unwrap_or_default();
        let end = self.complete.choices.iter().find(|end| end.index as usize == index);
        let mut object = json!({
            "output_token_ids": choice.token_ids,
            "text": choice.text,
            "finish_reason": end.map_or("cancelled", router::relay::finish_reason),
        });
        if let Some(stop) = end.map(|e| &e.matched_stop).filter(|s| !s.is_empty()) {
            object["matched_stop"] = json!(stop);
        }
        if !choice.logprobs.is_empty() {
            object["logprobs"] = choice.logprobs.iter().map(logprob_json).collect();
        }
        object
    }
}

fn logprob_json(l: &v1::TokenLogprob) -> Value {
    let top: Vec<Value> =
        l.top.iter().map(|t| json!({"token_id": t.token_id, "logprob": t.logprob})).collect();
    json!({"token_id": l.token_id, "logprob": l.logprob, "top": top})
}

/// Where the time went, for people.
pub fn timeline_text(complete: &v1::Complete) -> String {
    let t = complete.timeline.clone().unwrap_or_default();
    let usage = complete.usage.unwrap_or_default();
    let kv = complete.kv.clone().unwrap_or_default();
    let moved = match kv.blocks {
        0 => "nothing moved".to_owned(),
        blocks => format!(
            "{blocks} {}blocks, {:.2} MiB over {}{}",
            if kv.converted { "converted " } else { "" },
            kv.bytes as f64 / 1048576.0,
            kv.transport,
            match kv.packed_bytes {
                0 => String::new(),
                packed => format!(" as {:.2} MiB of int8", packed as f64 / 1048576.0),
            }
        ),
    };
    let rows = [
        ("tokenize", format!("{:9.2} ms", t.tokenize_ms)),
        ("queue", format!("{:9.2} ms", t.queue_ms)),
        ("reserve", format!("{:9.2} ms   on {}", t.reserve_ms, t.decode_worker)),
        (
            "prefill",
            format!(
                "{:9.2} ms   {} tokens on {} ({})",
                t.prefill_ms, usage.prompt_tokens, t.prefill_worker, t.placement_reason
            ),
        ),
        (
            "exposed KV transfer",
            format!("{:9.2} ms   {moved}, {} blocks were there", t.exposed_transfer_ms, kv.cached_blocks),
        ),
        ("TTFT", format!("{:9.2} ms", t.ttft_ms)),
        ("decode", format!("{:9.2} ms   {} tokens on {}", t.decode_ms, usage.output_tokens, t.decode_worker)),
        ("ITL mean / p99", format!("{:9.2} ms / {:.2} ms", t.itl_mean_ms, t.itl_p99_ms)),
        ("total", format!("{:9.2} ms", t.total_ms)),
    ];
    rows.iter().map(|(name, value)| format!("  {name:<20}{value}\n")).collect()
}
