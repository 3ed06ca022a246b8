//! Workers that compute nothing, so that a router can be measured: at once the first token, then one every so often.
//!
//!     mock_worker prefill LISTEN              speaks OpenAI's and sglang's HTTP; answers at once, whatever is asked for
//!     mock_worker decode LISTEN GAP_MS        the same; streams as many tokens as were asked for
//!     mock_worker tandem ROUTER GAP_MS        joins that router as a prefill and as a decode worker
//!
//! See bench/router.py.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router};
use cluster::{Join, Load, Member, RemoteRegistry, Role};
use futures::StreamExt;
use proto::v1::decode_worker_server::{DecodeWorker, DecodeWorkerServer};
use proto::v1::prefill_worker_server::{PrefillWorker, PrefillWorkerServer};
use proto::v1::{self, decode_event::Event};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::RoutesBuilder;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response as Reply, Status};

type Failure = Box<dyn std::error::Error + Send + Sync>;
/// " word" in SmolLM2's vocabulary.
const TOKEN: u32 = 2229;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["prefill", listen] => serve_http(listen, None).await,
        ["decode", listen, gap] => serve_http(listen, Some(millis(gap)?)).await,
        ["tandem", router, gap] => serve_tandem(router, millis(gap)?).await,
        _ => Err("usage: mock_worker prefill LISTEN | decode LISTEN GAP_MS | tandem ROUTER GAP_MS".into()),
    }
}

fn millis(text: &str) -> Result<Duration, Failure> {
    Ok(Duration::from_secs_f64(text.parse::<f64>()? / 1e3))
}

/// Ticks of `count` tokens: the first at once.
fn tokens(count: u32, gap: Duration) -> mpsc::Receiver<u32> {
    let (out, tokens) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(gap.max(Duration::from_micros(1)));
        for number in 0..count {
            ticks.tick().await;
            if out.send(number).await.is_err() {
                return;
            }
        }
    });
    tokens
}

async fn serve_http(listen: &str, gap: Option<Duration>) -> Result<(), Failure> {
    let ok = || async { Json(json!({"status": "ok"})) };
    let model = || async { Json(json!({"object": "list", "data": [{"id": "mock", "object": "model"}]})) };
    let info =
        || async { Json(json!({"model_path": "mock", "max_total_num_tokens": 1_000_000, "dp_size": 1})) };
    let routes = Router::new()
        .route("/health", get(ok))
        .route("/health_generate", get(ok))
        .route("/v1/models", get(model))
        .route("/get_model_info", get(info))
        .route("/model_info", get(info))
        .route("/get_server_info", get(info))
        .route("/server_info", get(info))
        .route("/get_load", get(|| async { Json(json!([{"num_reqs": 0, "num_tokens": 0}])) }))
        .route("/v1/completions", post(move |body| complete(body, gap)))
        .layer(axum::extract::DefaultBodyLimit::disable());
    let listener = TcpListener::bind(listen).await?.tap_io(|socket| drop(socket.set_nodelay(true)));
    axum::serve(listener, routes).await?;
    Ok(())
}

async fn complete(Json(body): Json<Value>, gap: Option<Duration>) -> Response {
    let asked = body["max_tokens"].as_u64().and_then(|n| u32::try_from(n).ok()).unwrap_or(16);
    let (count, gap) = gap.map_or((1, Duration::ZERO), |gap| (asked, gap));
    if body["stream"] != true {
        let transfer = json!({"do_remote_prefill": true, "remote_block_ids": [1], "remote_engine_id": "mock",
            "remote_host": "127.0.0.1", "remote_port": 1});
        return Json(json!({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "mock",
            "choices": [{"index": 0, "text": " word", "finish_reason": "length"}], "kv_transfer_params": transfer,
            "usage": {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}}))
        .into_response();
    }
    let pieces = ReceiverStream::new(tokens(count, gap)).map(move |number| {
        let end = if number + 1 == count { json!("length") } else { Value::Null };
        let piece = json!({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "mock",
            "choices": [{"index": 0, "text": " word", "logprobs": null, "finish_reason": end}]});
        format!("data: {piece}\n\n")
    });
    let pieces = pieces.chain(futures::stream::iter(["data: [DONE]\n\n".to_owned()]));
    let body = Body::from_stream(pieces.map(|text| Ok::<_, Infallible>(Bytes::from(text))));
    ([("content-type", "text/event-stream")], body).into_response()
}

