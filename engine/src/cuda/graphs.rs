//! Decode steps captured as graphs, one per batch size: one launch instead of some hundred.

use std::collections::HashMap;

use cudarc::driver::{result, sys};

use super::driver::{Event, Stream, failed};
use super::fixed::Fixed;
use super::gemm::Gemms;
use super::plan::Plan;
use super::step::Step;
use crate::EngineError;

/// The graphs that exist, by rows.
pub(super) struct Graphs {
    sizes: Vec<usize>,
    /// And by whether one kernel makes all layers.
    captured: HashMap<(usize, bool), Graph>,
}

impl Graphs {
    /// Sizes for up to `most` sequences: fine where a step costs little, coarser above.
    pub(super) fn new(most: usize) -> Self {
        let fine = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256];
        let coarse = (320..).step_by(64);
        let mut sizes: Vec<usize> = fine.into_iter().chain(coarse).take_while(|&size| size < most).collect();
        sizes.push(most);
        Self { sizes, captured: HashMap::new() }
    }

    pub(super) fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// The smallest size with room for this many sequences.
    pub(super) fn size_for(&self, sequences: usize) -> Option<usize> {
        self.sizes.iter().copied().find(|&size| size >= sequences)
    }

    /// Queues the step of `size` rows, whose inputs are on the device. Captures it if it was not yet.
    pub(super) fn run(
        &mut self,
        fixed: &Fixed,
        gemms: &mut Gemms,
        stream: &Stream,
        size: usize,
        together: bool,
    ) -> Result<(), EngineError> {
        let together = together && Self::differs(fixed, size);
        if !self.captured.contains_key(&(size, together)) {
            self.capture(fixed, gemms, stream, size, together)?;
        }
        let graph = &self.captured[&(size, together)];
        // SAFETY: instantiated in `capture`; its kernels use the engine's buffers, which outlive it.
        unsafe { result::graph::launch(graph.ready, stream.raw) }.map_err(failed("launching a graph"))
    }

    /// Whether there are two ways to make steps of this size.
    pub(super) fn differs(fixed: &Fixed, size: usize) -> bool {
        fixed.megakernel.as_ref().is_some_and(|kernel| kernel.has_room(size))
    }

    /// Milliseconds of a step, the best of some; captures it.
    pub(super) fn time(
        &mut self,
        fixed: &Fixed,
        gemms: &mut Gemms,
        stream: &Stream,
        size: usize,
        together: bool,
    ) -> Result<f32, EngineError> {
        let (start, end) = (Event::new(true)?, Event::new(true)?);
        let mut best = f32::INFINITY;
        for _ in 0..5 {
            start.record(stream)?;
            self.run(fixed, gemms, stream, size, together)?;
            end.record(stream)?;
            end.synchronize()?;
            best = best.min(end.since(&start)?);
        }
        Ok(best)
    }

    pub(super) fn capture(
        &mut self,
        fixed: &Fixed,
        gemms: &mut Gemms,
        stream: &Stream,
        size: usize,
        together: bool,
    ) -> Result<(), EngineError> {
        let plan = Plan::decode_of(size);
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives; capture ends below whatever happens.
        unsafe { result::stream::begin_capture(stream.raw, mode) }.map_err(failed("capturing a step"))?;
        let queued =
            Step { fixed, gemms, stream, plan: &plan, layer_events: None, profile: None, together }.queue();
        // SAFETY: begun above.
        let template = unsafe { result::stream::end_capture(stream.raw) }.map_err(failed("capturing a step"));
        queued?;
        let template = template?;
        let flags = sys::CUgraphInstantiate_flags_enum::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // SAFETY: a whole graph; nothing in it allocates, so the flag changes nothing.
        let ready = unsafe { result::graph::instantiate(template, flags) };
        let ready = ready.map_err(failed("preparing a graph"))?;
        self.captured.insert((size, together), Graph { template, ready });
        Ok(())
    }
}

struct Graph {
    template: sys::CUgraph,
    ready: sys::CUgraphExec,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `capture`; the engine synchronises before it is dropped.
        unsafe {
            let _ = result::graph::exec_destroy(self.ready);
            let _ = result::graph::destroy(self.template);
        }
    }
}

// SAFETY: graph handles have no thread affinity.
unsafe impl Send for Graph {}
