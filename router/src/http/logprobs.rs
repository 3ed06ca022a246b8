//! Log-probabilities as the two APIs write them.

use proto::v1;
use serde_json::{Map, Value, json};

use crate::text::model::TextModel;

/// `logprobs` of a chat choice: every token with its bytes and its alternatives.
pub fn of_chat(text: &TextModel, tokens: &[v1::TokenLogprob]) -> Value {
    let one = |id: u32, logprob: f32| {
        let bytes = text.vocabulary.token(id).unwrap_or_default();
        json!({"token": String::from_utf8_lossy(&bytes), "logprob": logprob, "bytes": bytes})
    };
    let content = tokens.iter().map(|token| {
        let mut value = one(token.token_id, token.logprob);
        value["top_logprobs"] = token.top.iter().map(|top| one(top.token_id, top.logprob)).collect();
        value
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

/// `logprobs` of a text choice, and where its text ends when it begins at `offset` characters.
pub fn of_text(text: &TextModel, tokens: &[v1::TokenLogprob], mut offset: usize) -> (Value, usize) {
    let name = |id: u32| String::from_utf8_lossy(&text.vocabulary.token(id).unwrap_or_default()).into_owned();
    let mut offsets = Vec::with_capacity(tokens.len());
    let mut names = Vec::with_capacity(tokens.len());
    let mut tops = Vec::with_capacity(tokens.len());
    for token in tokens {
        let token_text = name(token.token_id);
        offsets.push(offset);
        offset += token_text.chars().count();
        names.push(token_text);
        let top: Map<String, Value> =
            token.top.iter().map(|top| (name(top.token_id), top.logprob.into())).collect();
        tops.push(top);
    }
    let logprobs: Vec<f32> = tokens.iter().map(|token| token.logprob).collect();
    let value = json!({
        "tokens": names,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    });
    (value, offset)
}
