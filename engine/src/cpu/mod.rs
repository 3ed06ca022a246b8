//! The engine on CPU cores: bf16 weights and f32 arithmetic, or INT8; AVX-512, AVX2 or plain code.

mod arena;
mod buffers;
mod ceilings;
mod forward;
mod marks;
mod network;
mod plan;
mod region;
mod simd;
mod team;

use std::path::Path;
use std::sync::Arc;

use self::buffers::Buffers;
pub use self::ceilings::Peak;
use self::forward::Step;
use self::marks::Marks;
use self::network::Network;
use self::plan::Plan;
use self::region::KvRegion;
use self::simd::Kernels;
use self::simd::int8::{GROUP, Kernels8, MOST_INPUTS};
use self::simd::level::Level;
use self::team::Team;
use crate::model::quantise::kind_of;
use crate::model::{ModelConfig, Quantisation, RandomWeights, WeightSource, Weights};
use crate::profile::Span;
use crate::roofline::Ceilings;
use crate::sampling::sample;
use crate::{Batch, Engine, EngineError, EngineInfo, KvDtype, KvLayout, KvMemory, Sampled};

/// Size of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuOptions {
    /// Blocks of the KV pool.
    pub kv_blocks: usize,
    /// Tokens per block.
    pub block_tokens: usize,
    /// Element type of the KV pool.
    pub kv_dtype: KvDtype,
    /// Threads that compute, the calling one included. 0 means one per available core.
    pub threads: usize,
    /// Most tokens of one step.
    pub max_batch_tokens: usize,
    /// Weights of layers and head are rounded to eight bits, activations too in every step; INT8 only.
    pub quantise: Option<Quantisation>,
    /// INT8 as the CUDA engine has it, so that the two can be compared: activations with one scale per token, nothing
    /// turned, the head in bf16.
    pub per_token: bool,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self {
            kv_blocks: 1024,
            block_tokens: 16,
            kv_dtype: KvDtype::Bf16,
            threads: 0,
            max_batch_tokens: 2048,
            quantise: None,
            per_token: false,
        }
    }
}

/// A model on CPU cores. See [`Engine`].
///
/// A sequence's tokens depend on its own tokens only: not on the batch around it, the chunks its prompt came
/// in, the number of threads, or the CPU's instruction set.
pub struct CpuEngine {
    config: ModelConfig,
    network: Network,
    kv: Arc<KvRegion>,
    level: Level,
    kernels: &'static Kernels,
    kernels8: &'static Kernels8,
    team: Team,
    buffers: Buffers,
    info: EngineInfo,
    max_batch_tokens: usize,
}

impl CpuEngine {
    /// Loads a Hugging Face folder.
    pub fn load(dir: &Path, options: CpuOptions) -> Result<Self, EngineError> {
        let config = ModelConfig::load(dir)?;
        let kind = network::check(&config, dir, options.quantise)?;
        Self::build(config, &Weights::open(dir)?, kind, options)
    }

    /// A network of this shape with weights near N(0, 0.02): for measuring without files.
    pub fn from_random(config: ModelConfig, seed: u64, options: CpuOptions) -> Result<Self, EngineError> {
        // What a checkpoint of this shape is stored in is what is drawn and then rounded here.
        let wanted = kind_of(options.quantise, config.quantised)?;
        let config = ModelConfig { quantised: None, ..config };
        let kind = network::check(&config, Path::new("(random)"), wanted)?;
        Self::build(config, &RandomWeights { seed }, kind, options)
    }

    fn build(
        config: ModelConfig,
        source: &dyn WeightSource,
        kind: Option<Quantisation>,
        options: CpuOptions,
    ) -> Result<Self, EngineError> {
        let layout = KvLayout {
            layers: config.layers,
            blocks: options.kv_blocks,
            kv_heads: config.kv_heads,
            block_tokens: options.block_tokens,
            head_dim: config.head_dim,
            dtype: options.kv_dtype,
        };
        if options.max_batch_tokens == 0 {
            return Err(EngineError::Unsupported("max_batch_tokens is 0".into()));
        }
        let kv = Arc::new(KvRegion::new(layout)?);
        let level = Level::chosen()?;
        let (kernels, kernels8) = (Kernels::best(level), Kernels8::best(level));
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads.min(256),
        };
        let team =
            Team::new(threads).map_err(|e| EngineError::Device(format!("cannot start threads: {e}")))?;
        let info = EngineInfo {
            backend: "cpu",
            device: match kind {
                None => format!("cpu ({}, {threads} threads)", kernels.name),
                Some(_) => format!("cpu ({}, int8 by {}, {threads} threads)", kernels.name, kernels8.name),
            },
            max_context_tokens: config.max_context,
            vocab_size: config.vocab,
        };
        let group = if options.per_token { MOST_INPUTS } else { GROUP };
        // What a checkpoint has in eight bits cannot be turned, and its head was left alone on purpose.
        let turn = config.quantised.is_none() && !options.per_token;
        let buffers = Buffers::new(&config, options.max_batch_tokens, kind.map(|_| group))?;
        let network = Network::load(&config, source, kind, turn)?;
        tracing::debug!(device = info.device, parameters = config.parameters(), "engine ready");
        let max_batch_tokens = options.max_batch_tokens;
        Ok(Self { config, network, kv, level, kernels, kernels8, team, buffers, info, max_batch_tokens })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of weights that one decode step reads.
    pub fn streamed_bytes(&self) -> usize {
        self.network.streamed_bytes()
    }

