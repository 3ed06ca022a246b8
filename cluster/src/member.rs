//! What a worker says of itself. JSON in the registry, readable with `etcdctl get --prefix`.

use serde::{Deserialize, Serialize};

/// Which half of a request a worker runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Prompts to KV.
    Prefill,
    /// KV to tokens.
    Decode,
}

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "prefill" => Ok(Role::Prefill),
            "decode" => Ok(Role::Decode),
            other => Err(format!("must be prefill or decode, not {other:?}")),
        }
    }
}

impl Role {
    /// `prefill` or `decode`.
    pub fn name(self) -> &'static str {
        match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
        }
    }
}

/// What a worker is. Fixed for one incarnation, but for `draining`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Unique name in the cluster; survives restarts.
    pub worker: String,
    /// Its pool.
    pub role: Role,
    /// The one address, host:port: gRPC and KV connections.
    pub address: String,
    /// The served model's name.
    pub model: String,
    /// Hash over model, dtype, layout and version; only equal ones are paired.
    pub compat_hash: String,
    /// One start of the process; a later start is larger.
    pub incarnation: u64,
    /// KV transports it accepts, best first.
    pub transports: Vec<String>,
    /// Whether it is reached over TLS only.
    #[serde(default)]
    pub tls: bool,
    /// Failure or locality zone, free text.
    #[serde(default)]
    pub zone: String,
    /// Tokens per KV block.
    pub block_tokens: u32,
    /// KV blocks in its pool.
    pub total_blocks: u32,
    /// Longest sequence in tokens.
    pub max_context_tokens: u32,
    /// Sequences that it runs at once, at most.
    pub max_sequences: u32,
    /// Its role may change, each time with a new incarnation.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub auto_role: bool,
}

/// How busy a worker is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Load {
    /// Prompt tokens accepted and not yet computed.
    pub queued_tokens: u64,
    /// Sequences being computed.
    pub running: u32,
    /// Sequences accepted and not yet started.
    pub waiting: u32,
    /// Blocks free or only cached.
    pub free_blocks: u32,
    /// Measured over the last seconds of work; 0 before any.
    pub tokens_per_second: f64,
    /// Finishing what it has, taking nothing new.
    #[serde(default)]
    pub draining: bool,
    /// Its engine has work and makes no steps.
    #[serde(default)]
    pub stuck: bool,
}

impl Load {
    /// Takes over new numbers; what operators and the watchdog said stays. True when anything changed.
    pub fn update(&mut self, numbers: Self) -> bool {
        let new = Self { draining: self.draining, stuck: self.stuck, ..numbers };
        let changed = *self != new;
        *self = new;
        changed
    }

    /// Whether the worker takes requests.
    pub fn is_open(&self) -> bool {
        !self.draining && !self.stuck
    }
}

/// A new incarnation number: milliseconds since 1970, so a later start is larger.
pub fn new_incarnation() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |d| u64::try_from(d.as_millis()).unwrap_or(1))
}
