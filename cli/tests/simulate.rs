//! `tandem roofline`, `tandem sim` and `--device sim`, through the real binary.

#![allow(clippy::unwrap_used)]

use std::process::Command;

use serde_json::Value;
use tandem_tests::model;

fn tandem(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_tandem")).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn refused(arguments: &[&str], words: &str) {
    let (code, _, said) = tandem(arguments);
    assert!(code == Some(1) && said.contains(words), "{arguments:?}: {code:?} {said}");
}

#[test]
fn roofline_prints_its_tables() {
    let (code, out, err) = tandem(&["roofline", "--shape", "llama-70b", "--device", "h100", "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["devices"], 4);
    assert!((report["balance"].as_f64().unwrap() - 295.3).abs() < 0.1);
    assert_eq!(report["transfers"][0]["over"].as_array().unwrap().len(), 8);
    let (_, text, _) = tandem(&["roofline", "--shape", "llama-8b", "--link", "ndr", "--reached"]);
    assert!(text.contains("balance point 246") && text.contains("| batch 128 |"), "{text}");
    refused(&["roofline", "--device", "h1000"], "--device: h1000 is not one of h100");
    refused(&["roofline", "--device", "a100", "--weights", "fp8"], "has no fp8 products");
    refused(&["roofline", "--link", "string"], "--link: string is not one of nvlink4");
}

/// The bytes of two processes: nothing may depend on an address, a hash map's order or the time of day.
#[test]
fn the_same_seed_prints_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.jsonl");
    let row = |n: usize| {
        let turns: Vec<usize> = (0..=n / 20).map(|turn| turn * 100 + n % 20).collect();
        let length = turns.len() * 512;
        format!(
            r#"{{"timestamp": {}, "input_length": {length}, "output_length": 30, "hash_ids": {turns:?}}}"#,
            n * 40
        )
    };
    std::fs::write(&trace, (0..200).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    let trace = trace.display().to_string();
    let arguments = [
        "sim",
        "--prefill",
        "4",
        "--decode",
        "3",
        "--json",
        "--trace",
        &trace,
        "--load",
        "3",
        "--warm-up",
        "0",
    ];
    let (first, second) = (tandem(&arguments), tandem(&arguments));
    assert_eq!(first.0, Some(0), "{}", first.2);
    assert_eq!(first.1, second.1);
    let reports: Value = serde_json::from_str(&first.1).unwrap();
    assert_eq!(reports.as_array().unwrap().len(), 5);
    assert!(reports.as_array().unwrap().iter().all(|r| r["requests"] == 600 && r["ok"].as_u64() > Some(400)));

    refused(&["sim", "--trace", &trace], "--warm-up: no request came after 20 s");
    refused(&["sim"], "what load?");
    refused(&["sim", "--rate", "0"], "--rate: 0");
    refused(&["sim", "--rate", "1", "--shape", "llama-70b"], "leave no room for KV");
    refused(&["sim", "--rate", "1", "--profile", "nobody"], "built-in ones are h100");
    refused(&["sim", "--rate", "1", "--decode", "0", "--prefill", "0"], "at least one worker");
}

/// Real processes without compute: tokens do not depend on who prefilled.
#[test]
fn a_cluster_without_a_device_answers() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 1);
    let folder = dir.path().display().to_string();
    let answer = |prefill_on: &str| -> Value {
        let arguments = [
            "generate",
            "--json",
            "--model",
            &folder,
            "--device",
            "sim",
            "--sim-shape",
            "llama-8b",
            "--kv-mib",
            "512",
            "--temperature",
            "0",
            "--max-tokens",
            "12",
            "--prefill-on",
            prefill_on,
            "a simulated prompt that fills a block and a bit more",
        ];
        let (code, out, err) = tandem(&arguments);
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str(&out).unwrap()
    };
    let (remote, local) = (answer("remote"), answer("local"));
    assert!(remote["text"].as_str().is_some_and(|text| !text.is_empty()), "{remote}");
    assert_eq!(remote["text"], local["text"]);
    refused(
        &["generate", "--model", &folder, "--device", "sim", "--sim-profile", "x.json", "hello"],
        "the built-in ones are h100",
    );
}
