//! Which tokens may come next when an output must follow a grammar.
//!
//! A [`Vocabulary`] knows the bytes of every token; a grammar (Lark in [llguidance]'s dialect, into which JSON schemas,
//! regular expressions and choices are written by [`lark`]) compiles to a [`Constraint`]. A constraint is a function of a
//! choice's output: asked with the tokens so far, it forbids what may not follow. So its state needs no hand-off: any
//! worker has the same answer for the same output.
//!
//! [llguidance]: https://github.com/guidance-ai/llguidance

mod constraint;
pub mod lark;
mod vocabulary;

pub use constraint::Constraint;
pub use vocabulary::Vocabulary;

/// Longest grammar in bytes: beyond it compiling alone would hold others up.
pub const MAX_GRAMMAR_BYTES: usize = 256 << 10;

/// Why an output cannot be constrained.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// The tokenizer's vocabulary cannot be read: repair the model folder.
    #[error("constrained output needs tokenizer.json: {0}")]
    Vocabulary(String),
    /// The grammar is wrong or too large: the client must change it.
    #[error("{0}")]
    Grammar(String),
    /// The grammar was left, or became too complex while it was followed: the request cannot go on.
    #[error("the grammar cannot be followed any further: {0}")]
    Lost(String),
}
