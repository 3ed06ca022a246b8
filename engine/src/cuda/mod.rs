//! The engine on an NVIDIA GPU: bf16 weights and KV, tensor cores, CUDA graphs.
//!
//! CUDA is loaded at run time. Prefill is bound by arithmetic: cuBLASLt products chosen by measurement, tiled attention
//! on the tensor cores, several prompts in one step. Decode is bound by memory: one captured graph per batch
//! size, attention split along the keys. Both are the same step; [`Tuning`] says what is prepared at start-up.

mod attention;
mod blas;
mod buffers;
mod bulk;
mod ceilings;
mod copies;
mod draws;
mod driver;
mod exchange;
mod fixed;
mod gemm;
pub mod gpudirect;
mod graphs;
mod kernels;
mod libraries;
mod loads;
mod mapping;
mod measuring;
mod megakernel;
mod memory;
mod network;
mod options;
mod plan;
mod pool;
mod prepare;
mod profile;
mod publish;
mod step;
mod tensor_map;
mod thin;
mod wide;

use std::path::Path;
use std::sync::Arc;

pub use self::ceilings::Ceilings;
pub use self::copies::Copied;
use self::draws::{Draws, Source};
use self::driver::{Device, Event, Pinned, Stream};
use self::fixed::Fixed;
use self::gemm::Gemms;
use self::graphs::Graphs;
use self::kernels::Kernels;
use self::loads::Loads;
use self::megakernel::Megakernel;
use self::network::{Loader, Network, Origin};
pub use self::options::{Attention, CudaOptions};
use self::options::{capacity, check, check_memory};
use self::plan::{List, Plan};
use self::pool::{Blocks, DevicePool};
use self::profile::Profile;
use self::publish::Publisher;
use self::step::Step;
use crate::model::quantise::kind_of;
use crate::model::{ModelConfig, RandomWeights, WeightSource, Weights};
use crate::sampling::sample;
use crate::{Batch, Engine, EngineError, EngineInfo, KvDtype, KvLayout, KvMemory, Loading, Sampled};

/// Rows of logits that come to the host at once, for draws that the device does not make.
const HOST_LOGITS: usize = 32;

/// A model on a GPU. See [`Engine`].
///
/// Products are not batch-invariant: a token's logits may differ in the last bits with the batch around it, as with
/// other GPU engines.
pub struct CudaEngine {
    fixed: Fixed,
    gemms: Gemms,
    graphs: Graphs,
    /// By rows: whether measuring chose the megakernel; and whether it is to be taken whatever was measured.
    together: [bool; megakernel::MOST + 1],
    megakernel: Option<bool>,
    /// Since the megakernel's flags began.
    steps: u32,
    stream: Stream,
    publisher: Publisher,
    loads: Loads,
    draws: Draws,
    /// Per layer: its KV is in the pool.
    layer_events: Vec<Event>,
    /// The plan's numbers on their way; drawn tokens and logits on theirs.
    inputs: Pinned,
    tokens: Pinned,
    logits: Pinned,
    info: EngineInfo,
    options: CudaOptions,
}

impl CudaEngine {
    /// Loads a Hugging Face folder.
    pub fn load(dir: &Path, options: CudaOptions) -> Result<Self, EngineError> {
        let config = ModelConfig::load(dir)?;
        let weights = Weights::open(dir)?;
        Self::build(config, Origin::Source(&weights), options)
    }

    /// A network of this shape with weights near N(0, 0.02), drawn on the device; equal to what the CPU engine
    /// draws from the seed.
    pub fn from_random(config: ModelConfig, seed: u64, options: CudaOptions) -> Result<Self, EngineError> {
        // What a checkpoint of this shape is stored in is what is drawn and then rounded here.
        let quantise = kind_of(options.quantise, config.quantised)?;
        let config = ModelConfig { quantised: None, ..config };
        Self::build(config, Origin::Random(RandomWeights { seed }), CudaOptions { quantise, ..options })
    }

    /// A network from any source.
    pub fn from_source(
        config: ModelConfig,
        source: &dyn WeightSource,
        options: CudaOptions,
    ) -> Result<Self, EngineError> {
        Self::build(config, Origin::Source(source), options)
    }

