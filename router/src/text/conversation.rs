//! A conversation as the variables of a chat template, in the shape that transformers gives them.

use proto::v1;
use serde_json::{Map, Value, json};

use super::python_json;

/// Every variable but the special tokens. Models whose template knows nothing of tools are told of them in the system
/// message instead. The error says what the client must change.
pub fn variables(chat: &v1::ChatMessages, template_knows_tools: bool) -> Result<Map<String, Value>, String> {
    let tools = chat.tools.iter().map(tool).collect::<Result<Vec<_>, _>>()?;
    let mut messages = chat.messages.iter().map(message).collect::<Result<Vec<_>, _>>()?;
    let mut variables = Map::new();
    if !tools.is_empty() && template_knows_tools {
        variables.insert("tools".into(), Value::Array(tools));
    } else if !tools.is_empty() {
        tell_of_tools(&mut messages, &tools);
    }
    variables.insert("messages".into(), Value::Array(messages));
    variables.insert("add_generation_prompt".into(), Value::Bool(true));
    if !chat.template_variables.is_empty() {
        match serde_json::from_str(&chat.template_variables) {
            Ok(Value::Object(given)) => variables.extend(given),
            _ => return Err("template_variables: a JSON object is wanted".into()),
        }
    }
    Ok(variables)
}

fn message(message: &v1::ChatMessage) -> Result<Value, String> {
    let mut value = Map::new();
    value.insert("role".into(), message.role.as_str().into());
    // Never null: some templates look for marks in it.
    value.insert("content".into(), message.content.as_str().into());
    if !message.tool_calls.is_empty() {
        let calls = message.tool_calls.iter().map(tool_call).collect::<Result<Vec<_>, _>>()?;
        value.insert("tool_calls".into(), Value::Array(calls));
    }
    for (name, text) in [("tool_call_id", &message.tool_call_id), ("name", &message.name)] {
        if !text.is_empty() {
            value.insert(name.into(), text.as_str().into());
        }
    }
    Ok(Value::Object(value))
}

fn tool_call(call: &v1::ToolCall) -> Result<Value, String> {
    let arguments: Value = match call.arguments.as_str() {
        "" => json!({}),
        text => serde_json::from_str(text)
            .map_err(|e| format!("messages.tool_calls.arguments: of {}: not JSON: {e}", call.name))?,
    };
    let mut value = Map::new();
    if !call.id.is_empty() {
        value.insert("id".into(), call.id.as_str().into());
    }
    value.insert("type".into(), "function".into());
    value.insert("function".into(), json!({"name": call.name, "arguments": arguments}));
    Ok(Value::Object(value))
}

/// A tool as OpenAI's API writes it, which is what templates expect.
fn tool(tool: &v1::Tool) -> Result<Value, String> {
    let mut function = Map::new();
    function.insert("name".into(), tool.name.as_str().into());
    if !tool.description.is_empty() {
        function.insert("description".into(), tool.description.as_str().into());
    }
    function.insert("parameters".into(), parameters(tool)?);
    Ok(json!({"type": "function", "function": function}))
}

/// The schema of a tool's arguments.
pub fn parameters(tool: &v1::Tool) -> Result<Value, String> {
    match tool.parameters.as_str() {
        "" => Ok(json!({"type": "object", "properties": {}})),
        text => match serde_json::from_str(text) {
            Ok(schema @ Value::Object(_)) => Ok(schema),
            Ok(_) => Err(format!("tools.parameters: of {}: a schema is a JSON object", tool.name)),
            Err(e) => Err(format!("tools.parameters: of {}: not JSON: {e}", tool.name)),
        },
    }
}

/// The words of the Hermes function calling format, for models without their own:
/// <https://github.com/NousResearch/Hermes-Function-Calling>.
fn tell_of_tools(messages: &mut Vec<Value>, tools: &[Value]) {
    let list: Vec<String> = tools.iter().map(python_json::dumps).collect();
    let words = format!(
        "You may call functions. Their signatures are within <tools></tools>:\n<tools>\n{}\n</tools>\n\
         For each call write a JSON object with its name and arguments within <tool_call></tool_call>:\n\
         <tool_call>\n{{\"name\": <function-name>, \"arguments\": <args-json-object>}}\n</tool_call>",
        list.join("\n")
    );
    match messages.first_mut().filter(|first| first["role"] == "system") {
        Some(system) => {
            let text = format!("{}\n\n{words}", system["content"].as_str().unwrap_or_default());
            system["content"] = text.into();
        }
        None => messages.insert(0, json!({"role": "system", "content": words})),
    }
}
