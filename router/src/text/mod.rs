//! Everything that knows text: chat template, tokenizer, incremental detokenisation, stop strings.

pub mod detokenize;
pub mod model;
pub mod stop;
pub mod template;