    fn build(config: ModelConfig, origin: Origin<'_>, options: CudaOptions) -> Result<Self, EngineError> {
        check(&config, &options)?;
        let device = Device::open(options.device)?;
        let layout = KvLayout {
            layers: config.layers,
            blocks: options.kv_blocks,
            kv_heads: config.kv_heads,
            block_tokens: options.block_tokens,
            head_dim: config.head_dim,
            dtype: options.kv_dtype,
        };
        let kind = kind_of(options.quantise, config.quantised)?;
        if let Some(kind) = kind.filter(|_| device.capability != (9, 0)) {
            let (name, (major, minor)) = (&device.name, device.capability);
            return Err(EngineError::Unsupported(format!(
                "{} products need compute capability 9.0; {name} has {major}.{minor}; take the network in bf16",
                kind.name()
            )));
        }
        if options.kv_dtype == KvDtype::Fp8 && device.capability < (8, 9) {
            let (name, (major, minor)) = (&device.name, device.capability);
            return Err(EngineError::Unsupported(format!(
                "KV in fp8 needs compute capability 8.9; {name} has {major}.{minor}; leave --kv-dtype at bf16"
            )));
        }
        options::check_widths(&config, kind)?;
        check_memory(&device, &config, &layout)?;
        let kernels = Arc::new(Kernels::load(&device, config.head_dim, kind, options.kv_dtype)?);
        let stream = Stream::new(&device)?;
        let loader = Loader { device: &device, kernels: &kernels, stream: &stream, origin, quantise: kind };
        let network = Network::load(&loader, &config)?;
        stream.synchronize()?;
        let capacity = capacity(&config, &options, kind.is_some());
        let pool =
            DevicePool::new(&device, Arc::clone(&kernels), layout, options.host_side || options.publish)?;
        let info = EngineInfo {
            backend: "cuda",
            device: device.name.clone(),
            max_context_tokens: config.max_context,
            vocab_size: config.vocab,
        };
        let layer_events = (0..config.layers).map(|_| Event::new(false)).collect::<Result<_, _>>()?;
        let logits = HOST_LOGITS.min(capacity.wanted) * config.vocab * 4;
        let mut engine = Self {
            layer_events,
            publisher: Publisher::new(&device, config.layers)?,
            inputs: Pinned::new(&device, capacity.inputs * 4, "the step's inputs")?,
            tokens: Pinned::new(&device, capacity.wanted * 4, "the drawn tokens")?,
            logits: Pinned::new(&device, logits, "logits")?,
            gemms: Gemms::new(&device, kernels::thin(&device)?, kernels::wide(&device)?)?,
            graphs: Graphs::new(options.max_sequences.min(options.max_batch_tokens)),
            together: [true; megakernel::MOST + 1],
            megakernel: None,
            steps: 0,
            loads: Loads::new(&device)?,
            draws: Draws::new(&device, config.vocab, capacity.wanted)?,
            fixed: Fixed::new(
                Arc::clone(&device),
                config,
                kernels,
                network,
                pool,
                capacity,
                &stream,
                options.attention,
            )?,
            stream,
            info,
            options,
        };
        engine.prepare()?;
        Ok(engine)
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.fixed.config
    }

    /// Flags of the megakernel begin anew, which they do by themselves before one could be met again.
    pub fn restart_flags(&mut self) -> Result<(), EngineError> {
        self.fixed.device.enter()?;
        self.stream.synchronize()?;
        self.steps = 0;
        self.fixed.megakernel.as_ref().map_or(Ok(()), |kernel| kernel.restart_flags(&self.fixed.epoch))
    }

    /// Whether one kernel makes all layers. It leaves no room beside it: a frame of KV that arrives would wait for its end, and the
    /// frame after it for the next one's.
    fn together(&self, rows: usize) -> bool {
        let chosen = || self.together.get(rows) == Some(&true) && !self.fixed.pool.lanes().are_wanted();
        self.megakernel.unwrap_or_else(chosen)
    }

