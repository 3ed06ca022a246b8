//! The body of a request, both APIs in one, and what it becomes.

use std::collections::HashMap;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use proto::v1::{self, constraint::Form};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::error::ApiError;
use crate::receiving;

/// The fields that chat and text completions share. Null is the same as left out.
#[derive(Debug, Default, Deserialize)]
pub struct Common {
    pub model: Option<String>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub seed: Option<i64>,
    pub max_tokens: Option<u32>,
    pub max_completion_tokens: Option<u32>,
    pub min_tokens: Option<u32>,
    pub stop: Option<OneOrMany>,
    pub stop_token_ids: Option<Vec<u32>>,
    pub ignore_eos: Option<bool>,
    pub logit_bias: Option<HashMap<String, f32>>,
    pub n: Option<u32>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub response_format: Option<ResponseFormat>,
    /// vLLM's extension: `{"json" | "regex" | "grammar" | "choice": …}`.
    pub structured_outputs: Option<StructuredOutputs>,
}

/// `stop`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// `stream_options`.
#[derive(Debug, Default, Deserialize)]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
}

/// `response_format`.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: JsonSchema },
}

/// The schema and its name.
#[derive(Debug, Deserialize)]
pub struct JsonSchema {
    pub schema: Option<Value>,
}

/// `structured_outputs`; one of them.
#[derive(Debug, Default, Deserialize)]
pub struct StructuredOutputs {
    pub json: Option<Value>,
    pub regex: Option<String>,
    pub grammar: Option<String>,
    pub choice: Option<Vec<String>>,
}

/// What both APIs share of a body, and what only this one has.
pub fn read<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<(Common, T), ApiError> {
    let body = body.map_err(|e| match receiving::status_in(&e) {
        Some(status) => status.clone().into(),
        None => ApiError::too_large(e.to_string()),
    })?;
    Ok((parse(&body)?, parse(&body)?))
}

/// The error names the field.
fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        match path.as_str() {
            "." => ApiError::invalid(None, format!("the body: {}", error.inner())),
            field => ApiError::invalid(Some(field), format!("{field}: {}", error.inner())),
        }
    })
}

impl Common {
    /// Whether the answer is to come in pieces.
    pub fn is_stream(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether a stream ends with the usage.
    pub fn include_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// How tokens are drawn and when the output ends.
    pub fn sampling(&mut self, logprobs: Option<u32>) -> Result<v1::SamplingParams, ApiError> {
        let invalid =
            |field: &str, why: String| Err(ApiError::invalid(Some(field), format!("{field}: {why}")));
        let top_k = match self.top_k {
            None | Some(-1) => None,
            Some(k) => match u32::try_from(k) {
                Ok(k) => Some(k),
                Err(_) => return invalid("top_k", format!("{k}, 0 or -1 (off) or the number of tokens")),
            },
        };
        let mut logit_bias = HashMap::new();
        for (token, bias) in self.logit_bias.take().unwrap_or_default() {
            match token.parse::<u32>() {
                Ok(id) => logit_bias.insert(id, bias),
                Err(_) => return invalid("logit_bias", format!("{token:?} is not a token id")),
            };
        }
        let stop = match self.stop.take() {
            None => Vec::new(),
            Some(OneOrMany::One(one)) => vec![one],
            Some(OneOrMany::Many(many)) => many,
        };
        Ok(v1::SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            // Negative seeds are as good as others.
            seed: self.seed.map(i64::cast_unsigned),
            max_tokens: self.max_completion_tokens.or(self.max_tokens),
            min_tokens: self.min_tokens,
            stop: stop.into_iter().filter(|text| !text.is_empty()).collect(),
            stop_token_ids: self.stop_token_ids.take().unwrap_or_default(),
            ignore_eos: self.ignore_eos,
            logprobs,
            logit_bias,
            n: self.n,
            constraint: self.constraint()?,
        })
    }

    fn constraint(&mut self) -> Result<Option<v1::Constraint>, ApiError> {
        let mut forms = Vec::new();
        match self.response_format.take() {
            None | Some(ResponseFormat::Text) => {}
            Some(ResponseFormat::JsonObject) => forms.push(Form::JsonObject(true)),
            Some(ResponseFormat::JsonSchema { json_schema }) => match json_schema.schema {
                Some(schema) => forms.push(Form::JsonSchema(schema.to_string())),
                None => forms.push(Form::JsonObject(true)),
            },
        }
        let wanted = self.structured_outputs.take().unwrap_or_default();
        forms.extend(wanted.json.map(|schema| match schema {
            Value::String(text) => Form::JsonSchema(text),
            schema => Form::JsonSchema(schema.to_string()),
        }));
        forms.extend(wanted.regex.map(Form::Regex));
        forms.extend(wanted.grammar.map(Form::Grammar));
        forms.extend(wanted.choice.map(|texts| Form::Choice(v1::Choices { texts })));
        match forms.len() {
            0 | 1 => Ok(forms.pop().map(|form| v1::Constraint { form: Some(form) })),
            _ => Err(ApiError::invalid(
                Some("response_format"),
                "response_format and structured_outputs: only one form can hold",
            )),
        }
    }
}
