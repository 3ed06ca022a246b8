//! What is done once before the first step: products are measured, graphs captured, the faster of two ways chosen.

use super::CudaEngine;
use super::graphs::Graphs;
use crate::EngineError;

/// The one kernel must be faster by this much: where both are level, apart leaves room for what else the device does.
const WORTH: f32 = 0.98;

impl CudaEngine {
    /// Measures products and captures graphs, as the tuning says.
    pub(super) fn prepare(&mut self) -> Result<(), EngineError> {
        if !self.options.prepare {
            return Ok(());
        }
        let started = std::time::Instant::now();
        let sizes = if self.options.graphs { self.graphs.sizes().to_vec() } else { Vec::new() };
        let mut rows = sizes.clone();
        rows.extend(prefill_rows());
        rows.sort_unstable();
        rows.dedup();
        self.fixed.tune(&mut self.gemms, &self.stream, &rows)?;
        // What is not measured is made by kernels apart.
        self.together.fill(false);
        for size in sizes {
            self.prepare_graphs(size)?;
        }
        let (device, ms) = (&self.info.device, started.elapsed().as_millis());
        tracing::info!(device, ms, "products measured, graphs captured");
        Ok(())
    }

    /// Captures the step of a size; where there are two ways to make it, the faster one is kept.
    fn prepare_graphs(&mut self, size: usize) -> Result<(), EngineError> {
        let (fixed, gemms, stream) = (&self.fixed, &mut self.gemms, &self.stream);
        if !Graphs::differs(fixed, size) {
            return self.graphs.capture(fixed, gemms, stream, size, false);
        }
        let apart_ms = self.graphs.time(fixed, gemms, stream, size, false)?;
        match self.graphs.time(fixed, gemms, stream, size, true) {
            Ok(together_ms) => {
                self.together[size] = together_ms < WORTH * apart_ms;
                tracing::debug!(size, apart_ms, together_ms, "decode step tuned");
            }
            // A device of which this process has a part only, for example.
            Err(error) => {
                tracing::warn!(size, %error, "no kernel for all layers at once: kernels apart make these steps");
            }
        }
        Ok(())
    }
}

/// Rows at which large products are measured. A product is made in tiles of 128 rows or so, dealt to all multiprocessors at once:
/// one more row of tiles can take a whole round more, and then another algorithm is the best. The more rounds there are, the less that matters.
fn prefill_rows() -> impl Iterator<Item = usize> {
    (128..=2048).step_by(128).chain((2304..=4096).step_by(256)).chain((5120..=8192).step_by(1024))
}
