//! Links between workers by name: line rate and latency.

use serde::Serialize;

/// One way for KV to travel.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Link {
    /// As on the command line.
    pub name: &'static str,
    /// In words.
    pub title: &'static str,
    /// One direction, by the book.
    pub bytes_per_second: f64,
    /// From the first byte sent to the first byte there.
    pub latency_seconds: f64,
}

/// Share of the line rate that a good transport reaches with large blocks.
pub const GOOD_SHARE: f64 = 0.8;

impl Link {
    /// Milliseconds for so many bytes at a good transport's share of the line rate.
    pub fn ms(&self, bytes: f64) -> f64 {
        (self.latency_seconds + bytes / (self.bytes_per_second * GOOD_SHARE)) * 1e3
    }
}

/// All that are known. A bit rate of a network is eight times its byte rate; NVLink's 900 GB/s are both directions together.
pub const ALL: [Link; 8] = [
    Link {
        name: "nvlink4",
        title: "NVLink 4, 18 links of one H100",
        bytes_per_second: 450e9,
        latency_seconds: 2e-6,
    },
    Link {
        name: "ndr-x8",
        title: "8 × InfiniBand NDR 400 Gbit/s",
        bytes_per_second: 400e9,
        latency_seconds: 3e-6,
    },
    Link { name: "pcie5", title: "PCIe 5.0 × 16", bytes_per_second: 63e9, latency_seconds: 2e-6 },
    Link { name: "ndr", title: "InfiniBand NDR 400 Gbit/s", bytes_per_second: 50e9, latency_seconds: 3e-6 },
    Link { name: "roce-200", title: "RoCE 200 Gbit/s", bytes_per_second: 25e9, latency_seconds: 5e-6 },
    Link { name: "eth-100", title: "TCP, 100 Gbit/s", bytes_per_second: 12.5e9, latency_seconds: 30e-6 },
    Link { name: "eth-25", title: "TCP, 25 Gbit/s", bytes_per_second: 3.125e9, latency_seconds: 40e-6 },
    Link { name: "eth-10", title: "TCP, 10 Gbit/s", bytes_per_second: 1.25e9, latency_seconds: 50e-6 },
];

/// A link by its name.
pub fn named(name: &str) -> Option<Link> {
    ALL.into_iter().find(|link| link.name == name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// 2048 tokens of a 70B model in bf16 are 671 MB: 16.8 ms at 80 % of 400 Gbit/s.
    #[test]
    fn a_long_prompt_over_infiniband() {
        let ms = named("ndr").unwrap().ms(2048.0 * 327_680.0);
        assert!((ms - 16.78).abs() < 0.01, "{ms}");
    }
}
