//! Chat templates: Hugging Face's Jinja dialect, bounded by fuel.

use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use proto::v1;
use serde_json::Value as Json;

/// Instructions that one rendering may take; the longest real templates need a few thousand and some
/// hundreds per message.
const FUEL: u64 = 10_000_000;
/// Largest template file.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// A compiled template with its special tokens.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
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
            .or_else(|| default_template(&config["chat_template"]));
        let Some(source) = source else { return Ok(None) };
        let token = |name: &str| special_token(&config[name]);
        Self::new(source, token("bos_token"), token("eos_token")).map(Some)
    }

    /// Compiles a template.
    pub fn new(source: String, bos_token: String, eos_token: String) -> Result<Self, TemplateError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TemplateError::Broken(format!("{} bytes long", source.len())));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| TemplateError::Broken(e.to_string()))?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_template_owned("chat", source).map_err(|e| TemplateError::Broken(e.to_string()))?;
        Ok(Self { environment, bos_token, eos_token })
    }

    /// The prompt for the next assistant message.
    pub fn render(&self, messages: &[v1::ChatMessage]) -> Result<String, TemplateError> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|m| context! { role => m.role.as_str(), content => m.content.as_str() })
            .collect();
        let template =
            self.environment.get_template("chat").map_err(|e| TemplateError::Broken(e.to_string()))?;
        template
            .render(context! {
                messages,
                add_generation_prompt => true,
                bos_token => self.bos_token.as_str(),
                eos_token => self.eos_token.as_str(),
            })
            .map_err(|e| TemplateError::Refused(e.detail().map_or_else(|| e.to_string(), str::to_owned)))
    }
}

/// A string, or the entry named `default` of a list of named templates.
fn default_template(value: &Json) -> Option<String> {
    match value {
        Json::String(source) => Some(source.clone()),
        Json::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
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

    fn message(role: &str, content: &str) -> v1::ChatMessage {
        v1::ChatMessage { role: role.into(), content: content.into() }
    }

    #[test]
    fn renders_with_pythons_methods() {
        let source =
            "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m.content.strip() }}\n{% endfor %}";
        let template = ChatTemplate::new(source.into(), "<s>".into(), String::new()).unwrap();
        let text = template.render(&[message("user", "  hi ")]).unwrap();
        assert_eq!(text, "<s><user>hi\n");
    }

    #[test]
    fn refusal_carries_the_templates_words() {
        let template =
            ChatTemplate::new("{{ raise_exception('no system role') }}".into(), String::new(), String::new());
        let error = template.unwrap().render(&[]).unwrap_err();
        assert!(error.to_string().contains("no system role"), "{error}");
    }

    #[test]
    fn endless_templates_run_dry() {
        let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(source.into(), String::new(), String::new()).unwrap();
        assert!(template.render(&[]).is_err());
    }
}
