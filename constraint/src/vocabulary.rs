//! The bytes of every token, read from `tokenizer.json` when the first grammar comes.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use llguidance::api::TopLevelGrammar;

use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, token_bytes_from_tokenizer_json};

use crate::{Constraint, ConstraintError, MAX_GRAMMAR_BYTES};

/// The vocabulary of one model. Cheap to make: the file is read when the first grammar is compiled.
#[derive(Clone)]
pub struct Vocabulary {
    source: Arc<Source>,
}

struct Source {
    tokenizer: PathBuf,
    tokens: usize,
    ends: Vec<u32>,
    factory: OnceLock<Result<ParserFactory, ConstraintError>>,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("tokenizer", &self.source.tokenizer).finish_non_exhaustive()
    }
}

impl Vocabulary {
    /// Of a model folder whose model has `tokens` ids and stops at `ends`.
    pub fn of(dir: &Path, tokens: usize, ends: &[u32]) -> Self {
        let tokenizer = dir.join("tokenizer.json");
        let source = Source { tokenizer, tokens, ends: ends.to_vec(), factory: OnceLock::new() };
        Self { source: Arc::new(source) }
    }

    /// Compiles a grammar; milliseconds, and for the first one the time to read the vocabulary. Off the async threads.
    pub fn compile(&self, lark: &str) -> Result<Constraint, ConstraintError> {
        if lark.len() > MAX_GRAMMAR_BYTES {
            let text = format!("{} bytes, at most {MAX_GRAMMAR_BYTES}", lark.len());
            return Err(ConstraintError::Grammar(text));
        }
        let source = &self.source;
        let factory = source.factory.get_or_init(|| source.read()).as_ref().map_err(Clone::clone)?;
        let parser = factory.create_parser(TopLevelGrammar::from_lark(lark.to_owned()));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(why) => Err(ConstraintError::Grammar(why)),
            None => Ok(Constraint::new(matcher, source.tokens)),
        }
    }

    /// The bytes of a token, none for an unknown one. Special tokens have those of their name.
    pub fn token(&self, id: u32) -> Result<Vec<u8>, ConstraintError> {
        let source = &self.source;
        let factory = source.factory.get_or_init(|| source.read()).as_ref().map_err(Clone::clone)?;
        let trie = factory.tok_env().tok_trie();
        if id as usize >= trie.vocab_size() {
            return Ok(Vec::new());
        }
        let bytes = trie.token(id);
        Ok(bytes.strip_prefix(&[TokTrie::SPECIAL_TOKEN_MARKER]).unwrap_or(bytes).to_vec())
    }
}

impl Source {
    fn read(&self) -> Result<ParserFactory, ConstraintError> {
        let bad = |why: String| ConstraintError::Vocabulary(format!("{}: {why}", self.tokenizer.display()));
        let bytes = std::fs::read(&self.tokenizer).map_err(|e| bad(e.to_string()))?;
        let json = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        let mut words = token_bytes_from_tokenizer_json(&json).map_err(|e| bad(e.to_string()))?;
        if words.len() > self.tokens {
            return Err(bad(format!("{} tokens, the model has {}", words.len(), self.tokens)));
        }
        // Models pad their vocabulary: ids without text can never be drawn.
        words.resize(self.tokens, Vec::new());
        let first = *self.ends.first().ok_or_else(|| bad("the model has no end token".into()))?;
        if let Some(end) = self.ends.iter().find(|end| **end as usize >= self.tokens) {
            return Err(bad(format!("end token {end} is not in the vocabulary")));
        }
        let count = u32::try_from(self.tokens).map_err(|e| bad(e.to_string()))?;
        let trie = TokTrie::from(&TokRxInfo::new(count, first), &words).with_eos_tokens(&self.ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|e| bad(e.to_string()))?;
        factory.quiet();
        Ok(factory)
    }
}
