//! The OpenAI face against the gRPC one, and what bad or vanishing clients see and leave behind.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use proto::v1;
use serde_json::{Value, json};
use tandem_tests::cluster::greedy;
use tandem_tests::gate::Gate;
use tandem_tests::page::{self, Metrics};
use tandem_tests::{Cluster, Spec, model};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const CHAT: &str = "/v1/chat/completions";

async fn start(spec: Spec) -> (tempfile::TempDir, Cluster) {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 3);
    let cluster = Cluster::start(dir.path(), &spec).await;
    (dir, cluster)
}

async fn ask(cluster: &Cluster, path: &str, body: &Value) -> (u16, String, Value) {
    let (status, head, body) = page::post(cluster.address, path, "", &body.to_string()).await;
    (status, head, serde_json::from_str(&body).unwrap_or_else(|e| panic!("{body}: {e}")))
}

/// The objects of a stream, which must end as streams do.
async fn events(cluster: &Cluster, path: &str, body: &Value) -> Vec<Value> {
    let (status, head, body) = page::post(cluster.address, path, "", &body.to_string()).await;
    assert_eq!(status, 200, "{body}");
    assert!(head.contains("content-type: text/event-stream"), "{head}");
    let body = body.strip_suffix("data: [DONE]\n\n").unwrap();
    body.split_terminator("\n\n")
        .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
        .collect()
}

