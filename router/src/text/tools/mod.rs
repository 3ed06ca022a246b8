//! Function calls in a model's text: how each family writes them, found while they stream, forced when they must come.

mod grammar;
mod parser;

use proto::v1;

pub use grammar::of_required_call;
pub use parser::ToolParser;

/// How a family of models writes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`: Hermes, Qwen 2.5 and 3, and models without their own.
    Hermes,
    /// The whole answer is `{"name": …, "parameters": …}`, several with `;` between: Llama 3.1 and later.
    Llama,
    /// `[TOOL_CALLS]`, then a JSON array of `{"name": …, "arguments": …}`: Mistral.
    Mistral,
}

impl ToolFormat {
    /// Recognised by what the model's chat template writes.
    pub fn of_template(source: &str) -> Self {
        if source.contains("<tool_call>") {
            Self::Hermes
        } else if source.contains("[TOOL_CALLS]") {
            Self::Mistral
        } else if source.contains("<|python_tag|>") || source.contains(r#"{"name": function name"#) {
            Self::Llama
        } else {
            Self::Hermes
        }
    }
}

/// Longest name of a function.
const MAX_NAME: usize = 64;
/// Functions in one request.
const MAX_TOOLS: usize = 128;

/// Refuses tools that could not be called, naming the field.
pub fn check(chat: &v1::ChatMessages) -> Result<(), String> {
    use v1::tool_choice::Mode;
    if chat.tools.len() > MAX_TOOLS {
        return Err(format!("tools: {}, at most {MAX_TOOLS}", chat.tools.len()));
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-' || c == '.';
    for tool in &chat.tools {
        if tool.name.is_empty() || tool.name.len() > MAX_NAME || !tool.name.chars().all(fits) {
            return Err(format!(
                "tools.name: {:?} is not 1 to {MAX_NAME} letters, digits, '_', '-' or '.'",
                tool.name
            ));
        }
    }
    let Some(choice) = &chat.tool_choice else { return Ok(()) };
    let known = chat.tools.iter().any(|tool| tool.name == choice.function);
    match choice.mode() {
        Mode::Required if chat.tools.is_empty() => {
            Err("tool_choice: required, but there are no tools".into())
        }
        Mode::Required if !choice.function.is_empty() && !known => {
            Err(format!("tool_choice: there is no tool {:?}", choice.function))
        }
        _ => Ok(()),
    }
}

/// An id for a call: nine letters and digits, the form that Mistral's templates insist on.
fn new_call_id() -> String {
    use rand::Rng;
    use rand::distr::Alphanumeric;
    rand::rng().sample_iter(Alphanumeric).take(9).map(char::from).collect()
}