    /// Queues a step: what comes out lies in the buffers when the stream has passed it.
    fn queue(
        &mut self,
        batch: &Batch<'_>,
        all_logits: bool,
        profile: Option<&mut Profile>,
    ) -> Result<Plan, EngineError> {
        self.fixed.device.enter()?;
        batch.validate(self.fixed.pool.layout(), &self.info)?;
        let (tokens, segments) = (batch.tokens(), batch.segments.len());
        let CudaOptions { max_batch_tokens, max_sequences, .. } = self.options;
        if tokens > max_batch_tokens || segments > max_sequences {
            return Err(EngineError::BadBatch(format!(
                "{tokens} tokens in {segments} segments in a step of at most {max_batch_tokens} in {max_sequences}"
            )));
        }
        self.steps += 1;
        if self.steps > Megakernel::steps_of_flags(self.fixed.config.layers) {
            self.restart_flags()?;
        }
        let single = |s: &crate::Segment<'_>| s.tokens.len() == 1 && (all_logits || !s.samples.is_empty());
        let graph = self.options.graphs && profile.is_none() && batch.segments.iter().all(single);
        let size = if graph { self.graphs.size_for(tokens) } else { None };
        let layout = *self.fixed.pool.layout();
        let plan = Plan::new(batch, &layout, self.fixed.tiling(), size.unwrap_or(0), all_logits);
        let room = self.inputs.as_mut_slice::<i32>();
        let Some(room) = room.get_mut(..plan.numbers.len()) else {
            let needed = plan.numbers.len();
            return Err(EngineError::BadBatch(format!("block tables of {needed} entries in one step")));
        };
        room.copy_from_slice(&plan.numbers);
        self.stream.upload(self.fixed.buffers.inputs.at, room)?;
        match size {
            Some(size) => {
                let together = self.together(size);
                self.graphs.run(&self.fixed, &mut self.gemms, &self.stream, size, together)?;
            }
            None => {
                let layer_events = (self.options.publish).then_some(&self.layer_events[..]);
                let together = self.together(plan.rows);
                let (fixed, gemms, stream) = (&self.fixed, &mut self.gemms, &self.stream);
                Step { fixed, gemms, stream, plan: &plan, layer_events, profile, together }.queue()?;
            }
        }
        Ok(plan)
    }

    /// Brings what the step wrote to the host side, layer by layer behind the compute, and says so.
    fn publish_layers(&mut self, plan: &Plan, on_layer: &mut dyn FnMut(usize)) -> Result<(), EngineError> {
        let at = self.fixed.buffers.inputs.at + 4 * plan.start(List::Written) as u64;
        let blocks = Blocks { ids: &plan.written, at };
        self.publisher.queue(&self.fixed.pool, blocks, &self.layer_events)?;
        self.publisher.wait(&self.fixed.pool, blocks, on_layer)
    }

    /// The logits of wanted rows `rows`, for the host.
    fn fetch_logits(&mut self, rows: std::ops::Range<usize>) -> Result<Vec<Vec<f32>>, EngineError> {
        let vocab = self.fixed.config.vocab;
        let mut all = Vec::with_capacity(rows.len());
        for first in rows.clone().step_by(HOST_LOGITS) {
            let count = HOST_LOGITS.min(rows.end - first);
            let room = &mut self.logits.as_mut_slice::<f32>()[..count * vocab];
            self.stream.download(room, self.fixed.buffers.logits.at + (first * vocab * 4) as u64)?;
            self.stream.synchronize()?;
            all.extend(
                self.logits.as_slice::<f32>()[..count * vocab].chunks_exact(vocab).map(<[f32]>::to_vec),
            );
        }
        Ok(all)
    }

    /// Block ids on the device, behind everything that was queued.
    fn upload_blocks(&mut self, blocks: &[i32]) -> Result<u64, EngineError> {
        self.fixed.device.enter()?;
        self.stream.synchronize()?;
        let room = self.inputs.as_mut_slice::<i32>().get_mut(..blocks.len());
        let room = room.ok_or_else(|| EngineError::BadBatch(format!("{} blocks at once", blocks.len())))?;
        room.copy_from_slice(blocks);
        self.stream.upload(self.fixed.buffers.inputs.at, room)?;
        Ok(self.fixed.buffers.inputs.at)
    }

