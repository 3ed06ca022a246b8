//! The text side of a model folder: tokenizer.json, tokenizer_config.json, generation_config.json.

use std::path::Path;

use constraint::Vocabulary;
use engine::model::ModelConfig;
use proto::v1;
use tokenizers::Tokenizer;

use super::template::{ChatTemplate, TemplateError};
use super::tools::ToolFormat;

/// Tokenizer, chat template and the facts about the model that requests are checked against.
pub struct TextModel {
    /// The served name.
    pub name: String,
    /// Longest sequence in tokens.
    pub max_context_tokens: usize,
    /// Token ids are below it.
    pub vocab_size: usize,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// The bytes of every token, for grammars and log-probabilities.
    pub vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    tool_format: ToolFormat,
}

/// A model folder that cannot be served, or text that cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The model's configuration is unusable: the message names the file.
    #[error(transparent)]
    Config(#[from] engine::EngineError),
    /// A file is missing or unreadable: fetch or import the model again.
    #[error("model {path}: {reason}")]
    File {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// Tokenizer and weights do not belong together.
    #[error("tokenizer.json does not match the model: {0}")]
    Mismatch(String),
    /// The chat template refused or failed.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tokenizer failed on this text.
    #[error("the text cannot be tokenized: {0}")]
    Tokenize(String),
}

/// The library panics on some files that are not what it expects (a decoder of an unknown type, seen by fuzzing).
fn tokenizer(file: &Path) -> Result<Tokenizer, String> {
    match std::panic::catch_unwind(|| Tokenizer::from_file(file)) {
        Ok(read) => read.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizer library failed on it; its words are in the log".into()),
    }
}

impl TextModel {
    /// Loads from a Hugging Face folder.
    pub fn load(dir: &Path, name: &str) -> Result<Self, TextError> {
        let at = |file: &str| dir.join(file).display().to_string();
        let config = ModelConfig::load(dir)?;
        let tokenizer = tokenizer(&dir.join("tokenizer.json"))
            .map_err(|reason| TextError::File { path: at("tokenizer.json"), reason })?;
        let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        if largest >= config.vocab {
            return Err(TextError::Mismatch(format!(
                "it has token {largest}, the model's vocabulary ends at {}",
                config.vocab - 1
            )));
        }
        let template = ChatTemplate::load(dir)?;
        let tool_format =
            template.as_ref().map_or(ToolFormat::Hermes, |t| ToolFormat::of_template(&t.source()));
        Ok(Self {
            name: name.to_owned(),
            max_context_tokens: config.max_context,
            vocab_size: config.vocab,
            vocabulary: Vocabulary::of(dir, config.vocab, &config.eos),
            eos_token_ids: config.eos,
            tokenizer,
            template,
            tool_format,
        })
    }

    /// Whether chat messages can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Text as it is → token ids.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.encode(text, true)
    }

    /// A conversation → the rendered prompt and its token ids.
    pub fn encode_chat(&self, chat: &v1::ChatMessages) -> Result<(String, Vec<u32>), TextError> {
        let template = self.template.as_ref().ok_or(TemplateError::Missing)?;
        let rendered = template.render(chat)?;
        // The template writes the special tokens itself.
        let ids = self.encode(&rendered, false)?;
        Ok((rendered, ids))
    }

    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding =
            self.tokenizer.encode_fast(text, add_special).map_err(|e| TextError::Tokenize(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids → text, special tokens left out unless wanted.
    pub fn decode(&self, ids: &[u32], with_special: bool) -> String {
        self.tokenizer.decode(ids, !with_special).unwrap_or_default()
    }

    /// The id of a token by its text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// How this model writes function calls.
    pub fn tool_format(&self) -> ToolFormat {
        self.tool_format
    }
}
