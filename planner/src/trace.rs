//! Traces of requests: Mooncake's JSON lines and Azure's CSV, told apart by their first character.

use serde::Deserialize;

/// Tokens of one hashed block in Mooncake's traces.
pub const BLOCK_TOKENS: f64 = 512.0;
const MOST_TOKENS: f64 = 10_000_000.0;
/// Copies of a request under `--load` arrive within this many seconds of it.
const SPREAD_SECONDS: f64 = 5.0;

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Seconds since the first one.
    pub at: f64,
    /// Prompt tokens.
    pub prompt: f64,
    /// Output tokens.
    pub output: f64,
    /// Hashes of the prompt's blocks, each over all before it; empty when the trace has none.
    pub blocks: Vec<u64>,
}

/// A trace that cannot be used, and where.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A line is not what it should be.
    #[error("line {line}: {what}")]
    Line {
        /// From 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// There is nothing in it.
    #[error("the trace has no requests")]
    Empty,
}

#[derive(Deserialize)]
struct Mooncake {
    timestamp: f64,
    input_length: f64,
    output_length: f64,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Reads a trace; requests come out in the order of their times, which begin at 0.
pub fn parse(text: &str) -> Result<Vec<Request>, TraceError> {
    let is_json = text.trim_start().starts_with('{');
    let mut requests = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let header = index == 0 && !is_json;
        if line.trim().is_empty() || header {
            continue;
        }
        let request = if is_json { mooncake(line) } else { azure(line) };
        let request = request.and_then(checked).map_err(|what| TraceError::Line { line: index + 1, what })?;
        requests.push(request);
    }
    requests.sort_by(|a, b| a.at.total_cmp(&b.at));
    let first = requests.first().ok_or(TraceError::Empty)?.at;
    for request in &mut requests {
        request.at -= first;
    }
    Ok(requests)
}

/// Every request `factor` times, within a few seconds of each other and with nothing in common: more users, same pattern.
pub fn multiply(requests: &[Request], factor: u32) -> Vec<Request> {
    let copy = |number: u32, request: &Request| {
        // A fixed scatter: the same load for every fleet that is compared.
        let scatter =
            f64::from(number.wrapping_mul(0x9e37_79b9) >> 8) / f64::from(1u32 << 24) * SPREAD_SECONDS;
        let salt = u64::from(number) << 40;
        Request {
            at: request.at + if number == 0 { 0.0 } else { scatter },
            blocks: request.blocks.iter().map(|hash| hash ^ salt).collect(),
            ..request.clone()
        }
    };
    let mut all: Vec<_> = (0..factor.max(1)).flat_map(|n| requests.iter().map(move |r| copy(n, r))).collect();
    all.sort_by(|a, b| a.at.total_cmp(&b.at));
    all
}

fn checked(request: Request) -> Result<Request, String> {
    let range = |name: &str, value: f64| match (0.0..=MOST_TOKENS).contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} is {value}, and must be 0 to {MOST_TOKENS}")),
    };
    range("prompt tokens", request.prompt)?;
    range("output tokens", request.output)?;
    if !request.at.is_finite() {
        return Err("the time is not a number".into());
    }
    Ok(Request { prompt: request.prompt.max(1.0), output: request.output.max(1.0), ..request })
}

fn mooncake(line: &str) -> Result<Request, String> {
    let row: Mooncake = serde_json::from_str(line).map_err(|e| e.to_string())?;
    Ok(Request {
        at: row.timestamp / 1000.0,
        prompt: row.input_length,
        output: row.output_length,
        blocks: row.hash_ids,
    })
}

fn azure(line: &str) -> Result<Request, String> {
    let mut cells = line.split(',');
    let mut cell =
        |name: &str| cells.next().ok_or(format!("no {name}; wanted TIMESTAMP,ContextTokens,GeneratedTokens"));
    let at = seconds(cell("TIMESTAMP")?)?;
    let mut number = |name: &str| {
        let text = cell(name)?;
        text.trim().parse::<f64>().map_err(|_| format!("{name} is {text:?}, not a number"))
    };
    Ok(Request {
        at,
        prompt: number("ContextTokens")?,
        output: number("GeneratedTokens")?,
        blocks: Vec::new(),
    })
}

/// `2023-11-16 18:17:03.9799600` as seconds.
fn seconds(text: &str) -> Result<f64, String> {
    let wrong = || format!("TIMESTAMP is {text:?}, not YYYY-MM-DD HH:MM:SS.fraction");
    let (date, time) = text.trim().split_once(' ').ok_or_else(wrong)?;
    let numbers = |text: &str, mark: char| -> Option<[f64; 3]> {
        let parts: Vec<f64> = text.split(mark).map(|p| p.parse().ok()).collect::<Option<_>>()?;
        parts.try_into().ok()
    };
    let [year, month, day] = numbers(date, '-').ok_or_else(wrong)?;
    let [hour, minute, second] = numbers(time, ':').ok_or_else(wrong)?;
    // Days of the civil calendar, years beginning in March.
    let (year, month) = if month <= 2.0 { (year - 1.0, month + 12.0) } else { (year, month) };
    let leap = (year / 4.0).floor() - (year / 100.0).floor() + (year / 400.0).floor();
    let days = 365.0 * year + leap + ((153.0 * (month - 3.0) + 2.0) / 5.0).floor() + day;
    Ok(days * 86_400.0 + hour * 3600.0 + minute * 60.0 + second)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn both_formats() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-12-31 23:59:59.5,100,10\n2024-01-01 00:00:01.0,7,0\n";
        let requests = parse(azure).unwrap();
        assert_eq!((requests[1].at, requests[1].prompt, requests[1].output), (1.5, 7.0, 1.0));
        let mooncake =
            "{\"timestamp\": 2000, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [1, 2]}\n\n";
        assert_eq!(
            parse(mooncake).unwrap(),
            [Request { at: 0.0, prompt: 600.0, output: 5.0, blocks: vec![1, 2] }]
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert!(error("TIMESTAMP,A,B\n2023-11-16 18:17:03,x,1\n").contains("line 2: ContextTokens is \"x\""));
        assert!(error("TIMESTAMP,A,B\nyesterday,1,1\n").contains("line 2: TIMESTAMP is \"yesterday\""));
        assert!(error("TIMESTAMP,A,B\n2023-11-16 18:17:03,1\n").contains("no GeneratedTokens"));
        assert!(error("{\"timestamp\": 1}").contains("missing field `input_length`"));
        assert!(
            error("{\"timestamp\": 1, \"input_length\": -4, \"output_length\": 1}")
                .contains("prompt tokens is -4")
        );
        assert!(error("").contains("no requests"));
    }

    #[test]
    fn multiplied_requests_share_no_prefix() {
        let one =
            parse("{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [1, 2]}")
                .unwrap();
        let three = multiply(&one, 3);
        assert_eq!(three.len(), 3);
        assert!(three[0].blocks != three[1].blocks && three[1].blocks != three[2].blocks);
        assert!(three.iter().all(|r| r.at < SPREAD_SECONDS));
    }
}
