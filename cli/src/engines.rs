//! Building an engine from the command line.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use cluster::{Join, Role};
use constraint::Vocabulary;
use engine::cpu::{CpuEngine, CpuOptions};
use engine::cuda::{CudaEngine, CudaOptions};
use engine::kv::pool::BlockPool;
use engine::model::ModelConfig;
use engine::model::quantise::kind_of;
use engine::sim::{self, Profile, SimEngine, SimOptions};
use engine::{Engine, KvDtype, KvLayout};
use telemetry::trace::Tracer;
use worker::config::MAX_BLOCK_TOKENS;

use crate::args::{Device, EngineArgs, Quantize};

/// An engine, its block pool, and the hash that only interchangeable workers share.
pub struct Built {
    pub engine: Box<dyn Engine>,
    pub pool: Arc<BlockPool>,
    pub vocabulary: Vocabulary,
    pub compat_hash: String,
}

impl Built {
    /// What a worker works with.
    pub fn deps(self, registry: Arc<dyn Join>, tracer: Tracer, expiry: tls::Expiry) -> worker::Deps {
        let Self { engine, pool, vocabulary, .. } = self;
        worker::Deps { engine, pool, registry, vocabulary, tracer, expiry }
    }
}

/// What an engine will be, checked before anything is loaded.
pub struct Plan {
    config: ModelConfig,
    kv_dtype: KvDtype,
    kv_blocks: usize,
    max_batch_tokens: usize,
    threads: usize,
    compat_hash: String,
    /// The network whose time is taken, and how long it takes.
    simulated: Option<(ModelConfig, Profile)>,
}

/// Checks the settings against the model of `dir`, for steps of up to `step_tokens` tokens.
pub fn plan(dir: &Path, args: &EngineArgs, step_tokens: usize) -> anyhow::Result<Plan> {
    let config = ModelConfig::load(dir)?;
    if !(1..=MAX_BLOCK_TOKENS).contains(&args.block_tokens) {
        bail!("--block-tokens: {} is not between 1 and {MAX_BLOCK_TOKENS}", args.block_tokens);
    }
    let kv_dtype = args.kv_dtype.of_engine();
    let one = KvLayout {
        layers: config.layers,
        blocks: 1,
        kv_heads: config.kv_heads,
        block_tokens: args.block_tokens,
        head_dim: config.head_dim,
        dtype: kv_dtype,
    };
    let simulated = simulated(args, &config)?;
    let block_bytes = match &simulated {
        Some((shape, profile)) => sim::block_bytes(shape, profile, args.block_tokens, kv_dtype),
        None => one.total_bytes(),
    };
    let kv_blocks = args.kv_blocks.unwrap_or((args.kv_mib << 20) / block_bytes);
    if kv_blocks < 2 {
        bail!(
            "the KV pool has room for {kv_blocks} blocks of {} tokens ({} bytes each); raise --kv-mib",
            args.block_tokens,
            block_bytes
        );
    }
    if args.quantize.is_some() && args.device == Device::Sim {
        bail!(
            "--quantize: what does not compute does not round; leave it away and take --sim-profile h100-fp8"
        );
    }
    let quantise = args.quantize.map(Quantize::kind);
    // A CPU rounds more finely than a GPU what comes in bf16: their numbers are not each other's.
    let finely = if args.device == Device::Cpu && config.quantised.is_none() { "-turned" } else { "" };
    let quantised =
        kind_of(quantise, config.quantised)?.map_or_else(String::new, |k| format!(",{}{finely}", k.name()));
    // What only pretends must never be paired with what computes, nor be converted.
    let pretends = simulated.as_ref().map_or_else(String::new, |(shape, profile)| {
        let one = format!("{}x{}x{}", shape.layers, shape.kv_heads, shape.head_dim / profile.cell_divisor);
        format!(",sim={one},kv={},block={}", kv_dtype.name(), args.block_tokens)
    });
    let suffix = format!("{quantised}{pretends}");
    let compat_hash = config.compat_hash(dir, &suffix)?;
    let max_batch_tokens = step_tokens.max(args.max_sequences);
    Ok(Plan {
        config,
        kv_dtype,
        kv_blocks,
        max_batch_tokens,
        threads: threads(args)?,
        compat_hash,
        simulated,
    })
}

/// Loads the model of `dir` for steps of up to `step_tokens` tokens.
pub fn build(dir: &Path, args: &EngineArgs, role: Role, step_tokens: usize) -> anyhow::Result<Built> {
    let Plan { config, kv_dtype, kv_blocks, max_batch_tokens, threads, compat_hash, simulated } =
        plan(dir, args, step_tokens)?;
    let engine: Box<dyn Engine> = match args.device {
        Device::Cpu => Box::new(CpuEngine::load(
            dir,
            CpuOptions {
                kv_blocks,
                block_tokens: args.block_tokens,
                kv_dtype,
                threads,
                max_batch_tokens,
                quantise: args.quantize.map(Quantize::kind),
                ..CpuOptions::default()
            },
        )?),
        Device::Sim => {
            let (shape, profile) = simulated.context("--device sim: no profile")?;
            let options =
                SimOptions { kv_blocks, block_tokens: args.block_tokens, kv_dtype, max_batch_tokens };
            Box::new(SimEngine::new(&config, &shape, &profile, options)?)
        }
        Device::Cuda => Box::new(CudaEngine::load(
            dir,
            CudaOptions {
                device: args.gpu,
                kv_blocks,
                block_tokens: args.block_tokens,
                kv_dtype,
                max_batch_tokens,
                max_sequences: args.max_sequences,
                prepare: true,
                // A prefill worker's steps of single tokens are ends of prompts: too few to capture.
                graphs: role == Role::Decode && !args.no_graphs,
                publish: role == Role::Prefill,
                quantise: args.quantize.map(Quantize::kind),
                ..CudaOptions::default()
            },
        )?),
    };
    let blocks = u32::try_from(kv_blocks).context("--kv-blocks is too large")?;
    let vocabulary = Vocabulary::of(dir, config.vocab, &config.eos);
    Ok(Built { engine, pool: BlockPool::new(blocks), vocabulary, compat_hash })
}

fn simulated(args: &EngineArgs, own: &ModelConfig) -> anyhow::Result<Option<(ModelConfig, Profile)>> {
    if args.device != Device::Sim {
        return Ok(None);
    }
    let shape = match &args.sim_shape {
        Some(name) => crate::bench::shape(name).context("--sim-shape")?,
        None => own.clone(),
    };
    Ok(Some((shape, Profile::load(&args.sim_profile).context("--sim-profile")?)))
}

fn threads(args: &EngineArgs) -> anyhow::Result<usize> {
    Ok(match args.threads {
        Some(0) => bail!("--threads: at least 1"),
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, |n| n.get()),
    })
}
