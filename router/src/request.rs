//! A client's request, checked and made ready: token ids, filled-in sampling, what ends the text.

use proto::v1::{self, generate_request::Input};
use tonic::Status;

use crate::form::OutputForm;
use crate::text::model::{TextError, TextModel};
use crate::text::tools::{self, ToolFormat};

/// Output tokens when the client names no number.
const DEFAULT_MAX_TOKENS: u32 = 4096;
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;
const MAX_STOP_TOKENS: usize = 64;
const MAX_LOGIT_BIAS: usize = 1024;
const MAX_CHOICES: u32 = 16;
/// Characters per token, at most, over the whole vocabulary of the models served: longer texts cannot fit
/// the context and are refused before the tokenizer sees them.
const MAX_BYTES_PER_TOKEN: usize = 64;

/// A request ready for placement.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Goes to the workers; attempt and deadline are filled in per attempt.
    pub sequence: v1::Sequence,
    /// Strings that end a choice.
    pub stop: Vec<String>,
    /// Tokens that end a choice and whose text is not shown.
    pub ends: Vec<u32>,
    /// Calls that are looked for in the text, and how they are written.
    pub tools: Option<(ToolFormat, Vec<v1::Tool>)>,
}

/// A request from the wire, whole. Takes milliseconds for long prompts: off the async threads.
pub fn read(call: v1::GenerateRequest, text: &TextModel) -> Result<Prepared, Status> {
    let sampling = call.sampling.unwrap_or_default();
    let chat = match &call.input {
        Some(Input::Chat(chat)) => Some(chat),
        _ => None,
    };
    let prompt = tokenize(call.input.as_ref(), text)?;
    let form = OutputForm::of(sampling.constraint.clone(), chat, text)?;
    prepare(call.request_id, &call.model, sampling, prompt, form, text)
}

/// Token ids of a request's input.
fn tokenize(input: Option<&Input>, text: &TextModel) -> Result<Vec<u32>, Status> {
    let too_long = |bytes: usize| bytes > text.max_context_tokens.saturating_mul(MAX_BYTES_PER_TOKEN);
    let refuse = |field: &str, bytes: usize| {
        Err(Status::invalid_argument(format!(
            "{field}: {bytes} bytes cannot fit the context of {} tokens",
            text.max_context_tokens
        )))
    };
    match input {
        None => Err(Status::invalid_argument("input: one of text, chat or token_ids is required")),
        Some(Input::Text(raw)) if raw.is_empty() => Err(Status::invalid_argument("text: empty prompt")),
        Some(Input::Text(raw)) if too_long(raw.len()) => refuse("text", raw.len()),
        Some(Input::Text(raw)) => text.encode_text(raw).map_err(text_error),
        Some(Input::Chat(chat)) if chat.messages.is_empty() => {
            Err(Status::invalid_argument("chat.messages: empty conversation"))
        }
        Some(Input::Chat(chat)) => {
            tools::check(chat).map_err(Status::invalid_argument)?;
            let bytes = conversation_bytes(chat);
            if too_long(bytes) {
                return refuse("chat.messages", bytes);
            }
            text.encode_chat(chat).map(|(_, ids)| ids).map_err(text_error)
        }
        Some(Input::TokenIds(ids)) => match ids.ids.iter().find(|t| **t as usize >= text.vocab_size) {
            Some(bad) => Err(Status::invalid_argument(format!(
                "token_ids: {bad} is not in the vocabulary of {} tokens",
                text.vocab_size
            ))),
            None => Ok(ids.ids.clone()),
        },
    }
}

/// Everything of a conversation that goes into the prompt.
fn conversation_bytes(chat: &v1::ChatMessages) -> usize {
    let calls =
        |m: &v1::ChatMessage| m.tool_calls.iter().map(|c| c.name.len() + c.arguments.len()).sum::<usize>();
    let messages = chat.messages.iter().map(|m| m.content.len() + calls(m)).sum::<usize>();
    let tools = chat.tools.iter().map(|t| t.name.len() + t.description.len() + t.parameters.len());
    messages + tools.sum::<usize>() + chat.template_variables.len()
}

