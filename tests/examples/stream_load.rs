//! Streams from an OpenAI endpoint, so many at a time, each followed by the next: what a router costs.
//!
//!     stream_load HOST:PORT MODEL STREAMS SECONDS TOKENS PROMPT_FILE
//!
//! PROMPT_FILE holds a JSON value for `prompt`. Prints one JSON object; what happens in the first fifth is not counted.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Without a byte for this long a stream has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// One finished stream.
struct Seen {
    began: Instant,
    first_ms: f64,
    gaps_ms: Vec<f64>,
    total_ms: f64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [address, model, streams, seconds, tokens, prompt] = &args[..] else {
        return Err("usage: stream_load HOST:PORT MODEL STREAMS SECONDS TOKENS PROMPT_FILE".into());
    };
    let (streams, tokens): (usize, u32) = (streams.parse()?, tokens.parse()?);
    let span = Duration::from_secs_f64(seconds.parse()?);
    let prompt: Value = serde_json::from_slice(&std::fs::read(prompt)?)?;
    let body = json!({"model": model, "prompt": prompt, "max_tokens": tokens, "stream": true,
        "temperature": 0, "ignore_eos": true})
    .to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let (start, end) = (Instant::now(), Instant::now() + span);
    let runs = (0..streams).map(|number| {
        let (address, request) = (address.clone(), request.clone());
        tokio::spawn(async move {
            // Not all at the same instant.
            tokio::time::sleep(Duration::from_millis(number as u64 * 400 / streams as u64)).await;
            repeat(&address, &request, end).await
        })
    });
    let mut seen = Vec::new();
    let mut failed = 0;
    for run in runs.collect::<Vec<_>>() {
        let (ended, failures) = run.await?;
        seen.extend(ended);
        failed += failures;
    }
    let from = start + span / 5;
    seen.retain(|one| one.began >= from);
    let mut first: Vec<f64> = seen.iter().map(|one| one.first_ms).collect();
    let mut total: Vec<f64> = seen.iter().map(|one| one.total_ms).collect();
    let mut gaps: Vec<f64> = seen.iter().flat_map(|one| one.gaps_ms.iter().copied()).collect();
    println!(
        "{}",
        json!({
            "requests": seen.len(), "failed": failed, "seconds": (span - span / 5).as_secs_f64(),
            "first_ms": quantiles(&mut first), "gap_ms": quantiles(&mut gaps), "total_ms": quantiles(&mut total),
        })
    );
    Ok(())
}

fn quantiles(values: &mut [f64]) -> Value {
    values.sort_by(f64::total_cmp);
    let at = |q: f64| values.get((values.len() as f64 * q) as usize).copied().unwrap_or(0.0);
    json!({"p50": at(0.5), "p99": at(0.99), "max": values.last()})
}

/// One stream after the other on one connection.
async fn repeat(address: &str, request: &str, end: Instant) -> (Vec<Seen>, usize) {
    let mut seen = Vec::new();
    let mut failed = 0;
    let mut socket = None;
    while Instant::now() < end {
        match one(address, request, &mut socket).await {
            Ok(one) => seen.push(one),
            Err(error) => {
                if failed == 0 {
                    eprintln!("{error}");
                }
                failed += 1;
                socket = None;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    (seen, failed)
}

async fn one(address: &str, request: &str, open: &mut Option<TcpStream>) -> Result<Seen, Failure> {
    let mut socket = match open.take() {
        Some(socket) => socket,
        None => {
            let socket = TcpStream::connect(address).await?;
            socket.set_nodelay(true)?;
            socket
        }
    };
    let began = Instant::now();
    socket.write_all(request.as_bytes()).await?;
    let (mut buffer, mut text) = (vec![0; 16 << 10], Vec::new());
    let mut times = Vec::new();
    loop {
        let read = tokio::time::timeout(PATIENCE, socket.read(&mut buffer)).await??;
        if read == 0 {
            return Err("the connection was closed in the middle".into());
        }
        // A mark may begin in the last piece and end in this one.
        let from = text.len().saturating_sub(MARK.len() - 1);
        text.extend_from_slice(&buffer[..read]);
        let now = began.elapsed().as_secs_f64() * 1e3;
        times.extend(std::iter::repeat_n(now, count(&text[from..])));
        if !text.starts_with(b"HTTP/1.1 200") {
            return Err(String::from_utf8_lossy(&text[..text.len().min(600)]).into());
        }
        if text.ends_with(b"0\r\n\r\n") {
            break;
        }
    }
    if times.is_empty() {
        return Err("an answer without a token".into());
    }
    *open = Some(socket);
    let gaps_ms = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    Ok(Seen { began, first_ms: times[0], gaps_ms, total_ms: began.elapsed().as_secs_f64() * 1e3 })
}

/// What every token's event has; all routers here write it so.
const MARK: &[u8] = b"\"text\":\" ";

fn count(text: &[u8]) -> usize {
    text.windows(MARK.len()).filter(|window| *window == MARK).count()
}
