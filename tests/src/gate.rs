//! A gate before an engine: while it is shut, a step begins and does not end.

use std::sync::Arc;

use engine::{Batch, Engine, EngineError, EngineInfo, KvMemory, Sampled};
use parking_lot::{Condvar, Mutex};

/// Open at first. Clones share.
#[derive(Clone, Default)]
pub struct Gate(Arc<State>);

#[derive(Default)]
struct State {
    shut: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Steps that begin from now on do not end.
    pub fn shut(&self) {
        *self.0.shut.lock() = true;
    }

    /// They end, and others begin.
    pub fn open(&self) {
        *self.0.shut.lock() = false;
        self.0.opened.notify_all();
    }

    /// Puts itself before an engine.
    pub fn before(&self, engine: Box<dyn Engine>) -> Box<dyn Engine> {
        Box::new(Gated { engine, gate: self.clone() })
    }

    fn pass(&self) {
        let mut shut = self.0.shut.lock();
        while *shut {
            self.0.opened.wait(&mut shut);
        }
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
}
