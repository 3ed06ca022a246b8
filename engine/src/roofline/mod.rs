//! What a step must at least cost: its operations over the device's rate, its bytes over the memory's. Pure.
//!
//! [`Work`] counts what a network does to some chunks, [`devices`] and [`links`] are what there is to do it with, with their
//! sources. One place for the benches, the simulator and `tandem roofline`, so that all of them mean the same floor.

pub mod devices;
pub mod links;
pub mod shapes;
mod work;

pub use devices::Device;
pub use links::Link;
pub use work::{Chunk, Numbers, Part, Work, kv_bytes_per_token, weight_bytes};

use serde::{Deserialize, Serialize};

/// How a number is stored and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// 16-bit brain float.
    Bf16,
    /// 8-bit integer, activations too.
    Int8,
    /// 8-bit float, activations too.
    Fp8,
}

impl Dtype {
    /// Bytes of one number.
    pub fn bytes(self) -> f64 {
        match self {
            Self::F32 => 4.0,
            Self::Bf16 => 2.0,
            Self::Int8 | Self::Fp8 => 1.0,
        }
    }

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Fp8 => "fp8",
        }
    }
}

/// The two rates that bound a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// A multiply-add counts as two.
    pub flops_per_second: f64,
    /// Reading memory.
    pub bytes_per_second: f64,
}

impl Ceilings {
    /// Operations per byte at which both rates bind: below it memory does, above it the multipliers.
    pub fn balance(&self) -> f64 {
        self.flops_per_second / self.bytes_per_second
    }

    /// Those of `n` devices that share the work evenly and for nothing.
    pub fn times(&self, n: usize) -> Self {
        Self {
            flops_per_second: self.flops_per_second * n as f64,
            bytes_per_second: self.bytes_per_second * n as f64,
        }
    }
}

/// Which rate binds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// The multipliers.
    Compute,
    /// Memory.
    Memory,
}

impl Bound {
    /// In a table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Memory => "memory",
        }
    }
}
