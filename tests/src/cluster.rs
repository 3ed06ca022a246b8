//! A cluster in this process: the real router, workers, transport and registry, each on its own port.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cluster::{Join, MemoryRegistry, Watch};
use constraint::Vocabulary;
use decode_worker::DecodeConfig;
use decode_worker::scheduler::LocalPrefill;
use engine::cpu::{CpuEngine, CpuOptions};
use engine::kv::pool::BlockPool;
use engine::model::ModelConfig;
use engine::{Engine, KvDtype};
use futures::future::BoxFuture;
use prefill_worker::PrefillConfig;
use proto::v1::inference_client::InferenceClient;
use proto::v1::{self, generate_response::Event};
use router::placement::Policy;
use router::status::Slo;
use router::text::model::TextModel;
use router::{Registry, RouterConfig};
use telemetry::trace::Tracer;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;
use worker::WorkerConfig;
use worker::transport::{KvWire, TransportChoice, TransportConfig};

use crate::gate::Gate;

/// What to build.
#[derive(Clone)]
pub struct Spec {
    /// Prefill workers.
    pub prefill: usize,
    /// Decode workers.
    pub decode: usize,
    /// Local or remote prefill.
    pub policy: Policy,
    /// Tokens in one step of a prefill worker: its chunk size.
    pub prefill_step: usize,
    /// The same of a decode worker.
    pub decode_step: usize,
    /// How prompts share steps with decoding sequences.
    pub local_prefill: LocalPrefill,
    /// How the pools of prefill and of decode workers hold KV: tokens of a block, element type.
    pub forms: [(usize, KvDtype); 2],
    /// Blocks of each pool.
    pub kv_blocks: usize,
    /// Sequences at once on one worker.
    pub max_sequences: usize,
    /// Sequences waiting on one worker.
    pub max_waiting: usize,
    /// Prompts that one prefill worker takes, waiting ones included, when not as many as sequences.
    pub prefill_slots: Option<usize>,
    /// Requests at once in the router.
    pub max_running: usize,
    /// Requests queued in the router.
    pub max_queued: usize,
    /// Longest wait for a place.
    pub queue_patience: Duration,
    /// Longest silence of a worker's stream.
    pub worker_silence: Duration,
    /// Longest time without a step or a byte.
    pub progress_timeout: Duration,
    /// Which ways KV takes; through sockets unless a test says otherwise.
    pub transport: TransportConfig,
    /// As what prefill and decode workers want KV to travel over TCP.
    pub wires: [KvWire; 2],
    /// Engines that can be held, by worker.
    pub gates: BTreeMap<String, Gate>,
    /// Where spans go.
    pub tracer: Tracer,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            prefill: 1,
            decode: 1,
            policy: Policy::Remote,
            prefill_step: 512,
            decode_step: 256,
            local_prefill: LocalPrefill::Priority,
            forms: [(16, KvDtype::Bf16); 2],
            kv_blocks: 600,
            max_sequences: 64,
            max_waiting: 64,
            prefill_slots: None,
            max_running: 256,
            max_queued: 256,
            queue_patience: Duration::from_secs(60),
            worker_silence: Duration::from_secs(10),
            progress_timeout: Duration::from_secs(30),
            transport: TransportConfig { choice: TransportChoice::Tcp, ..TransportConfig::default() },
            wires: [KvWire::Plain; 2],
            gates: BTreeMap::new(),
            tracer: Tracer::default(),
        }
    }
}

/// A worker of the cluster.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its block pool, to count what is left.
    pub pool: Arc<BlockPool>,
    /// Its address.
    pub address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<Result<(), String>>,
}

impl Node {
    /// Drains it and waits for its end.
    pub async fn drain(self) -> Result<(), String> {
        self.stop.cancel();
        self.task.await.unwrap()
    }
}

/// A running cluster.
pub struct Cluster {
    /// Prefill workers.
    pub prefill: Vec<Node>,
    /// Decode workers.
    pub decode: Vec<Node>,
    /// The router's address.
    pub address: SocketAddr,
    /// A client of the router.
    pub client: InferenceClient<Channel>,
    stop: CancellationToken,
    router: JoinHandle<Result<(), router::RunError>>,
}