fn hello() -> Value {
    json!({"model": "tiny", "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0, "max_tokens": 12, "ignore_eos": true})
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_answer_as_over_grpc() {
    let (_dir, cluster) = start(Spec::default()).await;
    let message = v1::ChatMessage { role: "user".into(), content: "hello".into(), ..Default::default() };
    let chat = v1::ChatMessages { messages: vec![message], ..Default::default() };
    let grpc = v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Chat(chat)),
        sampling: Some(greedy(12)),
        ..Default::default()
    };
    let grpc = cluster.generate(grpc).await.unwrap();

    let (status, head, whole) = ask(&cluster, CHAT, &hello()).await;
    assert_eq!((status, &whole["object"]), (200, &json!("chat.completion")));
    assert!(head.contains("x-request-id: "), "{head}");
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["content"], grpc.text[0]);
    assert_eq!((&choice["finish_reason"], &choice["index"]), (&json!("length"), &json!(0)));
    let usage = grpc.complete.usage.unwrap();
    assert_eq!(whole["usage"]["prompt_tokens"], usage.prompt_tokens);
    assert_eq!(whole["usage"]["completion_tokens"], 12);

    let mut streamed = hello();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let pieces = events(&cluster, CHAT, &streamed).await;
    let text: String = pieces.iter().filter_map(|p| p["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, grpc.text[0]);
    let last = pieces.last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(12)));
    assert!(pieces.iter().rev().skip(1).all(|piece| piece["usage"].is_null()));

    let prompts = json!({"prompt": ["one", "two"], "n": 2, "seed": 4, "max_tokens": 6, "ignore_eos": true});
    let (status, _, whole) = ask(&cluster, "/v1/completions", &prompts).await;
    assert_eq!(status, 200, "{whole}");
    let mut streamed = prompts.clone();
    streamed["stream"] = json!(true);
    let pieces = events(&cluster, "/v1/completions", &streamed).await;
    for index in 0..4 {
        let of_choice = pieces.iter().map(|p| &p["choices"][0]).filter(|c| c["index"] == index);
        let text: String = of_choice.filter_map(|c| c["text"].as_str()).collect();
        assert_eq!(text, whole["choices"][index as usize]["text"], "choice {index}");
    }
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_call_comes_over_both_faces() {
    let (_dir, cluster) = start(Spec::default()).await;
    // Room for white space, of which a random model is fond.
    let bias = [(220, -100.0), (198, -100.0), (197, -100.0), (201, -100.0)];
    let schema = r#"{"type": "object", "properties": {"x": {"enum": [1, 22]}}, "required": ["x"], "additionalProperties": false}"#;
    let tool = v1::Tool { name: "f".into(), parameters: schema.into(), ..Default::default() };
    let choice = v1::ToolChoice { mode: v1::tool_choice::Mode::Required.into(), function: "f".into() };
    let message = v1::ChatMessage { role: "user".into(), content: "hello".into(), ..Default::default() };
    let chat = v1::ChatMessages {
        messages: vec![message],
        tools: vec![tool],
        tool_choice: Some(choice),
        ..Default::default()
    };
    let grpc = v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Chat(chat)),
        sampling: Some(v1::SamplingParams { logit_bias: bias.into(), ..greedy(200) }),
        ..Default::default()
    };
    let grpc = cluster.generate(grpc).await.unwrap();
    assert_eq!(grpc.complete.choices[0].finish_reason(), v1::FinishReason::ToolCalls, "{:?}", grpc.text);
    assert_eq!((grpc.text[0].as_str(), grpc.calls[0].len()), ("", 1));
    let call = &grpc.calls[0][0];
    let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
    assert!(call.name == "f" && (arguments["x"] == 1 || arguments["x"] == 22), "{call:?}");

    let mut http = hello();
    http["max_tokens"] = json!(200);
    http["logit_bias"] = bias.iter().map(|(id, bias)| (id.to_string(), json!(bias))).collect();
    http["tools"] = json!([{"type": "function", "function":
        {"name": "f", "parameters": serde_json::from_str::<Value>(schema).unwrap()}}]);
    http["tool_choice"] = json!({"type": "function", "function": {"name": "f"}});
    let (status, _, whole) = ask(&cluster, CHAT, &http).await;
    let choice = &whole["choices"][0];
    assert_eq!((status, &choice["finish_reason"]), (200, &json!("tool_calls")), "{whole}");
    let function = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!((&function["name"], &function["arguments"]), (&json!("f"), &json!(call.arguments)));
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_told_what_is_wrong() {
    let (_dir, cluster) = start(Spec::default()).await;
    let with = |field: &str, value: Value| {
        let mut body = hello();
        body[field] = value;
        body
    };
    for (body, status, param) in [
        (with("temperature", json!("hot")), 400, json!("temperature")),
        (with("top_p", json!(7)), 400, json!("top_p")),
        (with("n", json!(0)), 400, json!("n")),
        (with("max_tokens", json!(1_000_000)), 400, json!("max_tokens")),
        (with("messages", json!([{"content": "no role"}])), 400, json!("messages[0]")),
        (with("messages", json!([])), 400, json!("messages")),
        (with("logit_bias", json!({"x": 1})), 400, json!("logit_bias")),
        (with("response_format", json!({"type": "poem"})), 400, json!("response_format.type")),
        (with("structured_outputs", json!({"regex": "("})), 400, json!("response_format")),
        (with("tool_choice", json!("required")), 400, json!("tool_choice")),
        (with("model", json!("other")), 404, json!("model")),
    ] {
        let (seen, _, answer) = ask(&cluster, CHAT, &body).await;
        assert_eq!((seen, &answer["error"]["param"]), (status, &param), "{answer}");
        assert!(answer["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{answer}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
    }
    for body in ["", "{", "[]", "null", "\"x\"", "{\"messages\": 1}"] {
        let (status, _, answer) = page::post(cluster.address, CHAT, "", body).await;
        assert_eq!(status, 400, "{body}: {answer}");
    }
    let (status, _, answer) = ask(&cluster, "/v1/embeddings", &json!({})).await;
    assert_eq!(status, 404, "{answer}");
    let (status, answer) = page::get(cluster.address, CHAT).await;
    assert_eq!(status, 405, "{answer}");
    let long = "x".repeat(proto::MAX_MESSAGE_BYTES + 1);
    let (status, _, answer) = page::post(cluster.address, CHAT, "", &long).await;
    assert_eq!(status, 413, "{answer}");
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_is_cancelled() {
    let (_dir, cluster) = start(Spec::default()).await;
    let mut body = hello();
    body["max_tokens"] = json!(4000);
    body["stream"] = json!(true);
    let body = body.to_string();
    let mut socket = TcpStream::connect(cluster.address).await.unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    socket.write_all((head + &body).as_bytes()).await.unwrap();
    let mut seen = [0; 600];
    socket.read_exact(&mut seen).await.unwrap();
    drop(socket);
    let cancelled = "tandem_requests_total{outcome=\"cancelled\"}";
    for _ in 0..500 {
        if Metrics::of(cluster.address).await.value(cancelled) == 1.0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(Metrics::of(cluster.address).await.value(cancelled), 1.0);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cluster_says_when_to_come_back() {
    let gate = Gate::default();
    let gates = [("decode-0".to_owned(), gate.clone())].into();
    let (_dir, cluster) = start(Spec { max_running: 1, max_queued: 0, gates, ..Spec::default() }).await;
    gate.shut();
    let address = cluster.address;
    let first = tokio::spawn(async move { page::post(address, CHAT, "", &hello().to_string()).await });
    loop {
        if Metrics::of(address).await.value("tandem_requests_running") == 1.0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (status, head, answer) = ask(&cluster, CHAT, &hello()).await;
    assert_eq!((status, &answer["error"]["type"]), (429, &json!("rate_limit_error")), "{answer}");
    assert!(head.contains("retry-after: "), "{head}");
    gate.open();
    assert_eq!(first.await.unwrap().0, 200);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}
