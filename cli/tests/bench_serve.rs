//! `tandem bench serve` against a real cluster, over both of its faces.

#![allow(clippy::unwrap_used)]

use std::process::{Command, Stdio};

use serde_json::Value;
use tandem_tests::model;
use tandem_tests::process::{Process, client, free_port, wait_for};

fn bench(address: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.args(["bench", "serve", "--addr", address, "--vocab", "256"]).args(arguments);
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn loads_are_put_on_a_cluster_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 1);
    let address = format!("127.0.0.1:{}", free_port());
    let mut up = Command::new(env!("CARGO_BIN_EXE_tandem"));
    up.args(["up", "--listen", &address, "--kv-mib", "16", "--model-name", "tiny", "--model"])
        .arg(dir.path());
    let _up = Process(up.stdout(Stdio::null()).spawn().unwrap());
    wait_for(&mut client(&address).await, &["decode-0", "prefill-0"]).await;
    let shape =
        ["--prompt-tokens", "40", "--output-tokens", "8", "--seconds", "2", "--warm-up", "0.2", "--json"];
    let report = |more: &[&str]| -> Value {
        let (code, out, err) = bench(&address, &[&shape[..], more].concat());
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str(&out).unwrap()
    };
    let page = dir.path().join("page.html");
    let openai = ["--api", "openai", "--model", "tiny"];
    for api in [&["--api", "grpc"][..], &openai[..]] {
        let seen = report(&[api, &["--rate", "10,20", "--html", &page.display().to_string()]].concat());
        for (load, least) in seen["loads"].as_array().unwrap().iter().zip([8, 20]) {
            assert!(load["requests"].as_u64().unwrap() >= least && load["ok"] == load["requests"], "{load}");
            let rate = |key: &str| load[key].as_f64().unwrap();
            assert!(
                (rate("output_tokens_per_second") / rate("requests_per_second") - 8.0).abs() < 0.01,
                "{load}"
            );
            assert!(load["ttft_ms"]["p50"].as_f64().unwrap() > 0.0, "{load}");
            assert!(load["e2e_ms"]["max"].as_f64() >= load["ttft_ms"]["max"].as_f64(), "{load}");
            // Only the router's own API tells what placement had expected.
            let ways = load["placement"].as_object().unwrap();
            let told: u64 = ways.values().map(|way| way["answers"].as_u64().unwrap()).sum();
            assert_eq!(told, if api[1] == "grpc" { load["ok"].as_u64().unwrap() } else { 0 }, "{load}");
        }
        let html = std::fs::read_to_string(&page).unwrap();
        assert!(html.matches("<svg").count() == 4 && html.contains("20 req/s"));
    }
    let closed = report(&["--concurrency", "3"]);
    assert!(closed["loads"][0]["ok"].as_u64().unwrap() >= 10, "{closed}");

    let trace = dir.path().join("trace.jsonl");
    let row = |at: u32, hash: u32| {
        format!(r#"{{"timestamp": {at}, "input_length": 60, "output_length": 8, "hash_ids": [{hash}]}}"#)
    };
    std::fs::write(&trace, [row(0, 7), row(600, 7), row(900, 7), row(1200, 8)].join("\n")).unwrap();
    let replayed = report(&["--trace", &trace.display().to_string()]);
    assert_eq!(replayed["loads"][0]["ok"], 3, "{replayed}");

    let refused = |arguments: &[&str], code: i32, words: &str| {
        let (ended, _, said) = bench(&address, &[&shape[..], arguments].concat());
        assert!(ended == Some(code) && said.contains(words), "{ended:?}: {said}");
    };
    refused(&[], 1, "what load?");
    refused(&["--rate", "0"], 1, "--rate: 0");
    refused(&["--rate", "5", "--concurrency", "2"], 2, "cannot be used with");
    refused(&["--rate", "5", "--api", "openai", "--model", "other"], 1, "404");
    refused(&["--rate", "5", "--spread", "2"], 1, "--spread: 2");
}
