//! A gate before an engine: while it is shut, a step begins and does not end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use engine::{Batch, Engine, EngineError, EngineInfo, KvLayout, KvMemory, Loading, Sampled};
use parking_lot::{Condvar, Mutex};

/// Open at first. Clones share.
#[derive(Clone, Default)]
pub struct Gate(Arc<State>);

#[derive(Default)]
struct State {
    shut: Mutex<bool>,
    opened: Condvar,
    holds: AtomicBool,
    kv: OnceLock<Arc<dyn KvMemory>>,
}

impl Gate {
    /// Steps that begin from now on do not end.
    pub fn shut(&self) {
        *self.0.shut.lock() = true;
    }

    /// Whether a step waits at the gate: nothing writes the pool then but what lands.
    pub fn holds(&self) -> bool {
        self.0.holds.load(Ordering::SeqCst)
    }

    /// They end, and others begin.
    pub fn open(&self) {
        *self.0.shut.lock() = false;
        self.0.opened.notify_all();
    }

    /// Puts itself before an engine.
    pub fn before(&self, engine: Box<dyn Engine>) -> Box<dyn Engine> {
        let _ = self.0.kv.set(engine.kv());
        Box::new(Gated { engine, gate: self.clone() })
    }

    /// Checksums of every block of a layer, as it stands in memory now.
    pub fn sums(&self, layer: usize) -> Vec<u32> {
        let kv = self.0.kv.get().unwrap();
        (0..kv.layout().blocks as u32).map(|block| kv.checksum(layer, block)).collect()
    }

    /// Flips one bit of a block of a layer. Only while the gate is shut.
    pub fn flip(&self, layer: usize, block: u32, byte: usize) {
        assert!(*self.0.shut.lock() && byte < self.layout().block_bytes());
        let offset = self.layout().offset(layer, block) + byte;
        let kv = self.0.kv.get().unwrap();
        // SAFETY: inside the pool, which `kv` keeps alive; the engine's thread waits at the shut gate, and the test
        // flips only what has landed, which the transport does not write any more.
        unsafe { *kv.host_address().unwrap().add(offset) ^= 1 }
    }

    fn layout(&self) -> KvLayout {
        *self.0.kv.get().unwrap().layout()
    }

    fn pass(&self) {
        let mut shut = self.0.shut.lock();
        while *shut {
            self.0.holds.store(true, Ordering::SeqCst);
            self.0.opened.wait(&mut shut);
        }
        self.0.holds.store(false, Ordering::SeqCst);
    }
}

struct Gated {
    engine: Box<dyn Engine>,
    gate: Gate,
}

impl Engine for Gated {
    fn info(&self) -> &EngineInfo {
        self.engine.info()
    }

    fn kv(&self) -> Arc<dyn KvMemory> {
        self.engine.kv()
    }

    fn forward(
        &mut self,
        batch: &Batch<'_>,
        on_layer: &mut dyn FnMut(usize),
    ) -> Result<Vec<Vec<Sampled>>, EngineError> {
        self.gate.pass();
        self.engine.forward(batch, on_layer)
    }

    fn forward_logits(&mut self, batch: &Batch<'_>) -> Result<Vec<Vec<f32>>, EngineError> {
        self.engine.forward_logits(batch)
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), EngineError> {
        self.engine.copy_blocks(pairs)
    }

    fn publish_blocks(&mut self, blocks: &[u32]) -> Result<(), EngineError> {
        self.engine.publish_blocks(blocks)
    }

    fn begin_load(&mut self, blocks: &[u32], on_device: &[bool]) -> Result<Loading, EngineError> {
        self.engine.begin_load(blocks, on_device)
    }

    fn is_loaded(&mut self, load: u64) -> Result<bool, EngineError> {
        self.engine.is_loaded(load)
    }
}
