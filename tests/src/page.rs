//! A process's HTTP pages, fetched with a socket, and Prometheus text taken apart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Status and body of a GET.
pub async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    socket.read_to_string(&mut reply).await.unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

/// Status, head and body of a POST. Over HTTP/1.0, so that a stream comes without chunk sizes.
pub async fn post(address: SocketAddr, path: &str, headers: &str, body: &str) -> (u16, String, String) {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let head =
        format!("POST {path} HTTP/1.0\r\nHost: {address}\r\n{headers}Content-Length: {length}\r\n\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    // A server that refuses a long body by its length may close before it is all there.
    let _ = socket.write_all(body.as_bytes()).await;
    let mut reply = Vec::new();
    let _ = socket.read_to_end(&mut reply).await;
    let reply = String::from_utf8(reply).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_ascii_lowercase(), body.to_owned())
}

/// A page of metrics.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Type by name.
    pub types: BTreeMap<String, String>,
    /// Label names with the values seen, by metric; `le` left out.
    pub labels: BTreeMap<String, BTreeMap<String, BTreeSet<String>>>,
    values: BTreeMap<String, f64>,
}

impl Metrics {
    /// Fetches and parses.
    pub async fn of(address: SocketAddr) -> Self {
        let (status, text) = get(address, "/metrics").await;
        assert_eq!(status, 200, "{text}");
        Self::parse(&text)
    }

    fn parse(text: &str) -> Self {
        let mut metrics = Self::default();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                metrics.types.insert(name.into(), kind.into());
            } else if !line.starts_with('#') && !line.is_empty() {
                let (series, value) = line.rsplit_once(' ').unwrap();
                metrics.values.insert(series.into(), value.parse().unwrap());
                if let Some((name, labels)) = series.split_once('{') {
                    // A histogram's series have names of their own.
                    let whole = name.trim_end_matches("_bucket");
                    let name = if metrics.types.contains_key(whole) { whole } else { name };
                    let seen = metrics.labels.entry(name.into()).or_default();
                    for label in labels.trim_end_matches('}').split(',') {
                        let (label, value) = label.split_once('=').unwrap();
                        if label != "le" {
                            seen.entry(label.into()).or_default().insert(value.trim_matches('"').into());
                        }
                    }
                }
            }
        }
        metrics
    }

    /// The value of a series, written as on the page.
    pub fn value(&self, series: &str) -> f64 {
        *self.values.get(series).unwrap_or_else(|| panic!("{series} is not on the page"))
    }
}