    fn known(&self, blocks: impl Iterator<Item = u32>) -> Result<Vec<i32>, EngineError> {
        let most = self.fixed.pool.layout().blocks;
        let known = |block: u32| ((block as usize) < most).then_some(block as i32);
        let all: Option<Vec<i32>> = blocks.map(known).collect();
        all.ok_or_else(|| EngineError::BadBatch(format!("a block beyond the pool's {most}")))
    }
}

impl Engine for CudaEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn kv(&self) -> Arc<dyn KvMemory> {
        Arc::clone(&self.fixed.pool) as Arc<dyn KvMemory>
    }

    fn forward(
        &mut self,
        batch: &Batch<'_>,
        on_layer: &mut dyn FnMut(usize),
    ) -> Result<Vec<Vec<Sampled>>, EngineError> {
        let plan = self.queue(batch, false, None)?;
        let wanted = plan.wanted.len();
        let (kernels, logits) = (&self.fixed.kernels.drawing, self.fixed.buffers.logits.at);
        let sources = self.draws.queue(&self.stream, kernels, logits, (&plan, batch))?;
        self.stream
            .download(&mut self.tokens.as_mut_slice::<i32>()[..wanted], self.fixed.buffers.tokens.at)?;
        if self.options.publish {
            self.publish_layers(&plan, on_layer)?;
        }
        self.stream.synchronize()?;
        if !self.options.publish {
            (0..self.fixed.config.layers).for_each(on_layer);
        }
        let mut sampled = vec![Vec::new(); batch.segments.len()];
        for ((row, &index), source) in plan.wanted_segments.iter().enumerate().zip(sources) {
            let requests = batch.segments[index].samples;
            sampled[index] = match source {
                Source::Best => {
                    let token = self.tokens.as_slice::<i32>()[row] as u32;
                    vec![Sampled { token, logprob: f32::NAN, top: Vec::new() }; requests.len()]
                }
                Source::Device(place) => self.draws.drawn(&place),
                Source::Host => {
                    let logits = self.fetch_logits(row..row + 1)?.pop().unwrap_or_default();
                    requests.iter().map(|request| sample(&mut logits.clone(), request)).collect()
                }
            };
        }
        Ok(sampled)
    }

    fn forward_logits(&mut self, batch: &Batch<'_>) -> Result<Vec<Vec<f32>>, EngineError> {
        let plan = self.queue(batch, true, None)?;
        self.fetch_logits(0..plan.wanted.len())
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), EngineError> {
        let flat = self.known(pairs.iter().flat_map(|&(from, to)| [from, to]))?;
        let at = self.upload_blocks(&flat)?;
        self.fixed.pool.fork(&self.stream, at, pairs.len())?;
        self.stream.synchronize()
    }

    fn publish_blocks(&mut self, blocks: &[u32]) -> Result<(), EngineError> {
        let ids = self.known(blocks.iter().copied())?;
        let at = self.upload_blocks(&ids)?;
        let blocks = Blocks { ids: &ids, at };
        let here = &self.layer_events[..1];
        here.iter().try_for_each(|event| event.record(&self.stream))?;
        self.publisher.queue(&self.fixed.pool, blocks, here)?;
        self.publisher.wait(&self.fixed.pool, blocks, &mut |_| {})
    }

    fn begin_load(&mut self, blocks: &[u32], on_device: &[bool]) -> Result<Loading, EngineError> {
        self.fixed.device.enter()?;
        let ids = self.known(blocks.iter().copied())?;
        if ids.is_empty() {
            return Ok(Loading::Done);
        }
        self.loads.begin(&self.fixed.pool, ids, on_device).map(Loading::Queued)
    }

    fn is_loaded(&mut self, load: u64) -> Result<bool, EngineError> {
        self.fixed.device.enter()?;
        self.loads.is_done(&self.fixed.pool, load)
    }
}

impl Drop for CudaEngine {
    fn drop(&mut self) {
        // Memory goes next: nothing may still run.
        let _ = self.fixed.device.enter();
        let _ = self.stream.synchronize();
        let _ = self.publisher.synchronize();
        let _ = self.loads.synchronize();
    }
}
