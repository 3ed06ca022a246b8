//! What was measured, as text and as JSON.

use std::fmt;

use serde::Serialize;

use super::measure::Times;
use super::{Ceilings, Profile};

/// Everything of one run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The network's name.
    pub shape: String,
    /// The device's name.
    pub device: String,
    /// What the device was measured to reach.
    pub ceilings: Ceilings,
    /// Other rates of the device, operations a second.
    pub peaks: Vec<(&'static str, f64)>,
    /// From nothing to ready: kernels, weights, measuring products, capturing graphs.
    pub start_seconds: f64,
    /// One per kind of measurement.
    pub tables: Vec<Table>,
    /// Where the time of some steps goes.
    pub profiles: Vec<Profile>,
}

/// Rows of one kind.
#[derive(Debug, Serialize)]
pub struct Table {
    /// The kind.
    pub title: String,
    /// In the order measured.
    pub rows: Vec<Row>,
}

/// One measurement.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What ran.
    pub name: String,
    /// How long.
    pub took: Times,
    /// Of the median.
    pub tokens_per_second: f64,
    /// What the ceilings allow, and which of them binds.
    pub floor_ms: Option<f64>,
    /// `compute` or `memory`.
    pub bound: Option<String>,
    /// Floor over median.
    pub fraction: Option<f64>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} on {}, ready in {:.1} s", self.shape, self.device, self.start_seconds)?;
        let Ceilings { flops_per_second, bytes_per_second } = self.ceilings;
        if !self.peaks.is_empty() {
            for (name, rate) in &self.peaks {
                writeln!(f, "{name}: {:.1} G operations/s in registers", rate / 1e9)?;
            }
            let (flops, bytes) = (flops_per_second / 1e9, bytes_per_second / 1e9);
            writeln!(f, "ceilings: {flops:.1} G operations/s, {bytes:.1} GB/s (read)")?;
        } else if flops_per_second > 0.0 {
            let (tera_flops, tera_bytes) = (flops_per_second / 1e12, bytes_per_second / 1e12);
            writeln!(f, "ceilings: {tera_flops:.0} TFLOP/s (8192³), {tera_bytes:.2} TB/s (read)")?;
        }
        self.tables.iter().try_for_each(|table| write!(f, "\n{table}"))?;
        self.profiles.iter().try_for_each(|profile| write!(f, "\n{profile}"))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| {} | median ms (fastest … slowest) | tokens/s | floor ms | reached |", self.title)?;
        writeln!(f, "|---|---|---|---|---|")?;
        for row in &self.rows {
            let Times { median_ms, fastest_ms, slowest_ms } = row.took;
            write!(f, "| {} | {median_ms:.2} ({fastest_ms:.2} … {slowest_ms:.2}) ", row.name)?;
            write!(f, "| {:.0} ", row.tokens_per_second)?;
            match (row.floor_ms, &row.bound, row.fraction) {
                (Some(floor), Some(bound), Some(fraction)) => {
                    writeln!(f, "| {floor:.2} ({bound}) | {:.0} % |", fraction * 100.0)?;
                }
                _ => writeln!(f, "| | |")?,
            }
        }
        Ok(())
    }
}
