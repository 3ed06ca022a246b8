//! Prompts from the command line, standard input or a file.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use proto::v1::{self, generate_request::Input};
use serde::Deserialize;

use crate::args::GenerateArgs;

/// One prompt with the name that its output carries.
#[derive(Debug, Clone)]
pub struct Prompt {
    pub id: String,
    /// The request's id; the router's choice when empty.
    pub request_id: String,
    pub input: Input,
}

#[derive(Debug, Deserialize)]
struct Entry {
    id: Option<serde_json::Value>,
    #[serde(default)]
    request_id: String,
    messages: Option<Vec<Message>>,
    text: Option<String>,
    token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Deserialize)]
struct Message {
    role: String,
    content: String,
}

/// What to send; `chat` says whether the model has a chat template.
pub fn read(args: &GenerateArgs, chat: bool) -> anyhow::Result<Vec<Prompt>> {
    if let Some(file) = &args.prompts {
        return from_file(file);
    }
    let text = match &args.prompt {
        Some(text) => text.clone(),
        None => {
            let mut bytes = Vec::new();
            std::io::stdin().lock().read_to_end(&mut bytes)?;
            String::from_utf8(bytes).context("the prompt on standard input is not UTF-8")?
        }
    };
    let input = match chat && !args.raw {
        false => Input::Text(text),
        true => {
            let message = |role: &str, content: &str| v1::ChatMessage {
                role: role.into(),
                content: content.into(),
                ..Default::default()
            };
            let system = args.system.iter().map(|s| message("system", s));
            let user = (!text.is_empty()).then(|| message("user", &text));
            Input::Chat(v1::ChatMessages { messages: system.chain(user).collect(), ..Default::default() })
        }
    };
    Ok(vec![Prompt { id: "0".into(), request_id: String::new(), input }])
}

fn from_file(file: &Path) -> anyhow::Result<Vec<Prompt>> {
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let entries: Vec<Entry> = serde_json::from_slice(&bytes).with_context(|| {
        format!("{}: expected a list of {{\"id\", \"messages\" | \"text\" | \"token_ids\"}}", file.display())
    })?;
    let to_prompt = |(number, entry): (usize, Entry)| {
        let id = match entry.id {
            None => number.to_string(),
            Some(serde_json::Value::String(id)) => id,
            Some(other) => other.to_string(),
        };
        let input = match (entry.messages, entry.text, entry.token_ids) {
            (Some(messages), None, None) => Input::Chat(v1::ChatMessages {
                messages: messages
                    .into_iter()
                    .map(|m| v1::ChatMessage { role: m.role, content: m.content, ..Default::default() })
                    .collect(),
                ..Default::default()
            }),
            (None, Some(text), None) => Input::Text(text),
            (None, None, Some(ids)) => Input::TokenIds(v1::TokenIds { ids }),
            _ => bail!("prompt {id}: give one of messages, text or token_ids"),
        };
        Ok(Prompt { id, request_id: entry.request_id, input })
    };
    entries.into_iter().enumerate().map(to_prompt).collect()
}
