//! What a request must give: the engine alone, one sequence, the whole prompt in one step.

use std::path::Path;

use engine::cpu::{CpuEngine, CpuOptions};
use engine::{Batch, Engine, KvDtype, SampleRequest, SamplingParams, Segment};

/// An engine of its own.
pub struct Oracle {
    engine: CpuEngine,
    table: Vec<u32>,
}

impl Oracle {
    /// For sequences of up to `max_tokens` tokens.
    pub fn new(dir: &Path, max_tokens: usize) -> Self {
        let blocks = max_tokens.div_ceil(16) + 1;
        let options = CpuOptions {
            kv_blocks: blocks,
            block_tokens: 16,
            kv_dtype: KvDtype::Bf16,
            threads: 1,
            max_batch_tokens: max_tokens,
            quantise: None,
        };
        Self { engine: CpuEngine::load(dir, options).unwrap(), table: (0..blocks as u32).collect() }
    }

    /// The output of one choice.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        params: &SamplingParams,
        choice: u32,
        max_tokens: usize,
        ends: &[u32],
    ) -> Vec<u32> {
        let mut output: Vec<u32> = Vec::new();
        let mut position = 0;
        let mut next = prompt.to_vec();
        while output.len() < max_tokens && !output.last().is_some_and(|t| ends.contains(t)) {
            let samples =
                [SampleRequest { params, prompt, output: &output, banned: &[], constraint: None, choice }];
            let segment = Segment { tokens: &next, position, blocks: &self.table, samples: &samples };
            let drawn = self.engine.forward(&Batch { segments: vec![segment] }, &mut |_| {}).unwrap();
            position += next.len();
            next = vec![drawn[0][0].token];
            output.push(next[0]);
        }
        output
    }
}
