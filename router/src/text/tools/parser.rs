//! Finds calls in text that comes piece by piece: what cannot be a call is shown at once, a call when it is complete.

use proto::v1;
use serde_json::Value;

use super::{ToolFormat, new_call_id};

/// What more text brought.
#[derive(Debug, Default, PartialEq)]
pub struct Parsed {
    /// Text outside of calls.
    pub text: String,
    /// Complete calls.
    pub calls: Vec<v1::ToolCall>,
}

/// Text of one choice, in which calls are looked for.
#[derive(Debug)]
pub struct ToolParser {
    format: ToolFormat,
    /// Names that may be called; other JSON is text.
    names: Vec<String>,
    held: String,
    /// How much of `held` was searched for the end of a call.
    searched: usize,
    is_inside: bool,
    /// Nothing but white space has come since a call.
    is_after_call: bool,
    /// Anything but white space was shown: Llama's calls stand at the beginning only.
    has_shown: bool,
    calls: usize,
}

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
const MISTRAL: &str = "[TOOL_CALLS]";
const PYTHON: &str = "<|python_tag|>";

impl ToolParser {
    /// For an answer that may call these.
    pub fn new(format: ToolFormat, tools: &[v1::Tool]) -> Self {
        Self {
            format,
            names: tools.iter().map(|tool| tool.name.clone()).collect(),
            held: String::new(),
            searched: 0,
            is_inside: false,
            is_after_call: false,
            has_shown: false,
            calls: 0,
        }
    }

    /// Whether a call was found.
    pub fn has_called(&self) -> bool {
        self.calls > 0
    }

    /// Adds text.
    pub fn push(&mut self, text: &str) -> Parsed {
        self.held.push_str(text);
        let mut parsed = Parsed::default();
        while self.advance(&mut parsed) {}
        self.note(&parsed);
        parsed
    }

    /// The end of the text: what is held back is a call or text.
    pub fn flush(&mut self) -> Parsed {
        let mut parsed = Parsed::default();
        let held = std::mem::take(&mut self.held);
        let calls = if self.is_inside { self.read(body(&held)) } else { None };
        match calls {
            Some(calls) => parsed.calls = calls,
            None if self.is_after_call && held.trim().is_empty() => {}
            None => parsed.text = held,
        }
        self.note(&parsed);
        parsed
    }

    fn note(&mut self, parsed: &Parsed) {
        self.has_shown |= !parsed.text.trim().is_empty();
        self.calls += parsed.calls.len();
    }

    /// One decision; false when more text is needed.
    fn advance(&mut self, parsed: &mut Parsed) -> bool {
        if self.is_inside {
            return self.format == ToolFormat::Hermes && self.close(parsed);
        }
        match self.format {
            ToolFormat::Hermes => self.open(OPEN, parsed),
            ToolFormat::Mistral => self.open(MISTRAL, parsed),
            ToolFormat::Llama => self.open_llama(parsed),
        }
    }

    /// Shows what stands before a mark, or before what may become one. White space behind a call belongs to it.
    fn open(&mut self, mark: &str, parsed: &mut Parsed) -> bool {
        let (before, found) = match self.held.find(mark) {
            Some(at) => (at, true),
            None => (self.held.len() - begins(&self.held, mark), false),
        };
        let is_blank = self.is_after_call && self.held[..before].trim().is_empty();
        if is_blank && !found {
            return false;
        }
        let rest = self.held.split_off(before);
        let shown = std::mem::replace(&mut self.held, rest);
        if !is_blank {
            self.is_after_call &= shown.is_empty();
            parsed.text.push_str(&shown);
        }
        self.is_inside = found;
        self.searched = 0;
        found
    }

    /// An answer that begins with a brace or the mark for a call may be calls to its end.
    fn open_llama(&mut self, parsed: &mut Parsed) -> bool {
        let start = self.held.trim_start();
        if self.has_shown || !(start.is_empty() || PYTHON.starts_with(start) || is_llama_call(start)) {
            parsed.text.push_str(&std::mem::take(&mut self.held));
            self.has_shown = true;
            return false;
        }
        self.is_inside = is_llama_call(start);
        self.is_inside
    }

    /// The end of a call within marks.
    fn close(&mut self, parsed: &mut Parsed) -> bool {
        let from = self.searched.saturating_sub(CLOSE.len());
        let from = (from..=self.searched).find(|at| self.held.is_char_boundary(*at)).unwrap_or(0);
        let Some(at) = self.held[from..].find(CLOSE).map(|at| from + at) else {
            self.searched = self.held.len();
            return false;
        };
        let rest = self.held.split_off(at + CLOSE.len());
        let call = std::mem::replace(&mut self.held, rest);
        match self.read(body(&call)) {
            Some(calls) => {
                parsed.calls.extend(calls);
                self.is_after_call = true;
            }
            None => {
                parsed.text.push_str(&call);
                self.is_after_call = false;
            }
        }
        self.is_inside = false;
        self.searched = 0;
        true
    }

