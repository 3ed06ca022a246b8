//! `tandem bench engine`: how fast steps are, beside what the device allows.

mod calibrate;
mod copies;
mod measure;
mod profile;
mod report;
mod tables;

pub use calibrate::calibrate;
use profile::Floors;
pub use profile::{PartRow, Profile, trace};
pub use report::{Report, Row, Table};

use anyhow::{Result, bail};
use engine::cpu::{CpuEngine, CpuOptions};
use engine::cuda::{CudaEngine, CudaOptions};
use engine::model::{ModelConfig, Quantisation};
use engine::profile::Span;
use engine::roofline::Dtype;
pub use engine::roofline::{Ceilings, shapes};
use engine::{Batch, Engine, EngineError, KvDtype};

/// Tokens per block of the measured pool.
pub(crate) const BLOCK_TOKENS: usize = 16;

/// Which measurements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Prompts of several lengths, alone and packed.
    Prefill,
    /// Steps of one token for batches of several sizes.
    Decode,
    /// Decode by one kernel for all layers, and by kernels apart.
    Megakernel,
    /// Decode with and without graphs.
    Graphs,
    /// Decoding sequences with a prompt beside them, in chunks of several sizes.
    Chunk,
    /// Eight bits against bf16: a long prompt, decode steps of one sequence and of many.
    Int8,
    /// Decode steps that draw otherwise than greedily.
    Draw,
    /// KV between a GPU and its host side, alone and beside a prompt.
    Copies,
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the shape, for the report.
    pub name: String,
    /// The network.
    pub config: ModelConfig,
    /// What the layers' weights are rounded to.
    pub quantise: Option<Quantisation>,
    /// How KV is stored.
    pub kv_dtype: KvDtype,
    /// Which tables, in this order.
    pub kinds: Vec<Kind>,
    /// Runs per row.
    pub runs: usize,
    /// Largest decode batch.
    pub max_batch: usize,
    /// Longest prompt.
    pub max_prompt: usize,
    /// Lengths for the prefill table; empty for those that it has.
    pub prompts: Vec<usize>,
    /// Tokens that a decoding sequence has behind it.
    pub context: usize,
    /// What computes.
    pub device: Device,
    /// Also say where the time of a prefill and of two decode steps goes.
    pub profile: bool,
}

impl Settings {
    pub(crate) fn kv_type(&self) -> Dtype {
        match self.kv_dtype {
            KvDtype::Bf16 => Dtype::Bf16,
            KvDtype::F32 => Dtype::F32,
            KvDtype::Fp8 => Dtype::Fp8,
        }
    }
}

/// Where.
#[derive(Debug, Clone, Copy)]
pub enum Device {
    /// CPU cores.
    Cpu {
        /// 0 is all.
        threads: usize,
    },
    /// An NVIDIA GPU.
    Cuda {
        /// Which, from 0.
        ordinal: usize,
    },
}

/// An engine with the parts that a measurement needs beyond the trait.
pub(crate) enum Measured {
    Cpu(Box<CpuEngine>),
    Cuda(Box<CudaEngine>),
}

impl Measured {
    pub(crate) fn engine(&mut self) -> &mut dyn Engine {
        match self {
            Self::Cpu(engine) => engine.as_mut(),
            Self::Cuda(engine) => engine.as_mut(),
        }
    }

    pub(crate) fn streamed_bytes(&self) -> usize {
        match self {
            Self::Cpu(engine) => engine.streamed_bytes(),
            Self::Cuda(engine) => engine.streamed_bytes(),
        }
    }

    /// False where there are none.
    pub(crate) fn set_graphs(&mut self, on: bool) -> bool {
        match self {
            Self::Cpu(_) => false,
            Self::Cuda(engine) => {
                engine.set_graphs(on);
                true
            }
        }
    }

    /// False where there is none.
    pub(crate) fn set_megakernel(&mut self, on: Option<bool>) -> bool {
        match self {
            Self::Cpu(_) => false,
            Self::Cuda(engine) => {
                engine.set_megakernel(on);
                engine.has_megakernel()
            }
        }
    }

    fn profile(&mut self, batch: &Batch<'_>) -> Result<Vec<Span>, EngineError> {
        match self {
            Self::Cpu(engine) => engine.profile(batch),
            Self::Cuda(engine) => engine.profile(batch),
        }
    }

    fn ceilings(&mut self) -> Result<Ceilings, EngineError> {
        match self {
            Self::Cpu(engine) => engine.ceilings(),
            Self::Cuda(engine) => {
                let found = engine.ceilings()?;
                let engine::cuda::Ceilings { flops_per_second, bytes_per_second } = found;
                Ok(Ceilings { flops_per_second, bytes_per_second })
            }
        }
    }
}

