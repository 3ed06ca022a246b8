//! Blocks on their way from the host side to the device, beside the steps, with checksums of what arrived there.

use std::sync::Arc;

use super::driver::{Device, Event, Pinned, Stream};
use super::pool::{Blocks, DevicePool};
use crate::EngineError;

/// The loads that are under way, and what they are made with.
pub(super) struct Loads {
    device: Arc<Device>,
    copies: Stream,
    sums: Stream,
    /// What the checksums of the next layer wait for.
    copied: Event,
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
        Ok(Self {
            device: Arc::clone(device),
            copies: Stream::new(device)?,
            sums: Stream::new(device)?,
            copied: Event::new(false)?,
            slots: Vec::new(),
            last: 0,
        })
    }

    /// Queues all layers of the blocks, but for the cells that are on the device already (`on_device`, layer after layer; empty:
    /// none), each with its checksum as it stands on the device.
    pub(super) fn begin(
        &mut self,
        pool: &DevicePool,
        blocks: Vec<i32>,
        on_device: &[bool],
    ) -> Result<u64, EngineError> {
        let is_here = |cell: usize| on_device.get(cell).copied().unwrap_or(false);
        // All blocks, for the checksums; then of each layer those to be brought.
        let mut ids = blocks.clone();
        let lists: Vec<(usize, usize)> = (0..pool.layers())
            .map(|layer| {
                let start = ids.len();
                let missing = blocks.iter().enumerate().filter(|(at, _)| !is_here(layer * blocks.len() + at));
                ids.extend(missing.map(|(_, block)| *block));
                (start, ids.len() - start)
            })
            .collect();
        let slot = self.slot(ids.len())?;
        let slot = &mut self.slots[slot];
        slot.ids.as_mut_slice::<i32>()[..ids.len()].copy_from_slice(&ids);
        let at = slot.ids.device_address();
        for (layer, (start, count)) in lists.into_iter().enumerate() {
            pool.mark(layer, &blocks, false);
            let missing = Blocks { ids: &ids[start..start + count], at: at + 4 * start as u64 };
            pool.load(&self.copies, layer, missing)?;
            self.copied.record(&self.copies)?;
            self.sums.wait(&self.copied)?;
            pool.checksums(&self.sums, layer, Blocks { ids: &blocks, at })?;
        }
        slot.done.record(&self.sums)?;
        self.last += 1;
        (slot.load, slot.blocks) = (self.last, blocks);
        Ok(self.last)
    }

    /// A free slot with room for this many ids.
    fn slot(&mut self, ids: usize) -> Result<usize, EngineError> {
        if let Some(at) = self.slots.iter().position(|slot| slot.load == 0 && slot.ids.bytes >= 4 * ids) {
            return Ok(at);
        }
        let room = 4 * ids.next_power_of_two().max(1024);
        let ids = Pinned::new(&self.device, room, "block ids on their way")?;
        self.slots.push(Slot { load: 0, ids, blocks: Vec::new(), done: Event::new(false)? });
        Ok(self.slots.len() - 1)
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
        self.copies.synchronize()?;
        self.sums.synchronize()
    }
}
