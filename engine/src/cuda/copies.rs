//! How fast KV goes between the device and its host side, beside plain copies of as many bytes.

use std::time::Instant;

use cudarc::driver::sys;

use super::driver::failed;
use super::{CudaEngine, EngineError};
use crate::{Engine, KvMemory, Loading};

/// One way of copying, run some times.
pub struct Copied {
    /// What was copied, and how.
    pub what: &'static str,
    /// Each run.
    pub milliseconds: Vec<f64>,
    /// Whether this is the plain copy that what follows is compared with.
    pub plain: bool,
}

impl CudaEngine {
    /// Copies all layers of `blocks` to the host side and back, `runs` times in turn: as many bytes in one piece, and as a worker does it,
    /// block by block with their checksums. For measuring: what the blocks hold is lost.
    pub fn copies(&mut self, blocks: &[u32], runs: usize) -> Result<Vec<Copied>, EngineError> {
        type Way = fn(&mut CudaEngine, &[u32]) -> Result<(), EngineError>;
        let ways: [(&'static str, bool, Way); 4] = [
            ("to the host, plain", true, |engine, blocks| engine.plain_copy(blocks, true)),
            ("to the host, blocks and checksums", false, |engine, blocks| engine.publish_blocks(blocks)),
            ("to the device, plain", true, |engine, blocks| engine.plain_copy(blocks, false)),
            ("to the device, blocks and checksums", false, |engine, blocks| {
                match engine.begin_load(blocks, &[])? {
                    Loading::Done => Ok(()),
                    Loading::Queued(load) => loop {
                        if engine.is_loaded(load)? {
                            return Ok(());
                        }
                        std::hint::spin_loop();
                    },
                }
            }),
        ];
        let copied = |&(what, plain, _): &(_, _, Way)| Copied { what, milliseconds: Vec::new(), plain };
        let mut all: Vec<Copied> = ways.iter().map(copied).collect();
        for run in 0..=runs {
            for (copied, (_, _, copy)) in all.iter_mut().zip(&ways) {
                let started = Instant::now();
                copy(self, blocks)?;
                // The first warms up.
                if run > 0 {
                    copied.milliseconds.push(started.elapsed().as_secs_f64() * 1e3);
                }
            }
        }
        Ok(all)
    }

    fn plain_copy(&mut self, blocks: &[u32], to_host: bool) -> Result<(), EngineError> {
        self.fixed.device.enter()?;
        let (pool, stream) = (self.fixed.pool.as_ref(), &self.stream);
        let bytes = pool.layers() * self.known(blocks.iter().copied())?.len() * pool.layout().block_bytes();
        let host = pool.host_address().filter(|_| bytes <= pool.layout().total_bytes());
        let host = host.ok_or_else(|| EngineError::Unsupported("a pool without a host side".into()))?.cast();
        // SAFETY: both sides hold the whole pool, which is at least as large as these blocks.
        let queued = unsafe {
            match to_host {
                true => sys::cuMemcpyDtoHAsync_v2(host, pool.layer(0), bytes, stream.raw),
                false => sys::cuMemcpyHtoDAsync_v2(pool.layer(0), host, bytes, stream.raw),
            }
        };
        queued.result().map_err(failed("a plain copy"))?;
        stream.synchronize()
    }

    /// Whether every step's KV is brought to the host side, for comparing.
    pub fn set_publish(&mut self, on: bool) {
        self.options.publish = on;
    }
}
