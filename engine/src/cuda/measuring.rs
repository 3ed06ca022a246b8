//! What benchmarks and tests ask of the engine beyond the trait.

use super::profile::Profile;
use super::{Ceilings, CudaEngine, ceilings};
use crate::profile::Span;
use crate::{Batch, EngineError};

impl CudaEngine {
    /// Switches graphs on or off, for comparing.
    pub fn set_graphs(&mut self, on: bool) {
        self.options.graphs = on;
    }

    /// Takes one kernel for all layers wherever it can make a step, or never, for comparing; or as measuring chose.
    pub fn set_megakernel(&mut self, on: Option<bool>) {
        self.megakernel = on;
    }

    /// Whether there is such a kernel for this network and device.
    pub fn has_megakernel(&self) -> bool {
        self.fixed.megakernel.is_some()
    }

    /// Runs a step without graphs and says where its time went.
    pub fn profile(&mut self, batch: &Batch<'_>) -> Result<Vec<Span>, EngineError> {
        let mut profile = Profile::default();
        self.queue(batch, false, Some(&mut profile))?;
        self.stream.synchronize()?;
        profile.spans()
    }

    /// Runs a step `count` times, each queued while the one before it runs: what a worker would gain at most if it queued a step before it
    /// has read the last one's tokens.
    pub fn repeat(&mut self, batch: &Batch<'_>, count: usize) -> Result<(), EngineError> {
        for _ in 0..count {
            self.queue(batch, false, None)?;
        }
        self.stream.synchronize()
    }

    /// What the device reaches: products of the layers' type, and reads.
    pub fn ceilings(&mut self) -> Result<Ceilings, EngineError> {
        self.fixed.device.enter()?;
        let operands = self.fixed.network.operands();
        ceilings::measure(&self.fixed.device, &self.stream, &self.fixed.kernels, &mut self.gemms, operands)
    }

    /// Bytes of weights that one decode step reads.
    pub fn streamed_bytes(&self) -> usize {
        self.fixed.network.streamed_bytes()
    }
}
