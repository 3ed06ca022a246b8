//! What clients ask for, written as a grammar.

use llguidance::api::GrammarWithLexer;
use serde_json::{Value, json};

/// Any JSON object.
pub fn json_object() -> String {
    of_schema(&json!({"type": "object"}))
}

/// JSON that a schema (given as text) accepts.
pub fn json_schema(text: &str) -> Result<String, String> {
    let schema: Value = serde_json::from_str(text).map_err(|e| format!("not JSON: {e}"))?;
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(of_schema(&schema)),
        _ => Err("a schema is a JSON object".into()),
    }
}

fn of_schema(schema: &Value) -> String {
    format!("start: {}", embedded_schema(schema))
}

/// A schema as a term of a larger grammar.
pub fn embedded_schema(schema: &Value) -> String {
    format!("%json {schema}")
}

/// Text that a regular expression (Rust's syntax, no look-around) matches as a whole.
pub fn regex(pattern: &str) -> String {
    GrammarWithLexer::from_regex(pattern).lark_grammar.unwrap_or_default()
}

/// One of these texts.
pub fn choice(texts: &[String]) -> String {
    let quoted: Vec<String> = texts.iter().map(|text| literal(text)).collect();
    format!("start: {}", quoted.join(" | "))
}

/// A text as a term of a larger grammar.
pub fn literal(text: &str) -> String {
    Value::from(text).to_string()
}