    /// Calls from JSON: one value, an array of them, or several with `;` between.
    fn read(&self, text: &str) -> Option<Vec<v1::ToolCall>> {
        let mut calls = Vec::new();
        let mut rest = text.trim();
        while !rest.is_empty() {
            let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
            match values.next()?.ok()? {
                Value::Array(items) => {
                    for item in items {
                        calls.push(self.call(item)?);
                    }
                }
                value => calls.push(self.call(value)?),
            }
            rest = rest[values.byte_offset()..].trim_start_matches(|c: char| c == ';' || c.is_whitespace());
        }
        if calls.is_empty() { None } else { Some(calls) }
    }

    fn call(&self, value: Value) -> Option<v1::ToolCall> {
        let name = value.get("name")?.as_str()?.to_owned();
        let arguments = value.get("arguments").or_else(|| value.get("parameters"))?;
        let arguments = match arguments {
            Value::Object(_) => arguments.to_string(),
            Value::String(text) => text.clone(),
            _ => return None,
        };
        self.names.contains(&name).then(|| v1::ToolCall { id: new_call_id(), name, arguments })
    }
}

/// What stands within the marks.
fn body(text: &str) -> &str {
    let text = text.trim_start();
    let text = [OPEN, MISTRAL, PYTHON].iter().find_map(|mark| text.strip_prefix(mark)).unwrap_or(text);
    text.trim_end().strip_suffix(CLOSE).unwrap_or(text)
}

fn is_llama_call(start: &str) -> bool {
    start.starts_with('{') || start.starts_with(PYTHON)
}

/// Length of the end of `text` that begins `mark`.
fn begins(text: &str, mark: &str) -> usize {
    (1..mark.len().min(text.len() + 1)).rev().find(|len| text.ends_with(&mark[..*len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(format: ToolFormat, pieces: &[&str]) -> (String, Vec<(String, String)>) {
        let tools = ["f", "g"].map(|name| v1::Tool { name: name.into(), ..Default::default() });
        let mut parser = ToolParser::new(format, &tools);
        let mut text = String::new();
        let mut calls = Vec::new();
        let parsed: Vec<Parsed> = pieces.iter().map(|piece| parser.push(piece)).collect();
        for part in parsed.into_iter().chain([parser.flush()]) {
            text.push_str(&part.text);
            calls.extend(part.calls.into_iter().map(|call| (call.name, call.arguments)));
        }
        assert_eq!(parser.has_called(), !calls.is_empty());
        (text, calls)
    }

    fn call(name: &str, arguments: &str) -> (String, String) {
        (name.into(), arguments.into())
    }

    #[test]
    fn each_family() {
        let hermes = "Let me see.<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n<tool_call>{\"name\":\"g\",\"arguments\":{}}</tool_call>";
        let calls = vec![call("f", "{\"x\":1}"), call("g", "{}")];
        assert_eq!(parse(ToolFormat::Hermes, &[hermes]), ("Let me see.".into(), calls.clone()));
        let llama = "<|python_tag|>{\"name\": \"f\", \"parameters\": {\"x\": 1}}; {\"name\": \"g\", \"parameters\": {}}";
        assert_eq!(parse(ToolFormat::Llama, &[llama]), (String::new(), calls.clone()));
        let mistral = "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"x\": 1}}, {\"name\": \"g\", \"arguments\": {}}]";
        assert_eq!(parse(ToolFormat::Mistral, &[mistral]), (String::new(), calls));
    }

    #[test]
    fn what_is_no_call_is_text() {
        for (format, text) in [
            (ToolFormat::Hermes, "a < b <tool"),
            (ToolFormat::Hermes, "<tool_call>{\"name\": \"unknown\", \"arguments\": {}}</tool_call> so"),
            (ToolFormat::Hermes, "<tool_call>{\"name\": \"f\", \"argum"),
            (ToolFormat::Llama, " {\"answer\": 42}"),
            (ToolFormat::Llama, "Sure: {\"name\": \"f\", \"parameters\": {}}"),
            (ToolFormat::Mistral, "[TOOL_CALLS] maybe"),
        ] {
            assert_eq!(parse(format, &[text]), (text.to_owned(), vec![]), "{format:?}");
        }
    }

    proptest! {
        /// However the text is cut, the outcome is the same.
        #[test]
        fn cuts_do_not_matter(
            parts in prop::collection::vec(prop::sample::select(vec![
                "é", " ", "<", "<tool_call>", "</tool_call>", "{\"name\":\"f\",\"arguments\":{\"é\":[1,\"}\"]}}", "[TOOL_CALLS]", "{", "x", ";",
                "{\"name\":\"g\",\"parameters\":{}}", "<|python_tag|>",
            ]), 0..8),
            format in prop::sample::select(vec![ToolFormat::Hermes, ToolFormat::Llama, ToolFormat::Mistral]),
        ) {
            let whole: String = parts.concat();
            let pieces: Vec<String> = whole.chars().map(String::from).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(parse(format, &pieces), parse(format, &[&whole]));
        }
    }
}
