//! JSON as Python's `json.dumps` writes it: templates show it to models that were trained on it.

use std::io;

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// `tojson` of transformers: `json.dumps(x, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`.
pub fn filter(value: &Value, named: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = named.get("indent")?;
    let separators: Option<Vec<String>> = named.get("separators")?;
    let sorted: Option<bool> = named.get("sort_keys")?;
    let _: Option<bool> = named.get("ensure_ascii")?;
    named.assert_all_used()?;
    let bad = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    let value = serde_json::to_value(value).map_err(bad)?;
    let value = if sorted == Some(true) { sort_keys(value) } else { value };
    let written = match (indent, separators) {
        (Some(width), None) => {
            let indent = " ".repeat(width.min(64));
            write(&value, PrettyFormatter::with_indent(indent.as_bytes()))
        }
        (_, separators) => {
            let [between, after_key] = separators
                .and_then(|pair| pair.try_into().ok())
                .unwrap_or_else(|| [", ".to_owned(), ": ".to_owned()]);
            write(&value, OneLine { between, after_key })
        }
    };
    written.map_err(bad)
}

/// The same without options.
pub fn dumps(value: &serde_json::Value) -> String {
    write(value, OneLine { between: ", ".into(), after_key: ": ".into() }).unwrap_or_default()
}

fn write(value: &serde_json::Value, formatter: impl Formatter) -> serde_json::Result<String> {
    let mut out = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut out, formatter))?;
    Ok(String::from_utf8_lossy(&out).into_owned())
}

fn sort_keys(value: serde_json::Value) -> serde_json::Value {
    match value {
        serde_json::Value::Object(map) => {
            let mut pairs: Vec<_> = map.into_iter().map(|(k, v)| (k, sort_keys(v))).collect();
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
            pairs.into_iter().collect()
        }
        serde_json::Value::Array(items) => items.into_iter().map(sort_keys).collect(),
        other => other,
    }
}

struct OneLine {
    between: String,
    after_key: String,
}

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.between.as_bytes()) }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.between.as_bytes()) }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.after_key.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn as_python_writes_it() {
        let value = json!({"b": [1, 2.5, null], "a": {"é\n": "<'\">"}, "c": [], "d": true});
        assert_eq!(dumps(&value), r#"{"b": [1, 2.5, null], "a": {"é\n": "<'\">"}, "c": [], "d": true}"#);
        assert_eq!(
            dumps(&sort_keys(value)),
            r#"{"a": {"é\n": "<'\">"}, "b": [1, 2.5, null], "c": [], "d": true}"#
        );
    }
}
