//! What every worker is told, and the member it becomes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cluster::{Join, Member, Role};
use constraint::Vocabulary;
use engine::kv::pool::BlockPool;
use engine::{Engine, EngineInfo, KvLayout};
use kv_transport::Identity;
use telemetry::trace::Tracer;
use tls::{ClusterFiles, Expiry};
use tokio::sync::{Semaphore, watch};

use crate::request::Limits;
use crate::transport::{TransportConfig, Ways};

/// Largest block, in tokens.
pub const MAX_BLOCK_TOKENS: usize = 256;

/// What a worker works with.
pub struct Deps {
    /// The model on its device.
    pub engine: Box<dyn Engine>,
    /// Who owns which block of the engine's KV pool.
    pub pool: Arc<BlockPool>,
    /// Where to become a member.
    pub registry: Arc<dyn Join>,
    /// The bytes of the model's tokens, for constrained output.
    pub vocabulary: Vocabulary,
    /// Where spans of requests go.
    pub tracer: Tracer,
    /// How long this process's certificates last.
    pub expiry: Expiry,
}

/// Settings that both kinds of worker share.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Unique name in the cluster.
    pub name: String,
    /// The served model's name.
    pub model: String,
    /// Address that others reach this worker at, host:port; the bound one when empty.
    pub advertise: Option<String>,
    /// Failure zone, free text.
    pub zone: String,
    /// Hash over everything that must be equal between two workers of one request.
    pub compat_hash: String,
    /// This start of the process.
    pub incarnation: u64,
    /// Most sequences at once (running or reserved). Default 256.
    pub max_sequences: usize,
    /// Most sequences waiting. Default 1024.
    pub max_waiting: usize,
    /// Most tokens in one engine step.
    pub step_tokens: usize,
    /// No byte of a transfer, or no engine step while there is work, for this long is a failure. Longer than the
    /// slowest layer of a chunk computes, since nothing moves meanwhile. Default 30 s.
    pub progress_timeout: Duration,
    /// A process that stood still for longer than this was given up by the others. Default 10 s.
    pub lease: Duration,
    /// How long a drain may take before what is left is cut. Default 30 s.
    pub drain_deadline: Duration,
    /// Which ways KV takes.
    pub transport: TransportConfig,
    /// Where the role that an operator or the planner wants next is told; nowhere, when the role is fixed.
    pub next_role: Option<Arc<watch::Sender<Role>>>,
    /// Certificates, where everything between router and workers is encrypted.
    pub tls: Option<ClusterFiles>,
}

impl WorkerConfig {
    /// The address that others use.
    pub fn address(&self, bound: SocketAddr) -> String {
        match &self.advertise {
            Some(address) => address.clone(),
            None => bound.to_string(),
        }
    }

    /// Who it is to the KV transport.
    pub fn identity(&self) -> Identity {
        Identity { worker: self.name.clone(), incarnation: self.incarnation }
    }

    /// Shows what this process is.
    pub fn tell(&self, metrics: &telemetry::Metrics, role: Role) {
        let version = env!("CARGO_PKG_VERSION");
        metrics.info(&[("role", role.name()), ("model", &self.model), ("version", version)]);
    }

    /// What its requests are checked against.
    pub fn limits(&self, layout: KvLayout, info: &EngineInfo, vocabulary: Vocabulary) -> Arc<Limits> {
        Arc::new(Limits {
            vocab_size: info.vocab_size,
            max_context_tokens: info.max_context_tokens,
            layout,
            compat_hash: self.compat_hash.clone(),
            incarnation: self.incarnation,
            vocabulary,
        })
    }

    /// Room for what may run and wait.
    pub fn slots(&self) -> Arc<Semaphore> {
        Arc::new(Semaphore::new(self.max_sequences + self.max_waiting))
    }

    /// The member that this worker registers as.
    pub fn member(
        &self,
        role: Role,
        address: &str,
        layout: &KvLayout,
        info: &EngineInfo,
        ways: &Ways,
    ) -> Member {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Member {
            worker: self.name.clone(),
            role,
            address: address.to_owned(),
            model: self.model.clone(),
            compat_hash: self.compat_hash.clone(),
            incarnation: self.incarnation,
            transports: ways.names(),
            tls: self.tls.is_some(),
            zone: self.zone.clone(),
            block_tokens: count(layout.block_tokens),
            total_blocks: count(layout.blocks),
            max_context_tokens: count(info.max_context_tokens),
            max_sequences: count(self.max_sequences),
            auto_role: self.next_role.is_some(),
        }
    }
}
