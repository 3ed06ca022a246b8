//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::HeaderMap;
use axum::response::Response;
use proto::v1::{self, generate_request::Input, tool_choice::Mode};
use serde::Deserialize;
use serde_json::Value;

use super::error::ApiError;
use super::request::{self, Common};
use super::run::{Kind, Run};
use crate::keys::Client;
use crate::service::InferenceService;

/// The fields that only this API has.
#[derive(Debug, Deserialize)]
struct ChatRequest {
    messages: Vec<Message>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    tools: Option<Vec<Tool>>,
    tool_choice: Option<ToolChoice>,
    /// vLLM's extension: further variables of the chat template.
    chat_template_kwargs: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Message {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Vec<ToolCall>>,
    tool_call_id: Option<String>,
    name: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ToolCall {
    id: Option<String>,
    function: CalledFunction,
}

#[derive(Debug, Deserialize)]
struct CalledFunction {
    name: String,
    arguments: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Tool {
    #[serde(rename = "type")]
    kind: Option<String>,
    function: Function,
}

#[derive(Debug, Deserialize)]
struct Function {
    name: String,
    description: Option<String>,
    parameters: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum ToolChoice {
    Mode(String),
    Function { function: NamedFunction },
}

#[derive(Debug, Deserialize)]
struct NamedFunction {
    name: String,
}

/// Answers a conversation.
pub async fn serve(
    State(service): State<InferenceService>,
    client: Option<Extension<Arc<Client>>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let (common, call) = read(body)?;
    Run::start(service, (&headers, client), Kind::Chat, &common, vec![call]).await?.respond().await
}

/// What a body asks for.
pub fn read(body: Result<Bytes, BytesRejection>) -> Result<(Common, v1::GenerateRequest), ApiError> {
    let (mut common, chat) = request::read::<ChatRequest>(body)?;
    let logprobs = chat.logprobs.unwrap_or(false).then(|| chat.top_logprobs.unwrap_or(0));
    let sampling = common.sampling(logprobs)?;
    let input = Input::Chat(conversation(chat)?);
    let call = v1::GenerateRequest {
        request_id: String::new(),
        input: Some(input),
        sampling: Some(sampling),
        model: common.model.clone().unwrap_or_default(),
    };
    Ok((common, call))
}

fn conversation(chat: ChatRequest) -> Result<v1::ChatMessages, ApiError> {
    let messages = chat.messages.into_iter().enumerate().map(|(at, m)| message(at, m));
    Ok(v1::ChatMessages {
        messages: messages.collect::<Result<_, _>>()?,
        tools: chat.tools.unwrap_or_default().into_iter().map(tool).collect::<Result<_, _>>()?,
        tool_choice: chat.tool_choice.map(tool_choice).transpose()?,
        template_variables: chat.chat_template_kwargs.map(|v| v.to_string()).unwrap_or_default(),
    })
}

fn message(at: usize, message: Message) -> Result<v1::ChatMessage, ApiError> {
    let content = match message.content {
        None => String::new(),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => text_of(at, parts)?,
    };
    let calls = message.tool_calls.unwrap_or_default().into_iter().map(|call| v1::ToolCall {
        id: call.id.unwrap_or_default(),
        name: call.function.name,
        arguments: call.function.arguments.unwrap_or_default(),
    });
    Ok(v1::ChatMessage {
        // OpenAI's newer name for the same thing, which templates do not know.
        role: if message.role == "developer" { "system".into() } else { message.role },
        content,
        tool_calls: calls.collect(),
        tool_call_id: message.tool_call_id.unwrap_or_default(),
        name: message.name.unwrap_or_default(),
    })
}

fn text_of(at: usize, parts: Vec<Part>) -> Result<String, ApiError> {
    let mut text = String::new();
    for (part, Part { kind, text: piece }) in parts.into_iter().enumerate() {
        match piece.filter(|_| kind == "text") {
            Some(piece) => text.push_str(&piece),
            None => {
                let field = format!("messages[{at}].content[{part}]");
                let why = format!("{field}: type {kind:?}; this model reads parts of type \"text\" only");
                return Err(ApiError::invalid(Some(&field), why));
            }
        }
    }
    Ok(text)
}

fn tool(tool: Tool) -> Result<v1::Tool, ApiError> {
    match tool.kind.as_deref() {
        None | Some("function") => Ok(v1::Tool {
            name: tool.function.name,
            description: tool.function.description.unwrap_or_default(),
            parameters: tool.function.parameters.map(|schema| schema.to_string()).unwrap_or_default(),
        }),
        Some(other) => Err(ApiError::invalid(
            Some("tools"),
            format!("tools: type {other:?}; only \"function\" is known"),
        )),
    }
}

fn tool_choice(choice: ToolChoice) -> Result<v1::ToolChoice, ApiError> {
    let (mode, function) = match choice {
        ToolChoice::Function { function } => (Mode::Required, function.name),
        ToolChoice::Mode(mode) => match mode.as_str() {
            "auto" => (Mode::Auto, String::new()),
            "none" => (Mode::None, String::new()),
            "required" => (Mode::Required, String::new()),
            other => {
                let why =
                    format!("tool_choice: {other:?} is not \"auto\", \"none\", \"required\" or a function");
                return Err(ApiError::invalid(Some("tool_choice"), why));
            }
        },
    };
    Ok(v1::ToolChoice { mode: mode.into(), function })
}
