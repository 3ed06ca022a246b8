//! What a device was measured to do, as a file: its ceilings, how much of them kernels reach, and what a step costs besides.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::model::ModelConfig;
use crate::roofline::{Dtype, Numbers, weight_bytes};

/// One device with the kernels it was measured with. Times of a step: launches, then products (the floor of their operations
/// and weights over the fraction that so many rows reach), attention of chunks, KV read for decoding, drawing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// What it is, in a word.
    pub name: String,
    /// Where its numbers are from.
    pub source: String,
    /// Products of large matrices; a multiply-add counts as two.
    pub flops_per_second: f64,
    /// Reading memory.
    pub bytes_per_second: f64,
    /// Its memory.
    pub memory_bytes: f64,
    /// Numbers of the layers' weights.
    pub weights: Dtype,
    /// Numbers of the KV.
    pub kv: Dtype,
    /// Devices that share one copy of the network.
    pub devices: usize,
    /// Rows of a step, and the fraction of the floor's rate that its products reach with so many; ascending.
    pub products: Vec<[f64; 2]>,
    /// Tokens of a chunk, and the fraction of `flops_per_second` that its attention reaches; ascending.
    pub attention: Vec<[f64; 2]>,
    /// Fraction of `bytes_per_second` at which decoding reads KV.
    pub kv_read: f64,
    /// Of every step.
    pub step_seconds: f64,
    /// Of every layer of every step: launches.
    pub layer_seconds: f64,
    /// Of every token drawn.
    pub sequence_seconds: f64,
    /// Between devices that share a copy.
    #[serde(default)]
    pub exchange: Option<Exchange>,
    /// From worker to worker.
    pub link: Exchange,
    /// Landed KV that a decode worker compares with its checksums and brings to the device, each second of its engine's thread.
    pub landing_bytes_per_second: f64,
    /// From router to worker, one way, and handling: each message of a request.
    pub hop_seconds: f64,
    /// KV cells are so many times smaller than the network's when real processes move them, as the machine's own link
    /// is slower than the device's.
    #[serde(default = "one")]
    pub cell_divisor: usize,
}

/// A link.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exchange {
    /// Until the first byte is there.
    pub latency_seconds: f64,
    /// As reached, not by the book.
    pub bytes_per_second: f64,
}

fn one() -> usize {
    1
}

/// A profile that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Neither a file nor a name.
    #[error("profile {name}: {why}; the built-in ones are {}", Profile::NAMES.join(", "))]
    Unreadable {
        /// What was given.
        name: String,
        /// Why it cannot be read.
        why: String,
    },
    /// A field is not what it should be.
    #[error("profile {name}: {field} is {value}, {wanted}")]
    Field {
        /// What was given.
        name: String,
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        wanted: &'static str,
    },
}

/// InfiniBand NDR 400 Gbit/s at 80 %.
const NDR: Exchange = Exchange { latency_seconds: 5e-6, bytes_per_second: 40e9 };

impl Profile {
    /// Names that [`Profile::built_in`] knows.
    pub const NAMES: [&str; 3] = ["h100", "h100-fp8", "cpu"];

    /// A profile that is known by name.
    pub fn built_in(name: &str) -> Option<Self> {
        match name {
            "h100" => Some(h100()),
            "h100-fp8" => Some(h100_fp8()),
            "cpu" => serde_json::from_str(include_str!("cpu.json")).ok(),
            _ => None,
        }
    }

    /// A built-in profile by its name, with `x4` behind it for four devices that share a copy, or a JSON file.
    pub fn load(name: &str) -> Result<Self, ProfileError> {
        if let Some(known) = Self::built_in(name) {
            return Ok(known);
        }
        if let Some((known, devices)) = name.split_once('x')
            && let (Some(known), Ok(devices @ 1..=64)) = (Self::built_in(known), devices.parse::<usize>())
        {
            return Ok(known.shared_by(devices));
        }
        let unreadable = |why: String| ProfileError::Unreadable { name: name.to_owned(), why };
        let text = std::fs::read_to_string(Path::new(name)).map_err(|e| unreadable(e.to_string()))?;
        let profile: Self = serde_json::from_str(&text).map_err(|e| unreadable(e.to_string()))?;
        profile.check(name)?;
        Ok(profile)
    }

