//! Chat templates: Hugging Face's Jinja dialect, bounded by fuel.
//!
//! What transformers' `apply_chat_template` gives a template is here too: its whitespace rules, Python's string methods,
//! `tojson` as Python's `json.dumps` writes it, `raise_exception`, `strftime_now`, and the special tokens.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde};
use minijinja::{Environment, Error, ErrorKind, Value};
use proto::v1;
use serde_json::Value as Json;

use super::conversation;

/// Instructions that one rendering may take; the longest real templates need a few thousand and some
/// hundreds per message.
const FUEL: u64 = 10_000_000;
/// Largest template file.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
const SPECIAL_TOKENS: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

/// A compiled template with its special tokens.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(&'static str, String)>,
    /// A template of its own for conversations with tools.
    has_tool_use: bool,
    knows_tools: bool,
}

/// Why a conversation was not rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model has none: send text or token ids.
    #[error("the model has no chat template; send text or token_ids instead")]
    Missing,
    /// The template is broken: repair the model folder.
    #[error("the chat template does not parse: {0}")]
    Broken(String),
    /// The template refused these messages: the client must change them.
    #[error("the chat template refused the messages: {0}")]
    Refused(String),
}

impl ChatTemplate {
    /// From tokenizer_config.json or chat_template.jinja; None when the model has neither.
    pub fn load(dir: &Path) -> Result<Option<Self>, TemplateError> {
        let config: Json = std::fs::read(dir.join("tokenizer_config.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or(Json::Null);
        let source = std::fs::read_to_string(dir.join("chat_template.jinja"))
            .ok()
            .or_else(|| named_template(&config["chat_template"], "default"));
        let Some(source) = source else { return Ok(None) };
        let tool_use = match &config["chat_template"] {
            Json::Array(_) => named_template(&config["chat_template"], "tool_use"),
            _ => None,
        };
        let tokens = SPECIAL_TOKENS.map(|name| (name, special_token(&config[name])));
        Self::new(source, tool_use, tokens.into()).map(Some)
    }

    /// Compiles a template, and the one for conversations with tools if the model has one.
    pub fn new(
        source: String,
        tool_use: Option<String>,
        special_tokens: Vec<(&'static str, String)>,
    ) -> Result<Self, TemplateError> {
        let mut environment = environment()?;
        let has_tool_use = tool_use.is_some();
        let knows_tools = has_tool_use || source.contains("tools");
        for (name, source) in [("chat", Some(source)), ("tool_use", tool_use)] {
            let Some(source) = source else { continue };
            if source.len() > MAX_TEMPLATE_BYTES {
                return Err(TemplateError::Broken(format!("{} bytes long", source.len())));
            }
            environment
                .add_template_owned(name, without_generation_marks(&source))
                .map_err(|e| TemplateError::Broken(e.to_string()))?;
        }
        Ok(Self { environment, special_tokens, has_tool_use, knows_tools })
    }

    /// The templates' text, to recognise the family of the model by.
    pub fn source(&self) -> String {
        self.environment.templates().map(|(_, template)| template.source().to_owned()).collect()
    }

    /// The prompt for the next assistant message.
    pub fn render(&self, chat: &v1::ChatMessages) -> Result<String, TemplateError> {
        let refused = |e: Error| {
            TemplateError::Refused(e.detail().map_or_else(|| e.to_string(), |detail| detail.to_owned()))
        };
        let name = if self.has_tool_use && !chat.tools.is_empty() { "tool_use" } else { "chat" };
        let template =
            self.environment.get_template(name).map_err(|e| TemplateError::Broken(e.to_string()))?;
        let variables = conversation::variables(chat, self.knows_tools).map_err(TemplateError::Refused)?;
        let tokens = self.special_tokens.iter().map(|(name, token)| (*name, Value::from(token.as_str())));
        let given = variables.iter().map(|(name, value)| (name.as_str(), Value::from(Serde(value))));
        let context = Value::from_pairs(tokens.chain(given));
        template.render(context).map_err(refused)
    }
}

fn environment() -> Result<Environment<'static>, TemplateError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| TemplateError::Broken(e.to_string()))?);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", super::python_json::filter);
    environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text))
    });
    environment.add_function("strftime_now", strftime_now);
    Ok(environment)
}

/// The date, in UTC so that every router writes the same prompt.
fn strftime_now(format: String, _rest: Rest<Value>, _named: Kwargs) -> Result<String, Error> {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(&format, &now)
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
}

/// transformers' `{% generation %}` marks what a model is trained on; for a prompt it means nothing.
fn without_generation_marks(source: &str) -> String {
    let mut text = source.to_owned();
    for (mark, plain) in [("generation", "if true"), ("endgeneration", "endif")] {
        for (open, close) in [("{% ", " %}"), ("{%- ", " %}"), ("{% ", " -%}"), ("{%- ", " -%}")] {
            text = text.replace(&format!("{open}{mark}{close}"), &format!("{open}{plain}{close}"));
        }
    }
    text
}

/// A string (the default template), or the entry of that name of a list of named templates.
fn named_template(value: &Json, name: &str) -> Option<String> {
    match value {
        Json::String(source) => Some(source.clone()),
        Json::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == name)
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    }
}

/// A string, or an added token's `content`.
fn special_token(value: &Json) -> String {
    value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(messages: &[(&str, &str)]) -> v1::ChatMessages {
        let message = |(role, content): &(&str, &str)| v1::ChatMessage {
            role: (*role).into(),
            content: (*content).into(),
            ..Default::default()
        };
        v1::ChatMessages { messages: messages.iter().map(message).collect(), ..Default::default() }
    }

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::new(source.into(), None, vec![("bos_token", "<s>".into())]).unwrap()
    }

    #[test]
    fn renders_with_pythons_methods() {
        let source =
            "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m.content.strip() }}\n{% endfor %}";
        assert_eq!(template(source).render(&chat(&[("user", "  hi ")])).unwrap(), "<s><user>hi\n");
    }

    #[test]
    fn refusal_carries_the_templates_words() {
        let error = template("{{ raise_exception('no system role') }}").render(&chat(&[])).unwrap_err();
        assert!(error.to_string().contains("no system role"), "{error}");
    }

    #[test]
    fn generation_marks_mean_nothing() {
        let source = "{%- generation -%}{{ messages[0].content }}{%- endgeneration -%}";
        assert_eq!(template(source).render(&chat(&[("user", "x")])).unwrap(), "x");
    }

    #[test]
    fn dates_are_written_and_bad_formats_refused() {
        let text = template("{{ strftime_now('%d %b %Y') }}").render(&chat(&[])).unwrap();
        assert_eq!(text.len(), "26 Jul 2024".len(), "{text}");
        assert!(template("{{ strftime_now('%!') }}").render(&chat(&[])).is_err());
    }

    #[test]
    fn endless_templates_run_dry() {
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        assert!(template(source).render(&chat(&[])).is_err());
    }
}
