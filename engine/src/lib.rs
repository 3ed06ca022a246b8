//! Token ids in, token ids out, on one device, with paged KV.
//!
//! No async, no network, no text. A worker owns one [`Engine`] on one thread, describes each step as a
//! [`Batch`] of ragged [`Segment`]s and gets sampled tokens back. The same call serves prefill chunks,
//! decode steps and mixtures of both, on every backend.

pub mod batch;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod fit;
pub mod import;
pub mod kv;
mod mapped;
pub mod model;
pub mod pace;
pub mod profile;
pub mod roofline;
pub mod sampling;
pub mod shared;
pub mod sim;

pub use batch::{Batch, Constraint, SampleRequest, Sampled, SamplingParams, Segment};
pub use error::EngineError;
pub use kv::layout::{KvDtype, KvLayout};

use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The memory that holds the KV pool, shared between the engine (writes it), the transport (moves it)
/// and the checksums (guard it).
pub trait KvMemory: Send + Sync {
    /// Shape and strides of the pool.
    fn layout(&self) -> &KvLayout;
    /// Start address of the pool in host memory, if the pool lives there. The pool is
    /// `layout().total_bytes()` long and stays valid and unmoved for as long as this value lives.
    fn host_address(&self) -> Option<*mut u8>;
    /// The file that the memory at `host_address` is a mapping of, from its beginning; other processes of this host may be
    /// handed it to read. None where the memory is in no file.
    fn shared_file(&self) -> Option<Arc<OwnedFd>> {
        None
    }
    /// The pool on its device, for pools of other processes of this host to copy from and into. None where it is on none, or
    /// cannot be shared.
    fn on_device(self: Arc<Self>) -> Option<Arc<dyn DeviceKv>> {
        None
    }
    /// CRC-32C of one block of one layer, as it stands in host memory now.
    fn checksum(&self, layer: usize, block: u32) -> u32;
    /// CRC-32C of one block of one layer, as close to where it was computed as the device can: what a push sends
    /// along. Differs from [`KvMemory::checksum`] only if the way from the device to host memory broke it.
    fn source_checksum(&self, layer: usize, block: u32) -> u32 {
        self.checksum(layer, block)
    }
}

/// A pool in device memory that is a file, so that other processes of this host can map it.
pub trait DeviceKv: Send + Sync {
    /// A file that stands for the memory, which lives as long as somebody holds or maps it.
    fn file(&self) -> Result<OwnedFd, EngineError>;
    /// Maps another pool, of at least `bytes` bytes, beside this one. An error where the devices cannot reach each other, or the
    /// file is something else.
    fn open(self: Arc<Self>, file: OwnedFd, bytes: usize) -> Result<Arc<dyn PeerKv>, EngineError>;
    /// How network cards may get at it. An error where nothing that they wrote could be used.
    fn expose(&self) -> Result<Exposed, EngineError>;
    /// CRC-32C of blocks of layers at these offsets, as they stand on the device behind everything that network cards had
    /// written when this was called. Blocks until it is done.
    fn sums(&self, cells: &[usize], cell_bytes: usize) -> Result<Vec<u32>, EngineError>;
}

/// The ways to register a device's memory with a network card; each, or why it is closed.
pub struct Exposed {
    /// Where it begins, to the device.
    pub address: u64,
    /// As a dmabuf, from the first byte on.
    pub dmabuf: Result<OwnedFd, String>,
    /// By its address, with a module that tells cards what that means.
    pub peermem: Result<(), String>,
}

/// Another process's pool of the same layout, mapped.
pub trait PeerKv: Send + Sync {
    /// Copies blocks of layers, each from an offset in the other pool's bytes to one in ours, and makes their CRC-32C as they
    /// stand on this device then, in the same order. Blocks until both is done.
    fn copy(&self, cells: &[(usize, usize)], cell_bytes: usize) -> Result<Vec<u32>, EngineError>;
}

/// How blocks come to where steps read them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loading {
    /// They are there.
    Done,
    /// They are under way, as this load.
    Queued(u64),
}

/// What an engine is, for logs, membership and compatibility checks.
#[derive(Debug, Clone)]
pub struct EngineInfo {
    /// `cpu`, `cuda` or `sim`.
    pub backend: &'static str,
    /// The device in words, e.g. `cpu (avx512_bf16, 2 threads)`.
    pub device: String,
    /// Longest sequence, prompt and output together, in tokens.
    pub max_context_tokens: usize,
    /// Vocabulary size: every token id is below it.
    pub vocab_size: usize,
}

/// One model on one device with one KV pool. Owned by one thread; never blocks on anything but compute.
pub trait Engine: Send {
    /// What this engine is.
    fn info(&self) -> &EngineInfo;

    /// The KV pool's memory.
    fn kv(&self) -> Arc<dyn KvMemory>;

    /// Runs one step. For each segment: writes the KV of `tokens` into its blocks, and, when
    /// `samples` is not empty, computes the logits of the last token and draws one token per request.
    ///
    /// `on_layer(l)` is called once per layer, in order, as soon as the KV of layer `l` is final for
    /// every segment of the batch: a prefill worker pushes from there while later layers compute.
    ///
    /// Returns, per segment, one [`Sampled`] per entry of its `samples` (empty for none). On an error
    /// nothing was sampled, and the KV of the batch's tokens is undefined.
    fn forward(
        &mut self,
        batch: &Batch<'_>,
        on_layer: &mut dyn FnMut(usize),
    ) -> Result<Vec<Vec<Sampled>>, EngineError>;

    /// The raw logits of the last token of each segment, f32 `[segments, vocab]`; otherwise like
    /// `forward`. For tests and quality measurements.
    fn forward_logits(&mut self, batch: &Batch<'_>) -> Result<Vec<Vec<f32>>, EngineError>;

    /// Copies whole blocks, all layers, `(from, to)`: a forked sequence gets its own last block.
    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), EngineError>;

    /// Brings whole blocks, all layers, to the host side of the pool, for a transport to read. Nothing to do
    /// where the pool is in host memory. A prefill tuning does it by itself, before `on_layer`.
    fn publish_blocks(&mut self, _blocks: &[u32]) -> Result<(), EngineError> {
        Ok(())
    }

    /// The reverse, after a transport has written the host side: begins to bring the blocks to where steps read them, beside
    /// the steps. Until it is done they are neither used nor given away; then their [`KvMemory::source_checksum`] speaks
    /// of what steps will read. Nothing to do where the pool is in host memory. `on_device`: what came to the device directly and
    /// is not on the host side, layer after layer in the order of the blocks; empty where nothing did.
    fn begin_load(&mut self, _blocks: &[u32], _on_device: &[bool]) -> Result<Loading, EngineError> {
        Ok(Loading::Done)
    }

    /// Whether a load has ended. Never blocks.
    fn is_loaded(&mut self, _load: u64) -> Result<bool, EngineError> {
        Ok(true)
    }
}
