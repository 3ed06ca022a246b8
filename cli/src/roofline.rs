//! `tandem roofline`: parses and prints; the arithmetic is in `engine::roofline`, the tables in the `bench` crate.

use std::io::Write;

use anyhow::bail;
use bench::roofline::{self as tables, Settings};
use engine::roofline::{Dtype, Numbers, devices, links};

use crate::args::{NumberType, RooflineArgs};
use crate::bench as bench_command;

/// Prints the tables.
pub fn run(args: &RooflineArgs) -> anyhow::Result<()> {
    if args.prompt == 0 || args.context == 0 {
        bail!("--prompt and --context: at least 1 token");
    }
    let Some(device) = devices::named(&args.device) else {
        let known: Vec<&str> = devices::ALL.iter().map(|device| device.name).collect();
        bail!("--device: {} is not one of {}", args.device, known.join(", "));
    };
    let links: Vec<links::Link> = match args.link.is_empty() {
        true => links::ALL.to_vec(),
        false => args.link.iter().map(|name| link(name)).collect::<anyhow::Result<_>>()?,
    };
    let settings = Settings {
        shape: args.shape.clone(),
        config: bench_command::shape(&args.shape)?,
        device: device.clone(),
        devices: usize::from(args.devices),
        numbers: Numbers { weights: dtype(args.weights), kv: dtype(args.kv) },
        reached: args.reached,
        prompt: args.prompt,
        context: args.context,
        links,
    };
    let report = tables::report(&settings)?;
    let mut out = std::io::stdout().lock();
    match args.json {
        true => writeln!(out, "{}", serde_json::to_string(&report)?)?,
        false => write!(out, "{report}")?,
    }
    Ok(())
}

/// A link by its name, or a refusal that names the others.
pub fn link(name: &str) -> anyhow::Result<links::Link> {
    let Some(link) = links::named(name) else {
        let known: Vec<&str> = links::ALL.iter().map(|link| link.name).collect();
        bail!("--link: {name} is not one of {}", known.join(", "));
    };
    Ok(link)
}

fn dtype(number: NumberType) -> Dtype {
    match number {
        NumberType::F32 => Dtype::F32,
        NumberType::Bf16 => Dtype::Bf16,
        NumberType::Int8 => Dtype::Int8,
        NumberType::Fp8 => Dtype::Fp8,
    }
}