/// Checks everything but the input and fills in defaults.
fn prepare(
    request_id: String,
    model: &str,
    sampling: v1::SamplingParams,
    prompt: Vec<u32>,
    form: OutputForm,
    text: &TextModel,
) -> Result<Prepared, Status> {
    let invalid = |what: String| Err(Status::invalid_argument(what));
    if request_id.len() > 128 {
        return invalid(format!("request_id: {} bytes, at most 128", request_id.len()));
    }
    if !model.is_empty() && model != text.name {
        return Err(Status::not_found(format!("model: {model} is not served here, {} is", text.name)));
    }
    if prompt.is_empty() {
        return invalid("input: no tokens in the prompt".into());
    }
    let room = text.max_context_tokens.saturating_sub(prompt.len());
    if room == 0 {
        return invalid(format!(
            "input: {} prompt tokens leave no room in the context of {}",
            prompt.len(),
            text.max_context_tokens
        ));
    }
    let room = u32::try_from(room).unwrap_or(u32::MAX);
    let max_tokens = match sampling.max_tokens {
        Some(0) => return invalid("sampling.max_tokens: 0, at least 1".into()),
        Some(asked) if asked > room => {
            return invalid(format!(
                "sampling.max_tokens: {} prompt tokens and {asked} output tokens, the context is {} tokens",
                prompt.len(),
                text.max_context_tokens
            ));
        }
        Some(asked) => asked,
        None => room.min(DEFAULT_MAX_TOKENS),
    };
    let n = sampling.n.unwrap_or(1);
    if n == 0 || n > MAX_CHOICES {
        return invalid(format!("sampling.n: {n}, 1 to {MAX_CHOICES}"));
    }
    if sampling.stop.len() > MAX_STOPS {
        return invalid(format!("sampling.stop: {} strings, at most {MAX_STOPS}", sampling.stop.len()));
    }
    if sampling.stop.iter().any(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
        return invalid(format!("sampling.stop: each 1 to {MAX_STOP_BYTES} bytes"));
    }
    if sampling.stop_token_ids.len() > MAX_STOP_TOKENS {
        return invalid(format!("sampling.stop_token_ids: at most {MAX_STOP_TOKENS}"));
    }
    if sampling.logit_bias.len() > MAX_LOGIT_BIAS {
        return invalid(format!("sampling.logit_bias: at most {MAX_LOGIT_BIAS} entries"));
    }
    let mut ends = sampling.stop_token_ids;
    let has_grammar = !form.grammar.is_empty();
    if has_grammar && sampling.min_tokens.unwrap_or(0) > 0 {
        return invalid(
            "sampling.min_tokens: not together with a constraint, which alone says when the output ends"
                .into(),
        );
    }
    // A complete grammar leaves nothing but an end token to draw.
    if has_grammar || !sampling.ignore_eos.unwrap_or(false) {
        ends.extend(&text.eos_token_ids);
    }
    let engine = v1::EngineSampling {
        temperature: sampling.temperature.unwrap_or(1.0),
        top_p: sampling.top_p.unwrap_or(1.0),
        top_k: sampling.top_k.unwrap_or(0),
        min_p: sampling.min_p.unwrap_or(0.0),
        repetition_penalty: sampling.repetition_penalty.unwrap_or(1.0),
        presence_penalty: sampling.presence_penalty.unwrap_or(0.0),
        frequency_penalty: sampling.frequency_penalty.unwrap_or(0.0),
        seed: sampling.seed.unwrap_or_else(rand::random),
        logprobs: sampling.logprobs,
        logit_bias: sampling.logit_bias,
        grammar: form.grammar,
    };
    validate(&engine, text.vocab_size)?;
    let sequence = v1::Sequence {
        request_id: if request_id.is_empty() { proto::new_request_id() } else { request_id },
        attempt: 0,
        prompt,
        sampling: Some(engine),
        max_tokens,
        min_tokens: sampling.min_tokens.unwrap_or(0).min(max_tokens),
        stop_token_ids: ends.clone(),
        n,
        deadline_ms: 0,
        outputs: Vec::new(),
        origin: String::new(),
    };
    Ok(Prepared { sequence, stop: sampling.stop, ends, tools: form.tools })
}

/// The engine's own rules, so that a bad value is refused here and not by a worker.
fn validate(s: &v1::EngineSampling, vocab_size: usize) -> Result<(), Status> {
    let params = engine::SamplingParams {
        temperature: s.temperature,
        top_p: s.top_p,
        top_k: s.top_k,
        min_p: s.min_p,
        repetition_penalty: s.repetition_penalty,
        presence_penalty: s.presence_penalty,
        frequency_penalty: s.frequency_penalty,
        seed: s.seed,
        logprobs: s.logprobs,
        logit_bias: s.logit_bias.iter().map(|(t, b)| (*t, *b)).collect(),
    };
    params.validate(vocab_size).map_err(|e| Status::invalid_argument(format!("sampling.{e}")))
}

/// Text that cannot become tokens is the client's to change.
pub fn text_error(error: TextError) -> Status {
    Status::invalid_argument(format!("input: {error}"))
}