/// Tokens of one engine step: prompts beyond are chunked.
pub(crate) const STEP_TOKENS: usize = 8192;

/// Measures. `progress` hears what is about to be done.
pub fn run(settings: &Settings, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    if settings.context + 1 > settings.config.max_context || settings.max_prompt > settings.config.max_context
    {
        bail!("the shape's context is {} tokens", settings.config.max_context);
    }
    let copies = copies::wanted(settings)?;
    progress("weights");
    let started = std::time::Instant::now();
    let mut measured = build(settings)?;
    let start_seconds = started.elapsed().as_secs_f64();
    progress("ceilings");
    let ceilings = measured.ceilings()?;
    let peaks = match &mut measured {
        Measured::Cpu(engine) => engine.peaks().into_iter().map(|p| (p.name, p.ops_per_second)).collect(),
        Measured::Cuda(_) => Vec::new(),
    };
    let mut report = Report {
        shape: shape(settings),
        peaks,
        device: measured.engine().info().device.clone(),
        ceilings,
        start_seconds,
        tables: Vec::new(),
        profiles: Vec::new(),
    };
    for &kind in settings.kinds.iter().filter(|kind| !matches!(kind, Kind::Int8 | Kind::Copies)) {
        report.tables.push(tables::measure(kind, settings, &mut measured, &ceilings, progress)?);
    }
    if settings.profile {
        let floors = Floors {
            ceilings: &ceilings,
            attention: report.peaks.first().map(|peak| peak.1),
            streamed: measured.streamed_bytes(),
        };
        report.profiles = profile::measure(settings, &mut measured, &floors, progress)?;
    }
    drop(measured);
    if settings.kinds.contains(&Kind::Int8) {
        report.tables.push(eight_bits(settings, progress)?);
    }
    if let Some(ordinal) = copies {
        report.tables.push(copies::measure(settings, ordinal, progress)?);
    }
    Ok(report)
}

/// The shape's name, and what is not bf16.
fn shape(settings: &Settings) -> String {
    let weights = settings.quantise.map(|kind| format!(" in {}", kind.name())).unwrap_or_default();
    let kv = settings.kv_dtype;
    let kv = if kv == KvDtype::Bf16 { String::new() } else { format!(", KV in {}", kv.name()) };
    format!("{}{weights}{kv}", settings.name)
}

/// The same steps in bf16 and in each kind of eight bits that the device multiplies, each beside its own ceilings.
fn eight_bits(settings: &Settings, progress: &mut dyn FnMut(&str)) -> Result<Table> {
    let kinds = match settings.device {
        Device::Cpu { .. } => vec![None, Some(Quantisation::Int8)],
        Device::Cuda { .. } => vec![None, Some(Quantisation::Int8), Some(Quantisation::Fp8)],
    };
    let mut rows = Vec::new();
    for quantise in kinds {
        let name = quantise.map_or("bf16", Quantisation::name);
        progress(name);
        let settings = Settings { quantise, ..settings.clone() };
        let mut measured = build(&settings)?;
        let ceilings = measured.ceilings()?;
        let table = tables::measure(Kind::Int8, &settings, &mut measured, &ceilings, progress)?;
        rows.extend(table.rows.into_iter().map(|row| Row { name: format!("{name}, {}", row.name), ..row }));
    }
    Ok(Table { title: "eight bits".into(), rows })
}

fn build(settings: &Settings) -> Result<Measured> {
    let blocks = |count: usize, tokens: usize| count * tokens.div_ceil(BLOCK_TOKENS);
    let decode = blocks(settings.max_batch, settings.context + 1) + blocks(1, STEP_TOKENS);
    let kv_blocks = decode.max(blocks(1, settings.max_prompt)).max(blocks(16, 2048).min(decode));
    let config = settings.config.clone();
    Ok(match settings.device {
        Device::Cpu { threads } => {
            let max_batch_tokens = STEP_TOKENS;
            let options = CpuOptions {
                kv_blocks,
                block_tokens: BLOCK_TOKENS,
                threads,
                max_batch_tokens,
                kv_dtype: settings.kv_dtype,
                quantise: settings.quantise,
                ..Default::default()
            };
            Measured::Cpu(Box::new(CpuEngine::from_random(config, 1, options)?))
        }
        Device::Cuda { ordinal } => {
            let options = CudaOptions {
                device: ordinal,
                kv_blocks,
                block_tokens: BLOCK_TOKENS,
                max_batch_tokens: STEP_TOKENS,
                max_sequences: settings.max_batch + 1,
                prepare: true,
                host_side: false,
                kv_dtype: settings.kv_dtype,
                quantise: settings.quantise,
                ..CudaOptions::default()
            };
            Measured::Cuda(Box::new(CudaEngine::from_random(config, 1, options)?))
        }
    })
}