struct Mock {
    gap: Duration,
}

#[tonic::async_trait]
impl DecodeWorker for Mock {
    type DecodeStream = ReceiverStream<Result<v1::DecodeEvent, Status>>;

    async fn decode(&self, call: Request<v1::DecodeRequest>) -> Result<Reply<Self::DecodeStream>, Status> {
        let sequence = call.into_inner().sequence.unwrap_or_default();
        let (out, events) = mpsc::channel(16);
        let mut ticks = tokens(sequence.max_tokens, self.gap);
        tokio::spawn(async move {
            let event = |event| Ok(v1::DecodeEvent { event: Some(event), load: None });
            let reserved = v1::Reserved { ticket: vec![1].into(), ..Default::default() };
            if out.send(event(Event::Reserved(reserved))).await.is_err() {
                return;
            }
            while let Some(position) = ticks.recv().await {
                let token = v1::SampledToken { token_id: TOKEN, position, ..Default::default() };
                let tokens = v1::Tokens { tokens: vec![token], local_prefill: None };
                if out.send(event(Event::Tokens(tokens))).await.is_err() {
                    return;
                }
            }
        });
        Ok(Reply::new(ReceiverStream::new(events)))
    }

    async fn r#move(&self, _call: Request<v1::MoveRequest>) -> Result<Reply<v1::MoveReply>, Status> {
        Err(Status::unimplemented("a mock moves nothing"))
    }
}

#[tonic::async_trait]
impl PrefillWorker for Mock {
    type PrefillStream = futures::stream::BoxStream<'static, Result<v1::PrefillEvent, Status>>;

    async fn prefill(
        &self,
        _call: Request<v1::PrefillRequest>,
    ) -> Result<Reply<Self::PrefillStream>, Status> {
        let kv = v1::KvTransfer { transport: "none".into(), ..Default::default() };
        let reply = v1::PrefillReply { timing: Some(Default::default()), kv: Some(kv), load: None };
        let last = Ok(v1::PrefillEvent { reply: Some(reply) });
        Ok(Reply::new(futures::stream::iter([last]).boxed()))
    }
}

async fn serve_tandem(router: &str, gap: Duration) -> Result<(), Failure> {
    let registry = RemoteRegistry::new(router);
    let (_load, load) = watch::channel(Load { free_blocks: 1 << 20, ..Load::default() });
    let (_ready, ready) = watch::channel(true);
    let mut memberships = Vec::new();
    let mut servers = Vec::new();
    for role in [Role::Prefill, Role::Decode] {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let mut routes = RoutesBuilder::default();
        routes.add_service(
            DecodeWorkerServer::new(Mock { gap }).max_decoding_message_size(proto::MAX_MESSAGE_BYTES),
        );
        routes.add_service(
            PrefillWorkerServer::new(Mock { gap }).max_decoding_message_size(proto::MAX_MESSAGE_BYTES),
        );
        let routes = proto::server::with_health_and_reflection(routes, ready.clone()).await?;
        let server = tonic::transport::Server::builder().add_routes(routes);
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        servers.push(tokio::spawn(server.serve_with_incoming(incoming)));
        let member = Member {
            worker: format!("mock-{}", role.name()),
            role,
            address,
            model: "mock".into(),
            compat_hash: "mock".into(),
            incarnation: cluster::member::new_incarnation(),
            transports: vec!["tcp".into()],
            tls: false,
            zone: String::new(),
            block_tokens: 16,
            total_blocks: 1 << 20,
            max_context_tokens: 1 << 20,
            max_sequences: 1 << 16,
            auto_role: false,
        };
        memberships.push(registry.join(member, load.clone()).await?);
    }
    println!("joined");
    for server in servers {
        server.await??;
    }
    drop(memberships);
    Ok(())
}
