//! A call that must come, as a grammar: its form, its name, and its arguments by their schema.

use constraint::lark;
use proto::v1;
use serde_json::{Value, json};

use super::ToolFormat;
use crate::text::conversation;

/// The grammar of at least one call of these tools (exactly one when only one may be called). `token` finds a special
/// token's id by its text.
pub fn of_required_call(
    chat: &v1::ChatMessages,
    format: ToolFormat,
    token: impl Fn(&str) -> Option<u32>,
) -> Result<String, String> {
    let wanted = chat.tool_choice.as_ref().map_or("", |choice| &choice.function);
    let tools = chat.tools.iter().filter(|tool| wanted.is_empty() || tool.name == wanted);
    let arguments = if format == ToolFormat::Llama { "parameters" } else { "arguments" };
    let schemas = tools.map(|tool| schema(tool, arguments)).collect::<Result<Vec<_>, _>>()?;
    let call = match <[Value; 1]>::try_from(schemas) {
        Ok([only]) => only,
        Err(several) => json!({"anyOf": several}),
    };
    let json = lark::embedded_schema(&call);
    let is_one = !wanted.is_empty();
    Ok(match format {
        ToolFormat::Hermes => {
            let many = if is_one { "" } else { r#" ("\n" call)*"# };
            format!("start: call{many}\ncall: \"<tool_call>\\n\" body \"\\n</tool_call>\"\nbody: {json}\n")
        }
        ToolFormat::Llama => {
            let many = if is_one { "" } else { r#" ("; " body)*"# };
            format!("start: body{many}\nbody: {json}\n")
        }
        ToolFormat::Mistral => {
            let many = if is_one { "" } else { r#" (", " body)*"# };
            let mark = match token("[TOOL_CALLS]") {
                Some(id) => format!("<[{id}]>"),
                None => lark::literal("[TOOL_CALLS]"),
            };
            format!("start: {mark} \" [\" body{many} \"]\"\nbody: {json}\n")
        }
    })
}

fn schema(tool: &v1::Tool, arguments: &str) -> Result<Value, String> {
    let mut properties = serde_json::Map::new();
    properties.insert("name".into(), json!({"const": tool.name}));
    properties.insert(arguments.into(), conversation::parameters(tool)?);
    Ok(json!({
        "type": "object",
        "properties": properties,
        "required": ["name", arguments],
        "additionalProperties": false,
    }))
}
