//! Conversations rendered by the models' own templates, byte for byte as transformers renders them.

#![allow(clippy::unwrap_used)]

use proto::v1;
use router::text::template::ChatTemplate;
use serde_json::Value;

fn golden(file: &str) -> String {
    let path = format!("{}/../tests/golden/chat-templates/{file}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn conversation(case: &Value) -> v1::ChatMessages {
    let call = |call: &Value| v1::ToolCall {
        id: text(&call["id"]),
        name: text(&call["function"]["name"]),
        arguments: call["function"]["arguments"].to_string(),
    };
    let message = |m: &Value| v1::ChatMessage {
        role: text(&m["role"]),
        content: text(&m["content"]),
        tool_calls: list(&m["tool_calls"]).map(call).collect(),
        tool_call_id: text(&m["tool_call_id"]),
        name: text(&m["name"]),
    };
    let tool = |tool: &Value| v1::Tool {
        name: text(&tool["function"]["name"]),
        description: text(&tool["function"]["description"]),
        parameters: tool["function"]["parameters"].to_string(),
    };
    v1::ChatMessages {
        messages: list(&case["messages"]).map(message).collect(),
        tools: list(&case["tools"]).map(tool).collect(),
        tool_choice: None,
        template_variables: case["variables"].to_string(),
    }
}

#[test]
fn conversations_are_rendered_as_by_transformers() {
    let document: Value = serde_json::from_str(&golden("cases.json")).unwrap();
    let mut compared = 0;
    for case in list(&document["cases"]) {
        let name = text(&case["template"]);
        let what = format!("{name}, {}", case["case"]);
        let tokens = ["bos_token", "eos_token", "unk_token", "pad_token"];
        let tokens = tokens.map(|token| (token, text(&case["tokens"][token])));
        let template = ChatTemplate::new(golden(&format!("{name}.jinja")), None, tokens.into()).unwrap();
        let rendered = template.render(&conversation(case));
        match case["text"].as_str() {
            Some(expected) => {
                assert_eq!(rendered.unwrap_or_else(|e| panic!("{what}: {e}")), expected, "{what}")
            }
            None => assert!(rendered.is_err(), "{what}: transformers refuses it: {}", case["refused"]),
        }
        compared += 1;
    }
    assert!(compared >= 46, "only {compared} cases");
}
