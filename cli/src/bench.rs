//! `tandem bench`: parses and prints; the measuring is in the `bench` crate.

use std::path::Path;

use ::bench::engine::{self as measurement, Kind, Settings, shapes};
use anyhow::{Context, bail};
use engine::model::ModelConfig;
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::{BenchArgs, BenchCommand, BenchEngineArgs, BenchKvArgs, BenchTable, Device, Quantize};
use crate::{bench_serve, kv};

/// Runs what was asked for.
pub async fn run(args: BenchArgs) -> anyhow::Result<()> {
    match args.command {
        BenchCommand::Engine(args) => tokio::task::spawn_blocking(move || engine(&args)).await?,
        BenchCommand::Serve(args) => bench_serve::run(args).await,
        BenchCommand::Kv(args) => match args.serve {
            Some(address) => {
                let tls = args.cluster_tls.files();
                kv::serve(address, args.rdma_device, tls, args.with_parent).await
            }
            None => {
                let json = args.json;
                kv::run(measured(args), json).await
            }
        },
    }
}

fn measured(args: BenchKvArgs) -> kv::KvBench {
    kv::KvBench {
        to: args.to,
        blocks: args.blocks,
        streams: args.streams.into(),
        mib: args.mib,
        runs: args.runs.into(),
        rdma: args.rdma,
        shm: args.shm,
        packing: kv::packing(args.kv_wire.name()),
        tls: args.cluster_tls.files(),
        devices: args.rdma_device,
    }
}

fn engine(args: &BenchEngineArgs) -> anyhow::Result<()> {
    if args.runs == 0 || args.max_batch == 0 {
        bail!("--runs and --max-batch: at least 1");
    }
    let wants_profile = |table| matches!(table, &BenchTable::All | &BenchTable::Profile);
    let settings = Settings {
        profile: args.trace.is_some() || args.table.iter().any(wants_profile),
        name: args.shape.clone(),
        quantise: args.quantize.map(Quantize::kind),
        kv_dtype: args.kv_dtype.of_engine(),
        config: shape(&args.shape)?,
        kinds: kinds(&args.table),
        runs: args.runs,
        max_batch: args.max_batch,
        max_prompt: args.max_prompt,
        prompts: args.prompts.clone(),
        context: args.context,
        device: match args.device {
            Device::Cpu => measurement::Device::Cpu { threads: args.threads.unwrap_or(0) },
            Device::Sim => bail!("--device: there is nothing to measure in sim; cpu or cuda"),
            Device::Cuda => measurement::Device::Cuda { ordinal: args.gpu },
        },
    };
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {elapsed} {msg}")?);
    if let Some(path) = &args.write_profile {
        let profile = measurement::calibrate(&settings, &mut |doing| {
            bar.set_message(doing.to_owned());
            bar.tick();
        })?;
        let text = serde_json::to_string_pretty(&profile)?;
        return std::fs::write(path, text)
            .with_context(|| format!("--write-profile: cannot write {}", path.display()));
    }
    let report = measurement::run(&settings, &mut |doing| {
        bar.set_message(doing.to_owned());
        bar.tick();
    })?;
    bar.finish_and_clear();
    if let Some(path) = &args.trace {
        let trace = serde_json::to_vec(&measurement::trace(&report.profiles))?;
        std::fs::write(path, trace).with_context(|| format!("--trace: cannot write {}", path.display()))?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{report}");
    }
    Ok(())
}

/// A network's shape by its name, or of a model folder.
pub fn shape(name: &str) -> anyhow::Result<ModelConfig> {
    if let Some(config) = shapes::named(name) {
        return Ok(config);
    }
    let folder = Path::new(name);
    if !folder.is_dir() {
        bail!("--shape: {name} is neither a model folder nor one of {}", shapes::NAMES.join(", "));
    }
    ModelConfig::load(folder).context("--shape")
}

fn kinds(tables: &[BenchTable]) -> Vec<Kind> {
    let kind = |table: &BenchTable| match table {
        BenchTable::All => {
            vec![
                Kind::Prefill,
                Kind::Decode,
                Kind::Megakernel,
                Kind::Graphs,
                Kind::Chunk,
                Kind::Draw,
                Kind::Int8,
            ]
        }
        BenchTable::Prefill => vec![Kind::Prefill],
        BenchTable::Decode => vec![Kind::Decode],
        BenchTable::Megakernel => vec![Kind::Megakernel],
        BenchTable::Graphs => vec![Kind::Graphs],
        BenchTable::Chunk => vec![Kind::Chunk],
        BenchTable::Int8 => vec![Kind::Int8],
        BenchTable::Draw => vec![Kind::Draw],
        BenchTable::Copies => vec![Kind::Copies],
        BenchTable::Profile => Vec::new(),
    };
    tables.iter().flat_map(kind).collect()
}
