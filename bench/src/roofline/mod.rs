//! `tandem roofline`: what a network asks of a device in both phases, in tables. Arithmetic only, nothing is measured.

mod tables;
mod text;

use engine::model::ModelConfig;
use engine::roofline::{Ceilings, Device, Dtype, Link, Numbers, weight_bytes};
use serde::Serialize;

/// What is asked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the shape.
    pub shape: String,
    /// The network.
    pub config: ModelConfig,
    /// The device.
    pub device: Device,
    /// How many share one copy of the network; 0 is the fewest that leave a fifth of their memory to KV.
    pub devices: usize,
    /// Weights and KV.
    pub numbers: Numbers,
    /// Rates as measured, not as promised.
    pub reached: bool,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens that a decoding sequence has behind it.
    pub context: usize,
    /// Ways for KV.
    pub links: Vec<Link>,
}

/// The tables.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Name of the shape.
    pub shape: String,
    /// The device.
    pub device: Device,
    /// How many share one copy.
    pub devices: usize,
    /// Their rates together.
    pub ceilings: Ceilings,
    /// Whether these were measured.
    pub reached: bool,
    /// Operations per byte where both rates bind.
    pub balance: f64,
    /// Weights in memory.
    pub weight_bytes: f64,
    /// KV of one token.
    pub kv_bytes_per_token: f64,
    /// Tokens of a prompt, for the first and third tables.
    pub prompt: usize,
    /// Tokens behind a decoding sequence.
    pub context: usize,
    /// Work and intensity of each part in both phases.
    pub intensity: Vec<Intensity>,
    /// Decode against batch.
    pub decode: Vec<Decode>,
    /// Batch from which decode is bound by compute: of weights alone, and with this context; `None`: never.
    pub turns_at: [Option<usize>; 2],
    /// What smaller numbers bring.
    pub dtypes: Vec<Rounding>,
    /// KV of a prompt over links.
    pub transfers: Vec<Transfer>,
    /// What is often said, and the right figure.
    pub notes: Vec<String>,
}

/// One part in one phase.
#[derive(Debug, Serialize)]
pub struct Intensity {
    /// The phase, in words.
    pub phase: String,
    /// The part; `all` for the whole step.
    pub part: &'static str,
    /// Operations.
    pub flops: f64,
    /// Bytes of weights and KV.
    pub bytes: f64,
    /// Operations per byte; 0 where the part does nothing.
    pub intensity: f64,
    /// The same with the products' inputs and outputs counted too.
    pub with_activations: f64,
    /// What binds.
    pub bound: &'static str,
}

/// One batch.
#[derive(Debug, Serialize)]
pub struct Decode {
    /// Sequences.
    pub batch: usize,
    /// Operations per byte.
    pub intensity: f64,
    /// The least time of a step.
    pub floor_ms: f64,
    /// What binds.
    pub bound: &'static str,
    /// Tokens a second of all sequences together, at the floor.
    pub tokens_per_second: f64,
    /// Share of the bytes that are KV.
    pub kv_share: f64,
    /// Whether weights and the batch's KV fit in memory.
    pub fits: bool,
}

/// One way to store numbers.
#[derive(Debug, Serialize)]
pub struct Rounding {
    /// Weights, and activations in products.
    pub weights: Dtype,
    /// KV.
    pub kv: Dtype,
    /// Weights in memory.
    pub weight_bytes: f64,
    /// Floor of the prompt, and how much faster than bf16.
    pub prefill_ms: f64,
    /// Times faster than the first row.
    pub prefill_gain: f64,
    /// Floors of a decode step of one and of 128 sequences.
    pub decode_ms: [f64; 2],
    /// Times faster than the first row.
    pub decode_gain: [f64; 2],
}

/// One prompt.
#[derive(Debug, Serialize)]
pub struct Transfer {
    /// Tokens.
    pub tokens: usize,
    /// Its KV.
    pub bytes: f64,
    /// The least time to compute it.
    pub prefill_ms: f64,
    /// Over each link: its name, all of it, and what is left after the last layer when layers are pushed as they are done.
    pub over: Vec<Over>,
}

/// One link.
#[derive(Debug, Serialize)]
pub struct Over {
    /// The link.
    pub link: &'static str,
    /// The whole KV at once, 80 % of the line rate.
    pub ms: f64,
    /// Pushed layer by layer beside the compute: what is left when prefill has ended.
    pub exposed_ms: f64,
}

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum RooflineError {
    /// The device cannot multiply these numbers.
    #[error("--weights: the {device} has no {dtype} products; choose another of bf16, int8, fp8, f32")]
    NoProducts {
        /// The device.
        device: &'static str,
        /// The numbers.
        dtype: &'static str,
    },
    /// Nobody measured it.
    #[error(
        "--reached: nothing is measured for {dtype} on the {device}; leave it away for the maker's rates"
    )]
    NotMeasured {
        /// The device.
        device: &'static str,
        /// The numbers.
        dtype: &'static str,
    },
}

/// Works out the tables.
pub fn report(settings: &Settings) -> Result<Report, RooflineError> {
    let devices = match settings.devices {
        0 => fewest(settings),
        given => given,
    };
    tables::report(settings, devices)
}

/// The smallest power of two whose memory holds the weights and leaves a fifth.
fn fewest(settings: &Settings) -> usize {
    let bytes = weight_bytes(&settings.config, settings.numbers);
    let mut devices = 1;
    while bytes > 0.8 * settings.device.memory_bytes * devices as f64 && devices < 1024 {
        devices *= 2;
    }
    devices
}