    /// What the cores reach: instructions that products could be made of, the first that of bf16 networks here.
    pub fn peaks(&mut self) -> Vec<Peak> {
        ceilings::peaks(&mut self.team, self.level)
    }

    /// The rates that bound this network here: of the instructions that its products are made of, and of reading.
    pub fn ceilings(&mut self) -> Result<Ceilings, EngineError> {
        let used = if self.network.int8 { "int8" } else { "f32" };
        let peak = self.peaks().into_iter().find(|peak| peak.name.starts_with(used));
        Ok(Ceilings {
            flops_per_second: peak.map_or(0.0, |peak| peak.ops_per_second),
            bytes_per_second: ceilings::read(&mut self.team)?,
        })
    }

    /// Runs a batch up to its logits and says where the time went.
    pub fn profile(&mut self, batch: &Batch<'_>) -> Result<Vec<Span>, EngineError> {
        let mut marks = Marks::default();
        self.run(batch, false, Some(&mut marks), &mut |_| {})?;
        Ok(marks.spans())
    }

    /// Logits of the wanted segments, with the segments' indices.
    fn run(
        &mut self,
        batch: &Batch<'_>,
        all_logits: bool,
        marks: Option<&mut Marks>,
        on_layer: &mut dyn FnMut(usize),
    ) -> Result<Vec<(usize, Vec<f32>)>, EngineError> {
        batch.validate(self.kv.layout(), &self.info)?;
        let tokens = batch.tokens();
        if tokens > self.max_batch_tokens {
            let most = self.max_batch_tokens;
            return Err(EngineError::BadBatch(format!("{tokens} tokens in a step of at most {most}")));
        }
        let plan = Plan::new(batch, self.kv.layout(), self.config.group(), all_logits);
        let mut step = Step {
            config: &self.config,
            network: &self.network,
            kv: &self.kv,
            kernels: self.kernels,
            kernels8: self.kernels8,
            team: &mut self.team,
            buffers: &mut self.buffers,
            marks,
        };
        let logits = step.run(&plan, on_layer);
        Ok(plan.wanted.iter().map(|wanted| wanted.1).zip(logits).collect())
    }
}

impl Engine for CpuEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn kv(&self) -> Arc<dyn KvMemory> {
        Arc::clone(&self.kv) as Arc<dyn KvMemory>
    }

    fn forward(
        &mut self,
        batch: &Batch<'_>,
        on_layer: &mut dyn FnMut(usize),
    ) -> Result<Vec<Vec<Sampled>>, EngineError> {
        let mut sampled = vec![Vec::new(); batch.segments.len()];
        for (index, mut logits) in self.run(batch, false, None, on_layer)? {
            sampled[index] = match batch.segments[index].samples {
                [only] => vec![sample(&mut logits, only)],
                several => several.iter().map(|request| sample(&mut logits.clone(), request)).collect(),
            };
        }
        Ok(sampled)
    }

    fn forward_logits(&mut self, batch: &Batch<'_>) -> Result<Vec<Vec<f32>>, EngineError> {
        let logits = self.run(batch, true, None, &mut |_| {})?;
        Ok(logits.into_iter().map(|(_, logits)| logits).collect())
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), EngineError> {
        let blocks = self.kv.layout().blocks;
        if let Some(pair) = pairs.iter().find(|(from, to)| (*from).max(*to) as usize >= blocks) {
            return Err(EngineError::BadBatch(format!("copy of blocks {pair:?}, the pool has {blocks}")));
        }
        for &(from, to) in pairs {
            self.kv.copy(from, to);
        }
        Ok(())
    }
}
