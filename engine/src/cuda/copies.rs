//! How fast KV goes between the device and its host side, beside plain copies of as many bytes.

use cudarc::driver::{result::DriverError, sys};

use super::driver::{Event, Stream, failed};
use super::{CudaEngine, EngineError};
use crate::KvMemory;

/// One way of copying, run some times.
pub struct Copied {
    /// What was copied, and how.
    pub what: &'static str,
    /// Each run.
    pub milliseconds: Vec<f64>,
    /// Whether this is the plain copy that those after it are compared with.
    pub plain: bool,
}

impl CudaEngine {
    /// Copies all layers of `blocks` to the host side and back, `runs` times in turn: plainly (as many bytes in one piece), as a worker
    /// does block by block, and with the checksums that go with it. For measuring: the blocks' contents are lost.
    pub fn copies(&mut self, blocks: &[u32], runs: usize) -> Result<Vec<Copied>, EngineError> {
        let ids = self.known(blocks.iter().copied())?;
        let (at, count) = (self.upload_blocks(&ids)?, ids.len());
        let pool = self.fixed.pool.as_ref();
        let layers = 0..pool.layers();
        let bytes = pool.layers() * count * pool.layout().block_bytes();
        let host = pool
            .host_address()
            .ok_or_else(|| EngineError::Unsupported("a pool without a host side".into()))?;
        let each = |copy: &dyn Fn(usize) -> Result<(), EngineError>| layers.clone().try_for_each(copy);
        // SAFETY: both sides hold the whole pool, which is at least as large as these blocks.
        let to_host = |stream: &Stream| unsafe {
            sys::cuMemcpyDtoHAsync_v2(host.cast(), pool.layer(0), bytes, stream.raw).result()
        };
        // SAFETY: as above.
        let to_device = |stream: &Stream| unsafe {
            sys::cuMemcpyHtoDAsync_v2(pool.layer(0), host.cast(), bytes, stream.raw).result()
        };
        let plainly = |copied: Result<(), DriverError>| copied.map_err(failed("a plain copy"));
        let stream = &self.copies;
        type Way<'a> = (&'static str, bool, &'a dyn Fn() -> Result<(), EngineError>);
        let ways: [Way<'_>; 6] = [
            ("to the host, plain", true, &|| plainly(to_host(stream))),
            ("to the host, blocks", false, &|| each(&|layer| pool.bring(stream, layer, at, count))),
            ("to the host, blocks and checksums", false, &|| {
                each(&|layer| pool.publish(stream, layer, at, count))
            }),
            ("to the device, plain", true, &|| plainly(to_device(stream))),
            ("to the device, blocks", false, &|| each(&|layer| pool.load(stream, layer, at, count))),
            ("to the device, blocks and checksums", false, &|| {
                each(&|layer| {
                    pool.load(stream, layer, at, count)
                        .and_then(|()| pool.checksums(stream, layer, at, count))
                })
            }),
        ];
        let mut all: Vec<Copied> =
            ways.iter().map(|&(what, plain, _)| Copied { what, milliseconds: Vec::new(), plain }).collect();
        let (start, end) = (Event::new(true)?, Event::new(true)?);
        for run in 0..=runs {
            for (copied, (_, _, copy)) in all.iter_mut().zip(&ways) {
                start.record(stream)?;
                copy()?;
                end.record(stream)?;
                end.synchronize()?;
                // The first warms up.
                if run > 0 {
                    copied.milliseconds.push(f64::from(end.since(&start)?));
                }
            }
        }
        Ok(all)
    }

    /// Whether every step's KV is brought to the host side, for comparing.
    pub fn set_publish(&mut self, on: bool) {
        self.options.publish = on;
    }
}
