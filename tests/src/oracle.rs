//! What a request must give: the engine alone, one sequence, the whole prompt in one step.

use std::path::Path;

use engine::cpu::{CpuEngine, CpuOptions};
use engine::kv::convert::Conversion;
use engine::{Batch, Engine, KvDtype, KvMemory, SampleRequest, SamplingParams, Segment};
use kv_transport::Packing;

/// An engine of its own.
pub struct Oracle {
    engine: CpuEngine,
    table: Vec<u32>,
}

impl Oracle {
    /// For sequences of up to `max_tokens` tokens.
    pub fn new(dir: &Path, max_tokens: usize) -> Self {
        Self::of(dir, max_tokens, (16, KvDtype::Bf16))
    }

    /// One whose pool has blocks of that size and elements of that type.
    fn of(dir: &Path, max_tokens: usize, (block_tokens, kv_dtype): (usize, KvDtype)) -> Self {
        let blocks = max_tokens.div_ceil(block_tokens) + 1;
        let options = CpuOptions {
            kv_blocks: blocks,
            block_tokens,
            kv_dtype,
            threads: 1,
            max_batch_tokens: max_tokens,
            ..CpuOptions::default()
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
        let mut output = Vec::new();
        while output.len() < max_tokens && !output.last().is_some_and(|t| ends.contains(t)) {
            let token = self.next(prompt, &output, params, choice);
            output.push(token);
        }
        output
    }

    /// The token after `output`, with everything before its last token in the pool already.
    fn next(&mut self, prompt: &[u32], output: &[u32], params: &SamplingParams, choice: u32) -> u32 {
        let (tokens, position) = match output {
            [] => (prompt, 0),
            [.., last] => (std::slice::from_ref(last), prompt.len() + output.len() - 1),
        };
        let samples = [SampleRequest { params, prompt, output, banned: &[], constraint: None, choice }];
        let segment = Segment { tokens, position, blocks: &self.table, samples: &samples };
        let drawn = self.engine.forward(&Batch { segments: vec![segment] }, &mut |_| {}).unwrap();
        drawn[0][0].token
    }
}

/// Two engines whose pools differ: one computes the prompt, its KV is converted, the other one goes on.
pub struct Mixed {
    prefill: Oracle,
    decode: Oracle,
    packing: Option<Packing>,
}

impl Mixed {
    /// With pools of those block sizes and element types.
    pub fn new(dir: &Path, max_tokens: usize, from: (usize, KvDtype), to: (usize, KvDtype)) -> Self {
        let (prefill, decode) = (Oracle::of(dir, max_tokens, from), Oracle::of(dir, max_tokens, to));
        Self { prefill, decode, packing: None }
    }

    /// KV is packed and unpacked on its way, in rows of a head's vector.
    #[must_use]
    pub fn packed(self, name: &str) -> Self {
        let head_dim = self.decode.engine.kv().layout().head_dim;
        Self { packing: Packing::named(name, head_dim as u16), ..self }
    }

    /// The greedy output.
    pub fn generate(&mut self, prompt: &[u32], max_tokens: usize) -> Vec<u32> {
        let params = SamplingParams::default();
        let mut output = vec![self.prefill.next(prompt, &[], &params, 0)];
        let (from, to) = (self.prefill.engine.kv(), self.decode.engine.kv());
        let conversion = Conversion::between(*from.layout(), *to.layout()).unwrap();
        for layer in 0..to.layout().layers {
            for block in 0..to.layout().blocks_for(prompt.len()) {
                let source = |block| &*bytes(from.as_ref(), layer, block as u32);
                let made = bytes(to.as_ref(), layer, block as u32);
                conversion.fill(block, prompt.len(), source, made);
                if let Some(packing) = self.packing {
                    let mut packed = vec![0; packing.packed_bytes(made.len()).unwrap()];
                    packing.pack(made, &mut packed);
                    packing.unpack(&packed, made);
                }
            }
        }
        while output.len() < max_tokens {
            let token = self.decode.next(prompt, &output, &params, 0);
            output.push(token);
        }
        output
    }
}

/// A block of a layer, in a pool that nothing else uses now.
#[allow(clippy::mut_from_ref)]
fn bytes(kv: &dyn KvMemory, layer: usize, block: u32) -> &mut [u8] {
    let layout = kv.layout();
    let at = kv.host_address().unwrap().wrapping_add(layout.offset(layer, block));
    // SAFETY: within the pool, which lives as long as the borrow; each block is looked at once at a time.
    unsafe { std::slice::from_raw_parts_mut(at, layout.block_bytes()) }
}
