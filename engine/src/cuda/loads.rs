//! Blocks on their way from the host side to the device, beside the steps, with checksums of what arrived there.

use std::sync::Arc;

use super::driver::{Device, Event, Pinned, Stream};
use super::kernels::Kernels;
use super::pool::DevicePool;
use crate::EngineError;

/// The loads that are under way, and what they are made with.
pub(super) struct Loads {
    device: Arc<Device>,
    stream: Stream,
    slots: Vec<Slot>,
    last: u64,
}

struct Slot {
    /// 0 when it is free.
    load: u64,
    /// Block ids, where the device reads them.
    ids: Pinned,
    blocks: Vec<i32>,
    done: Event,
}

impl Loads {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, EngineError> {
        Ok(Self { device: Arc::clone(device), stream: Stream::new(device)?, slots: Vec::new(), last: 0 })
    }

    /// Queues all layers of the blocks, each with its checksum as it stands on the device.
    pub(super) fn begin(
        &mut self,
        kernels: &Kernels,
        pool: &DevicePool,
        blocks: Vec<i32>,
    ) -> Result<u64, EngineError> {
        let slot =
            match self.slots.iter().position(|slot| slot.load == 0 && slot.ids.bytes >= 4 * blocks.len()) {
                Some(at) => &mut self.slots[at],
                None => {
                    let room = 4 * blocks.len().next_power_of_two().max(1024);
                    let ids = Pinned::new(&self.device, room, "block ids on their way")?;
                    self.slots.push(Slot { load: 0, ids, blocks: Vec::new(), done: Event::new(false)? });
                    let last = self.slots.len() - 1;
                    &mut self.slots[last]
                }
            };
        slot.ids.as_mut_slice::<i32>()[..blocks.len()].copy_from_slice(&blocks);
        let ids = slot.ids.device_address();
        for layer in 0..pool.layers() {
            pool.mark(layer, &blocks, false);
            pool.load(kernels, &self.stream, layer, ids, blocks.len())?;
            pool.checksums(kernels, &self.stream, layer, ids, blocks.len())?;
        }
        slot.done.record(&self.stream)?;
        self.last += 1;
        (slot.load, slot.blocks) = (self.last, blocks);
        Ok(self.last)
    }

    /// Whether a load has ended; then its checksums stand.
    pub(super) fn is_done(&mut self, pool: &DevicePool, load: u64) -> Result<bool, EngineError> {
        let Some(slot) = self.slots.iter_mut().find(|slot| slot.load == load) else { return Ok(true) };
        if !slot.done.has_passed()? {
            return Ok(false);
        }
        (0..pool.layers()).for_each(|layer| pool.mark(layer, &slot.blocks, true));
        slot.load = 0;
        Ok(true)
    }

    pub(super) fn synchronize(&self) -> Result<(), EngineError> {
        self.stream.synchronize()
    }
}
