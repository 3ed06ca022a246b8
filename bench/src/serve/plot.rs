//! A page that needs nothing else: latency and goodput against load, as SVG.

use std::fmt::Write;

use super::Report;
use super::record::Measured;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 44.0;
const COLOURS: [&str; 3] = ["#2563eb", "#d97706", "#dc2626"];

/// A named row of values, one per load.
type Line<'a> = (&'a str, fn(&Measured) -> f64);

/// The whole page.
pub fn page(report: &Report) -> String {
    let mut out = String::from(
        "<!doctype html><meta charset=utf-8><title>tandem bench serve</title><style>body{font:14px system-ui;margin:2em;color:#111;background:#fff}svg{display:block;margin:1em 0}</style>\n",
    );
    let _ = write!(out, "<h1>{}</h1><pre>{}</pre>", escape(&report.target), escape(&report.to_string()));
    let charts: [(&str, &[Line<'_>]); 4] = [
        (
            "Time to first token, ms",
            &[("p50", |l| l.ttft_ms.p50), ("p90", |l| l.ttft_ms.p90), ("p99", |l| l.ttft_ms.p99)],
        ),
        (
            "Between tokens, ms",
            &[("p50", |l| l.itl_ms.p50), ("p99", |l| l.itl_ms.p99), ("p99.9", |l| l.itl_ms.p999)],
        ),
        ("Output tokens a second", &[("tokens/s", |l| l.output_tokens_per_second)]),
        ("Within the SLO, %", &[("good", |l| l.within_slo * 100.0)]),
    ];
    for (title, lines) in charts {
        chart(&mut out, report, title, lines);
    }
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Loads from left to right, evenly; values from 0 up.
fn chart(out: &mut String, report: &Report, title: &str, lines: &[Line<'_>]) {
    let loads = &report.loads;
    let most = loads.iter().flat_map(|l| lines.iter().map(|(_, of)| of(l))).fold(0.0, f64::max).max(1e-9);
    let x = |i: usize| LEFT + (WIDTH - LEFT - 20.0) * (i as f64 + 0.5) / loads.len().max(1) as f64;
    let y = |value: f64| TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - value / most);
    let _ = write!(
        out,
        "<h2>{title}</h2><svg viewBox='0 0 {WIDTH} {HEIGHT}' width={WIDTH} role=img aria-label='{title}'>"
    );
    for part in 0..=4 {
        let value = most * f64::from(part) / 4.0;
        let at = y(value);
        let _ = write!(
            out,
            "<line x1={LEFT} x2={WIDTH} y1={at:.1} y2={at:.1} stroke='#ddd'/><text x={} y={:.1} text-anchor=end font-size=11>{value:.1}</text>",
            LEFT - 6.0,
            at + 4.0
        );
    }
    for (i, load) in loads.iter().enumerate() {
        let _ = write!(
            out,
            "<text x={:.1} y={} text-anchor=middle font-size=11>{}</text>",
            x(i),
            HEIGHT - BOTTOM + 18.0,
            escape(&load.load)
        );
    }
    for ((name, of), colour) in lines.iter().zip(COLOURS) {
        let points: Vec<String> =
            loads.iter().enumerate().map(|(i, l)| format!("{:.1},{:.1}", x(i), y(of(l)))).collect();
        let _ = write!(
            out,
            "<polyline points='{}' fill=none stroke='{colour}' stroke-width=2 />",
            points.join(" ")
        );
        for (i, load) in loads.iter().enumerate() {
            let value = of(load);
            let _ = write!(
                out,
                "<circle cx={:.1} cy={:.1} r=3 fill='{colour}'><title>{name}, {}: {value:.2}</title></circle>",
                x(i),
                y(value),
                escape(&load.load)
            );
        }
    }
    for (i, ((name, _), colour)) in lines.iter().zip(COLOURS).enumerate() {
        let at = LEFT + 90.0 * i as f64;
        let _ = write!(out, "<text x={at} y=14 font-size=12 fill='{colour}'>{name}</text>");
    }
    out.push_str("</svg>\n");
}
