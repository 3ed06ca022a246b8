//! KV on its way to the host side, layer by layer, while later layers are computed.

use std::sync::Arc;

use super::driver::{Device, Event, Stream};
use super::pool::{Blocks, DevicePool};
use crate::EngineError;

/// Streams beside the step's: copies take the copy engines, checksums a little of the device.
pub(super) struct Publisher {
    copies: Stream,
    sums: Stream,
    summed: Event,
    /// Per layer: it is on the host side, and its checksums too.
    done: Vec<Event>,
}

impl Publisher {
    pub(super) fn new(device: &Arc<Device>, layers: usize) -> Result<Self, EngineError> {
        Ok(Self {
            copies: Stream::new(device)?,
            sums: Stream::new(device)?,
            summed: Event::new(false)?,
            done: (0..layers).map(|_| Event::new(false)).collect::<Result<_, _>>()?,
        })
    }

    /// Queues all layers of blocks, each behind its event of `after` (the last for those beyond).
    pub(super) fn queue(
        &self,
        pool: &DevicePool,
        blocks: Blocks<'_>,
        after: &[Event],
    ) -> Result<(), EngineError> {
        for (layer, done) in self.done.iter().enumerate() {
            if let Some(event) = after.get(layer).or(after.last()) {
                self.copies.wait(event)?;
                self.sums.wait(event)?;
            }
            pool.checksums(&self.sums, layer, blocks)?;
            self.summed.record(&self.sums)?;
            pool.bring(&self.copies, layer, blocks)?;
            self.copies.wait(&self.summed)?;
            done.record(&self.copies)?;
        }
        Ok(())
    }

    /// Waits for each layer in turn, and says so.
    pub(super) fn wait(
        &self,
        pool: &DevicePool,
        blocks: Blocks<'_>,
        on_layer: &mut dyn FnMut(usize),
    ) -> Result<(), EngineError> {
        for (layer, done) in self.done.iter().enumerate() {
            done.synchronize()?;
            pool.mark(layer, blocks.ids, true);
            on_layer(layer);
        }
        Ok(())
    }

    pub(super) fn synchronize(&self) -> Result<(), EngineError> {
        self.sums.synchronize()?;
        self.copies.synchronize()
    }
}
