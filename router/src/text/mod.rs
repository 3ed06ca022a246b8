//! Everything that knows text: chat template, tokenizer, incremental detokenisation, stop strings, function calls.

mod conversation;
pub mod detokenize;
pub mod model;
mod python_json;
pub mod stop;
pub mod template;
pub mod tools;