    /// Whether every number can be used.
    pub fn check(&self, name: &str) -> Result<(), ProfileError> {
        let bad = |field, value: String, wanted| {
            Err(ProfileError::Field { name: name.to_owned(), field, value, wanted })
        };
        let mut positive = vec![
            ("flops_per_second", self.flops_per_second),
            ("bytes_per_second", self.bytes_per_second),
            ("memory_bytes", self.memory_bytes),
            ("kv_read", self.kv_read),
            ("link.bytes_per_second", self.link.bytes_per_second),
            ("landing_bytes_per_second", self.landing_bytes_per_second),
        ];
        positive.extend(self.exchange.map(|e| ("exchange.bytes_per_second", e.bytes_per_second)));
        if let Some((field, value)) = positive.into_iter().find(|(_, v)| !(*v > 0.0 && v.is_finite())) {
            return bad(field, value.to_string(), "and must be above 0");
        }
        let mut seconds = vec![
            ("step_seconds", self.step_seconds),
            ("layer_seconds", self.layer_seconds),
            ("sequence_seconds", self.sequence_seconds),
            ("hop_seconds", self.hop_seconds),
            ("link.latency_seconds", self.link.latency_seconds),
        ];
        seconds.extend(self.exchange.map(|e| ("exchange.latency_seconds", e.latency_seconds)));
        if let Some((field, value)) = seconds.into_iter().find(|(_, v)| !(0.0..60.0).contains(v)) {
            return bad(field, value.to_string(), "and must be seconds from 0 to 60");
        }
        for (field, curve) in [("products", &self.products), ("attention", &self.attention)] {
            let rises = curve.windows(2).all(|pair| pair[0][0] < pair[1][0]);
            let fractions = curve.iter().all(|[x, y]| *x >= 1.0 && *y > 0.0 && y.is_finite());
            if curve.is_empty() || !rises || !fractions {
                let wanted =
                    "and must be pairs, the first numbers from 1 up and ascending, the second above 0";
                return bad(field, format!("{curve:?}"), wanted);
            }
        }
        if !(1..=1024).contains(&self.devices) || !(1..=1024).contains(&self.cell_divisor) {
            return bad("devices or cell_divisor", self.devices.to_string(), "and must be 1 to 1024");
        }
        Ok(())
    }

    /// Bytes that are left for KV when the weights lie in nine tenths of the memory; 0 when they do not fit.
    pub fn kv_room_bytes(&self, shape: &ModelConfig) -> f64 {
        let numbers = Numbers { weights: self.weights, kv: self.kv };
        let all = 0.9 * self.memory_bytes * self.devices as f64;
        (all - weight_bytes(shape, numbers)).max(0.0)
    }

    /// The same with `devices` that share one copy, and what they exchange over NVLink 4.
    pub fn shared_by(self, devices: usize) -> Self {
        let nvlink = Exchange { latency_seconds: 8e-6, bytes_per_second: 360e9 };
        Self { devices, exchange: self.exchange.or(Some(nvlink)), ..self }
    }
}

/// Fitted to the tables of bench/RESULTS-H100.md (8B shape, bf16); the test of `cost.rs` holds it to them.
fn h100() -> Profile {
    Profile {
        name: "h100".into(),
        source: "bench/RESULTS-H100.md, 8B shape in bf16".into(),
        flops_per_second: 761e12,
        bytes_per_second: 3.09e12,
        memory_bytes: 80e9,
        weights: Dtype::Bf16,
        kv: Dtype::Bf16,
        devices: 1,
        products: vec![
            [1.0, 0.966],
            [8.0, 0.974],
            [16.0, 0.903],
            [32.0, 0.878],
            [64.0, 0.857],
            [128.0, 0.82],
            [256.0, 0.764],
            [384.0, 0.77],
            [512.0, 0.82],
            [1024.0, 0.855],
            [2048.0, 0.866],
            [8192.0, 0.854],
        ],
        attention: vec![
            [64.0, 0.12],
            [128.0, 0.163],
            [256.0, 0.205],
            [512.0, 0.233],
            [1024.0, 0.304],
            [2048.0, 0.42],
            [4096.0, 0.54],
            [8192.0, 0.66],
        ],
        kv_read: 0.94,
        step_seconds: 0.0,
        layer_seconds: 20e-6,
        sequence_seconds: 0.0,
        exchange: None,
        link: NDR,
        // bench/RESULTS-serve.md, two GPUs: 32 MiB in 4.5 to 5.2 ms.
        landing_bytes_per_second: 7e9,
        hop_seconds: 200e-6,
        cell_divisor: 16,
    }
}

/// The same page, FP8 layers. Attention runs in bf16: the same rates, as fractions of twice as much.
fn h100_fp8() -> Profile {
    let bf16 = h100();
    let flops_per_second = 1550e12;
    let scale = bf16.flops_per_second / flops_per_second;
    Profile {
        name: "h100-fp8".into(),
        source: "bench/RESULTS-H100.md, 8B shape with FP8 layers".into(),
        flops_per_second,
        weights: Dtype::Fp8,
        products: vec![
            [1.0, 0.553],
            [8.0, 0.613],
            [32.0, 0.619],
            [128.0, 0.615],
            [256.0, 0.54],
            [512.0, 0.72],
            [2048.0, 0.72],
            [8192.0, 0.73],
        ],
        attention: bf16.attention.iter().map(|[x, y]| [*x, (y * scale * 1e4).round() / 1e4]).collect(),
        ..bf16
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn built_in_profiles_are_good_and_survive_a_file() {
        for name in Profile::NAMES {
            let profile = Profile::built_in(name).unwrap();
            profile.check(name).unwrap();
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), serde_json::to_vec(&profile).unwrap()).unwrap();
            assert_eq!(Profile::load(file.path().to_str().unwrap()).unwrap(), profile);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = Profile::built_in("h100").unwrap();
        let said = |profile: Profile| profile.check("p.json").unwrap_err().to_string();
        assert!(said(Profile { kv_read: 0.0, ..good.clone() }).contains("kv_read is 0"));
        assert!(said(Profile { hop_seconds: f64::NAN, ..good.clone() }).contains("hop_seconds is NaN"));
        let unsorted = Profile { products: vec![[8.0, 1.0], [1.0, 1.0]], ..good };
        assert!(said(unsorted).contains("products is [[8.0, 1.0]"));
        assert!(Profile::load("no-such").unwrap_err().to_string().contains("built-in ones are h100"));
    }
}