/// The finished output of one request.
#[derive(Debug, Clone, Default)]
pub struct Output {
    /// Token ids by choice.
    pub tokens: Vec<Vec<u32>>,
    /// Text by choice.
    pub text: Vec<String>,
    /// Log-probabilities by choice, when asked for.
    pub logprobs: Vec<Vec<v1::TokenLogprob>>,
    /// Function calls by choice.
    pub calls: Vec<Vec<v1::ToolCall>>,
    /// The last message.
    pub complete: v1::Complete,
}

impl Cluster {
    /// In memory, on the model folder.
    pub async fn start(model: &Path, spec: &Spec) -> Self {
        let registry = MemoryRegistry::new();
        Self::start_on(model, spec, Arc::new(registry.clone()), Arc::new(registry)).await
    }

    /// On any registry.
    pub async fn start_on(model: &Path, spec: &Spec, join: Arc<dyn Join>, watch: Arc<dyn Watch>) -> Self {
        let stop = CancellationToken::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = RouterConfig {
            max_running: spec.max_running,
            max_waiting: spec.max_queued,
            max_connections: 4096,
            prefix_index_bytes: 1 << 20,
            queue_patience: spec.queue_patience,
            worker_silence: spec.worker_silence,
            policy: spec.policy,
            drain_deadline: Duration::from_secs(5),
            slo: Slo::default(),
        };
        let text = TextModel::load(model, "tiny").unwrap();
        let tracer = spec.tracer.clone();
        let deps = router::Deps {
            text,
            registry: Registry::Watched(watch),
            tracer,
            tls: None,
            cluster_tls: None,
            expiry: tls::Expiry::default(),
            keys: None,
        };
        let router = tokio::spawn(router::run(config, deps, listener, stop.clone()));
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let client = InferenceClient::new(channel).max_decoding_message_size(proto::MAX_MESSAGE_BYTES);
        let mut cluster = Self { prefill: Vec::new(), decode: Vec::new(), address, client, stop, router };
        for number in 0..spec.prefill {
            let node =
                cluster.node(model, spec, format!("prefill-{number}"), spec.prefill_step, &join, true).await;
            cluster.prefill.push(node);
        }
        for number in 0..spec.decode {
            let node =
                cluster.node(model, spec, format!("decode-{number}"), spec.decode_step, &join, false).await;
            cluster.decode.push(node);
        }
        cluster.wait_for(spec.prefill + spec.decode).await;
        cluster
    }

