//! Byte-level BPE vocabularies of GGUF files, rebuilt as Hugging Face `tokenizer.json`.

use serde_json::{Map, Value as Json, json};

use super::gguf::{Gguf, Value};
use super::hf::Model;

/// Splits of Llama 3 and Qwen2; they differ in how many digits go together.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// GGUF token types: control tokens are special, user-defined ones are only never split.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

pub(super) struct Tokenizer<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<i64>,
    merges: Vec<(&'a str, &'a str)>,
    split: Split,
    add_bos: bool,
    template: Option<&'a str>,
}

#[derive(Clone, Copy, PartialEq)]
enum Split {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
}

impl<'a> Tokenizer<'a> {
    pub(super) fn read(gguf: &Gguf<'a>, vocab: usize) -> Result<Self, String> {
        let kind = gguf.text("tokenizer.ggml.model")?;
        if kind != "gpt2" {
            return Err(format!("tokenizer model {kind} is not known, only gpt2 (byte-level BPE) is"));
        }
        let split = match gguf.text("tokenizer.ggml.pre").unwrap_or("default") {
            "gpt-2" | "gpt2" => Split::Gpt2,
            "smollm" => Split::SmolLm,
            "llama-bpe" | "llama3" | "llama-v3" => Split::Llama3,
            "qwen2" | "deepseek-r1-qwen" => Split::Qwen2,
            other => {
                return Err(format!(
                    "pre-tokenizer {other} is not known (gpt-2, smollm, llama-bpe, qwen2 are)"
                ));
            }
        };
        let tokens = texts(gguf, "tokenizer.ggml.tokens")?;
        if tokens.len() != vocab {
            return Err(format!("{} tokens for an embedding of {vocab} rows", tokens.len()));
        }
        let merges = texts(gguf, "tokenizer.ggml.merges")?
            .into_iter()
            .map(|merge| merge.split_once(' ').ok_or_else(|| format!("merge {merge:?} is not a pair")))
            .collect::<Result<_, _>>()?;
        let kinds = gguf.array("tokenizer.ggml.token_type")?.unwrap_or_default();
        let kinds = kinds.iter().map(|kind| match kind {
            Value::Signed(kind) => *kind,
            Value::Unsigned(kind) => *kind as i64,
            _ => 1,
        });
        let add_bos = gguf.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(split == Split::Llama3);
        let template = gguf.text("tokenizer.chat_template").ok();
        Ok(Self { tokens, kinds: kinds.collect(), merges, split, add_bos, template })
    }

    pub(super) fn tokenizer_json(&self, model: &Model) -> Json {
        let vocab: Map<String, Json> =
            self.tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
        let added: Vec<Json> = self
            .added()
            .map(|(id, token, special)| {
                json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                        "normalized": false, "special": special })
            })
            .collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": (self.split == Split::Qwen2).then(|| json!({ "type": "NFC" })),
            "pre_tokenizer": self.pre_tokenizer(),
            "post_processor": self.post_processor(model),
            "decoder": byte_level(true),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": self.split == Split::Llama3,
                "vocab": vocab,
                "merges": self.merges,
            },
        })
    }

    pub(super) fn config_json(&self, model: &Model) -> Json {
        let token = |id: Option<u64>| id.and_then(|id| self.tokens.get(id as usize).copied());
        let added: Map<String, Json> = self
            .added()
            .map(|(id, token, special)| {
                let entry = json!({ "content": token, "special": special, "lstrip": false, "rstrip": false,
                                    "normalized": false, "single_word": false });
                (id.to_string(), entry)
            })
            .collect();
        json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.context,
            "add_bos_token": self.add_bos,
            "add_prefix_space": false,
            "clean_up_tokenization_spaces": false,
            "bos_token": token(model.bos),
            "eos_token": token(model.eos),
            "pad_token": token(model.pad),
            "added_tokens_decoder": added,
            "chat_template": self.template,
        })
    }

    /// Puts the begin token first where the model wants one.
    fn post_processor(&self, model: &Model) -> Json {
        let bos = model.bos.filter(|_| self.add_bos);
        let Some((id, token)) = bos.and_then(|id| Some((id, *self.tokens.get(id as usize)?))) else {
            return byte_level(true);
        };
        let special = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
        let sequence = |id: &str, kind: u32| json!({ "Sequence": { "id": id, "type_id": kind } });
        let mut tokens = Map::new();
        tokens.insert(token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] }));
        let template = json!({
            "type": "TemplateProcessing",
            "single": [special, sequence("A", 0)],
            "pair": [special, sequence("A", 0), sequence("B", 1)],
            "special_tokens": tokens,
        });
        json!({ "type": "Sequence", "processors": [byte_level(true), template] })
    }

    fn added(&self) -> impl Iterator<Item = (usize, &'a str, bool)> + '_ {
        self.tokens.iter().zip(&self.kinds).enumerate().filter_map(|(id, (token, kind))| match *kind {
            CONTROL => Some((id, *token, true)),
            USER_DEFINED => Some((id, *token, false)),
            _ => None,
        })
    }

    fn pre_tokenizer(&self) -> Json {
        let regex = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
        let first = match self.split {
            Split::Gpt2 => return byte_level(true),
            Split::SmolLm => json!({ "type": "Digits", "individual_digits": true }),
            Split::Llama3 => regex(LLAMA3_SPLIT),
            Split::Qwen2 => regex(QWEN2_SPLIT),
        };
        json!({ "type": "Sequence", "pretokenizers": [first, byte_level(self.split == Split::SmolLm)] })
    }
}

fn byte_level(use_regex: bool) -> Json {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

fn texts<'a>(gguf: &Gguf<'a>, key: &str) -> Result<Vec<&'a str>, String> {
    let values = gguf.array(key)?.ok_or_else(|| format!("metadata key {key} is missing"))?;
    values
        .iter()
        .map(|value| match value {
            Value::Text(text) => Ok(*text),
            other => Err(format!("{key} holds {other:?}, expected strings")),
        })
        .collect()
}
