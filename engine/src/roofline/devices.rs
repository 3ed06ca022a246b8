//! Devices by name: what their makers promise, and what we measured where we could.

use serde::Serialize;

use super::{Ceilings, Dtype};

/// One device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Device {
    /// As on the command line.
    pub name: &'static str,
    /// Its full name.
    pub title: &'static str,
    /// Dense matrix products in f32 (TF32 on GPUs), bf16, int8, fp8; 0 where the device has none.
    peak_flops: [f64; 4],
    /// Reading its memory.
    pub bytes_per_second: f64,
    /// Its memory.
    pub memory_bytes: f64,
    /// Where these numbers are from.
    pub source: &'static str,
    /// The same rates as reached by plain kernels.
    pub measured: Option<Measured>,
}

/// Rates that were reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measured {
    /// As `peak_flops`.
    flops: [f64; 4],
    /// Reading memory.
    pub bytes_per_second: f64,
    /// How they were measured.
    pub source: &'static str,
}

impl Device {
    /// Promised rates; `None` where the device cannot multiply that.
    pub fn promised(&self, dtype: Dtype) -> Option<Ceilings> {
        rates(&self.peak_flops, self.bytes_per_second, dtype)
    }

    /// Measured rates; `None` where they are not known.
    pub fn reached(&self, dtype: Dtype) -> Option<Ceilings> {
        self.measured.as_ref().and_then(|m| rates(&m.flops, m.bytes_per_second, dtype))
    }
}

fn rates(flops: &[f64; 4], bytes_per_second: f64, dtype: Dtype) -> Option<Ceilings> {
    let flops_per_second = match dtype {
        Dtype::F32 => flops[0],
        Dtype::Bf16 => flops[1],
        Dtype::Int8 => flops[2],
        Dtype::Fp8 => flops[3],
    };
    (flops_per_second > 0.0).then_some(Ceilings { flops_per_second, bytes_per_second })
}

/// All that are known. Makers' rates are the dense ones: those with sparsity are twice as high and of no use here.
pub const ALL: [Device; 7] = [
    Device {
        name: "h100",
        title: "NVIDIA H100 SXM 80 GB",
        peak_flops: [494.7e12, 989.4e12, 1978.9e12, 1978.9e12],
        bytes_per_second: 3.35e12,
        memory_bytes: 80e9,
        source: "NVIDIA's data sheet of the H100 SXM, dense",
        measured: Some(Measured {
            flops: [0.0, 761e12, 895e12, 1550e12],
            bytes_per_second: 3.09e12,
            source: "bench/RESULTS-H100.md: products of 8192³ by cuBLASLt (int8: by torch._int_mm), a read kernel",
        }),
    },
    Device {
        name: "h100-pcie",
        title: "NVIDIA H100 PCIe 80 GB",
        peak_flops: [378e12, 756e12, 1513e12, 1513e12],
        bytes_per_second: 2.0e12,
        memory_bytes: 80e9,
        source: "NVIDIA's data sheet of the H100 PCIe, dense",
        measured: None,
    },
    Device {
        name: "h200",
        title: "NVIDIA H200 SXM 141 GB",
        peak_flops: [494.7e12, 989.4e12, 1978.9e12, 1978.9e12],
        bytes_per_second: 4.8e12,
        memory_bytes: 141e9,
        source: "NVIDIA's data sheet of the H200 SXM, dense",
        measured: None,
    },
    Device {
        name: "b200",
        title: "NVIDIA B200 SXM 180 GB",
        peak_flops: [1100e12, 2250e12, 4500e12, 4500e12],
        bytes_per_second: 7.7e12,
        memory_bytes: 180e9,
        source: "NVIDIA's data sheet of the HGX B200, one of eight, dense",
        measured: None,
    },
    Device {
        name: "a100",
        title: "NVIDIA A100 SXM 80 GB",
        peak_flops: [156e12, 312e12, 624e12, 0.0],
        bytes_per_second: 2.039e12,
        memory_bytes: 80e9,
        source: "NVIDIA's data sheet of the A100 SXM, dense",
        measured: None,
    },
    Device {
        name: "l40s",
        title: "NVIDIA L40S 48 GB",
        peak_flops: [183e12, 362e12, 733e12, 733e12],
        bytes_per_second: 0.864e12,
        memory_bytes: 48e9,
        source: "NVIDIA's data sheet of the L40S, dense",
        measured: None,
    },
    Device {
        name: "zen4-2",
        title: "two Zen 4 cores with AVX-512",
        peak_flops: [0.28e12, 0.56e12, 1.12e12, 0.0],
        bytes_per_second: 60e9,
        memory_bytes: 24e9,
        source: "two 512-bit multiply-adds every two cycles (bf16 and int8 dot products twice and four times), at 4.4 GHz; a socket's share of memory",
        measured: Some(Measured {
            flops: [0.22e12, 0.44e12, 0.86e12, 0.0],
            bytes_per_second: 46e9,
            source: "matrix products of 128 rows and more, matrix-vector products; one core each, twice",
        }),
    },
];

/// A device by its name.
pub fn named(name: &str) -> Option<&'static Device> {
    static DEVICES: [Device; 7] = ALL;
    DEVICES.iter().find(|device| device.name == name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// 989.4 / 3.35 = 295.3 operations per byte; what is reached balances at 761 / 3.09 = 246.3.
    #[test]
    fn the_balance_point_of_an_h100() {
        let h100 = named("h100").unwrap();
        assert!((h100.promised(Dtype::Bf16).unwrap().balance() - 295.3).abs() < 0.1);
        assert!((h100.reached(Dtype::Bf16).unwrap().balance() - 246.3).abs() < 0.1);
        assert!((h100.promised(Dtype::Fp8).unwrap().balance() - 590.7).abs() < 0.1);
        assert_eq!(named("a100").unwrap().promised(Dtype::Fp8), None);
        assert!(named("h100-nvl").is_none());
    }

    #[test]
    fn nothing_measured_is_above_its_promise() {
        for device in &ALL {
            for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8, Dtype::Fp8] {
                let Some(reached) = device.reached(dtype) else { continue };
                let promised = device.promised(dtype).unwrap();
                assert!(reached.flops_per_second < promised.flops_per_second, "{} {dtype:?}", device.name);
                assert!(reached.bytes_per_second < promised.bytes_per_second, "{}", device.name);
            }
        }
    }
}