    /// Waits until the router knows that many ready workers.
    pub async fn wait_for(&mut self, workers: usize) {
        let ready = |statuses: &[v1::WorkerStatus]| statuses.iter().filter(|w| w.state == "ready").count();
        for _ in 0..1500 {
            let known =
                self.client.list_workers(v1::ListWorkersRequest {}).await.unwrap().into_inner().workers;
            if known.len() == workers && ready(&known) == workers {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the fleet never had {workers} workers");
    }

    /// One more worker.
    pub async fn node(
        &self,
        model: &Path,
        spec: &Spec,
        name: String,
        step_tokens: usize,
        join: &Arc<dyn Join>,
        is_prefill: bool,
    ) -> Node {
        let (block_tokens, kv_dtype) = spec.forms[usize::from(!is_prefill)];
        let options = CpuOptions {
            kv_blocks: spec.kv_blocks,
            block_tokens,
            kv_dtype,
            threads: 1,
            max_batch_tokens: step_tokens.max(spec.max_sequences),
            ..CpuOptions::default()
        };
        let mut engine: Box<dyn Engine> = Box::new(CpuEngine::load(model, options).unwrap());
        if let Some(gate) = spec.gates.get(&name) {
            engine = gate.before(engine);
        }
        let pool = BlockPool::new(spec.kv_blocks as u32);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let (max_sequences, max_waiting) = match spec.prefill_slots {
            Some(slots) if is_prefill => (slots, 0),
            _ => (spec.max_sequences, spec.max_waiting),
        };
        let config = ModelConfig::load(model).unwrap();
        let worker = WorkerConfig {
            name: name.clone(),
            model: "tiny".into(),
            advertise: None,
            zone: String::new(),
            compat_hash: config.compat_hash(model, "test").unwrap(),
            incarnation: cluster::member::new_incarnation(),
            max_sequences,
            max_waiting,
            step_tokens,
            progress_timeout: spec.progress_timeout,
            lease: Duration::from_secs(10),
            drain_deadline: Duration::from_secs(30),
            transport: TransportConfig {
                wire: spec.wires[usize::from(!is_prefill)],
                ..spec.transport.clone()
            },
            next_role: None,
            tls: None,
        };
        let registry = Arc::clone(join);
        let vocabulary = Vocabulary::of(model, config.vocab, &config.eos);
        let ended: BoxFuture<'static, Result<(), String>> = if is_prefill {
            let config = PrefillConfig { worker, max_prompts: 16, convert_bytes: 3 << 20 };
            let deps = worker::Deps {
                engine,
                pool: Arc::clone(&pool),
                registry,
                vocabulary,
                tracer: spec.tracer.clone(),
                expiry: tls::Expiry::default(),
            };
            let run = prefill_worker::run(config, deps, listener, stop.clone());
            Box::pin(async move { run.await.map_err(|e| e.to_string()) })
        } else {
            let config = DecodeConfig {
                worker,
                reservation: Duration::from_secs(60),
                prefill: spec.local_prefill,
                chunk_tokens: step_tokens,
                // Nothing of a debug build keeps it; what the limit does is the scheduler's own test.
                itl_limit: Duration::from_secs(5),
            };
            let deps = worker::Deps {
                engine,
                pool: Arc::clone(&pool),
                registry,
                vocabulary,
                tracer: spec.tracer.clone(),
                expiry: tls::Expiry::default(),
            };
            let run = decode_worker::run(config, deps, listener, stop.clone());
            Box::pin(async move { run.await.map_err(|e| e.to_string()) })
        };
        Node { name, pool, address, stop, task: tokio::spawn(ended) }
    }

    /// Sends a request and collects its output.
    pub async fn generate(&self, request: v1::GenerateRequest) -> Result<Output, Status> {
        collect(self.client.clone(), request).await
    }

    /// Waits until no block is in use anywhere and every pool adds up.
    pub async fn assert_nothing_leaked(&self) {
        for node in self.prefill.iter().chain(&self.decode) {
            let mut counts = node.pool.counts();
            for _ in 0..500 {
                if counts.free + counts.cached == counts.total {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
                counts = node.pool.counts();
            }
            assert_eq!(counts.free + counts.cached, counts.total, "{} leaks: {counts:?}", node.name);
            node.pool.check().unwrap();
        }
    }

    /// Drains everything; every part must end well.
    pub async fn stop(self) {
        self.stop.cancel();
        self.router.await.unwrap().unwrap();
        for node in self.prefill.into_iter().chain(self.decode) {
            node.drain().await.unwrap();
        }
    }
}

/// Runs a request to its end.
pub async fn collect<S>(
    mut client: InferenceClient<S>,
    request: v1::GenerateRequest,
) -> Result<Output, Status>
where
    S: tonic::client::GrpcService<tonic::body::Body>,
    S::Error: Into<tonic::codegen::StdError>,
    S::ResponseBody: tonic::codegen::Body<Data = tonic::codegen::Bytes> + Send + 'static,
    <S::ResponseBody as tonic::codegen::Body>::Error: Into<tonic::codegen::StdError> + Send,
{
    let n = request.sampling.as_ref().and_then(|s| s.n).unwrap_or(1) as usize;
    let mut stream = client.generate(request).await?.into_inner();
    let mut output = Output {
        tokens: vec![Vec::new(); n],
        text: vec![String::new(); n],
        logprobs: vec![Vec::new(); n],
        calls: vec![Vec::new(); n],
        ..Output::default()
    };
    while let Some(message) = stream.message().await? {
        match message.event {
            Some(Event::Chunk(chunk)) => {
                output.tokens[chunk.index as usize].extend(chunk.token_ids);
                output.text[chunk.index as usize].push_str(&chunk.text);
                output.logprobs[chunk.index as usize].extend(chunk.logprobs);
                output.calls[chunk.index as usize].extend(chunk.tool_calls);
            }
            Some(Event::Complete(complete)) => {
                output.complete = complete;
                return Ok(output);
            }
            None => {}
        }
    }
    Err(Status::internal("the stream ended without its last message"))
}

/// A request for these tokens.
pub fn request(prompt: &[u32], sampling: v1::SamplingParams) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::TokenIds(v1::TokenIds { ids: prompt.to_vec() })),
        sampling: Some(sampling),
        ..v1::GenerateRequest::default()
    }
}

/// Greedy, that many tokens.
pub fn greedy(max_tokens: u32) -> v1::SamplingParams {
    v1::SamplingParams {
        temperature: Some(0.0),
        max_tokens: Some(max_tokens),
        ignore_eos: Some(true),
        ..v1::SamplingParams::default()
    }
}
