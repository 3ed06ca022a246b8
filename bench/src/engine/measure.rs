//! Timing steps of an engine.

use std::time::Instant;

use anyhow::Result;
use engine::{Batch, Engine, SampleRequest, SamplingParams, Segment};
use serde::Serialize;

/// Median, fastest and slowest of some runs, milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Times {
    /// Half of the runs were faster.
    pub median_ms: f64,
    /// The fastest run.
    pub fastest_ms: f64,
    /// The slowest run.
    pub slowest_ms: f64,
}

impl Times {
    pub(super) fn of(mut all: Vec<f64>) -> Self {
        all.sort_by(f64::total_cmp);
        let at = |i: usize| all.get(i).copied().unwrap_or_default();
        Self { median_ms: at(all.len() / 2), fastest_ms: at(0), slowest_ms: at(all.len().saturating_sub(1)) }
    }
}

/// Random tokens of a vocabulary, the same in every run (SplitMix64's finaliser on the index).
pub fn tokens(count: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let token = |i: u64| {
        let mut z = (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (z ^ (z >> 31)) % vocab as u64
    };
    (0..count as u64).map(|i| token(i) as u32).collect()
}

/// A piece of a sequence to run in a step.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// The tokens to run.
    pub tokens: Vec<u32>,
    /// Position of the first.
    pub position: usize,
    /// Block table.
    pub blocks: Vec<u32>,
    /// Draws a token at its end.
    pub draws: bool,
}

/// How tokens are drawn, and after which others.
#[derive(Default)]
pub struct Drawing {
    /// Greedy by default.
    pub params: SamplingParams,
    /// What penalties look at.
    pub output: Vec<u32>,
}

/// Runs one step to its end.
pub fn step(engine: &mut dyn Engine, chunks: &[Chunk], drawing: &Drawing) -> Result<()> {
    with_batch(chunks, drawing, |batch| engine.forward(batch, &mut |_| {}))?;
    Ok(())
}

/// Calls `run` with the chunks as a batch.
pub fn with_batch<T>(chunks: &[Chunk], drawing: &Drawing, run: impl FnOnce(&Batch<'_>) -> T) -> T {
    let draw = [SampleRequest {
        params: &drawing.params,
        prompt: &[],
        output: &drawing.output,
        banned: &[],
        constraint: None,
        choice: 0,
    }];
    let segments = chunks.iter().map(|chunk| Segment {
        tokens: &chunk.tokens,
        position: chunk.position,
        blocks: &chunk.blocks,
        samples: if chunk.draws { &draw } else { &[] },
    });
    run(&Batch { segments: segments.collect() })
}

/// Times `runs` runs of these steps in a row after one that is not counted.
pub fn times(engine: &mut dyn Engine, steps: &[Vec<Chunk>], drawing: &Drawing, runs: usize) -> Result<Times> {
    time_of(runs, 1, || steps.iter().try_for_each(|chunks| step(engine, chunks, drawing)))
}

/// Times `runs` calls after one that is not counted; each is `parts` of what is timed.
pub fn time_of(runs: usize, parts: usize, mut call: impl FnMut() -> Result<()>) -> Result<Times> {
    let mut all = Vec::with_capacity(runs);
    for run in 0..=runs {
        let started = Instant::now();
        call()?;
        if run > 0 {
            all.push(started.elapsed().as_secs_f64() * 1e3 / parts as f64);
        }
    }
    Ok(Times::of(all))
}

/// Blocks `first..` for `count` tokens.
pub fn table(first: usize, count: usize, block_tokens: usize) -> Vec<u32> {
    (first..first + count.div_ceil(block_tokens)).map(|block| block as u32).collect()
}

/// Prompts of `length`, each in its own blocks, packed into steps of at most `step_tokens` tokens.
pub fn prompts(
    count: usize,
    length: usize,
    vocab: usize,
    block_tokens: usize,
    step_tokens: usize,
) -> Vec<Vec<Chunk>> {
    let each = length.div_ceil(block_tokens);
    let mut steps: Vec<Vec<Chunk>> = vec![Vec::new()];
    let mut room = step_tokens;
    for prompt in 0..count {
        let all = tokens(length, vocab, prompt as u64);
        let mut done = 0;
        while done < length {
            if room == 0 {
                steps.push(Vec::new());
                room = step_tokens;
            }
            let take = room.min(length - done);
            let blocks = table(prompt * each, length, block_tokens);
            let draws = done + take == length;
            let chunk = Chunk { tokens: all[done..done + take].to_vec(), position: done, blocks, draws };
            steps.last_mut().unwrap_or(&mut Vec::new()).push(chunk);
            done += take;
            room -= take;
        }
    }
    steps
}

/// One token for each of `batch` sequences at `position`, in blocks from `first` on.
pub fn decodes(batch: usize, position: usize, vocab: usize, block_tokens: usize) -> Vec<Chunk> {
    let each = (position + 1).div_ceil(block_tokens);
    let token = tokens(batch, vocab, 99);
    let chunk = |i: usize| Chunk {
        tokens: vec![token[i]],
        position,
        blocks: table(i * each, position + 1, block_tokens),
        draws: true,
    };
    (0..batch).map(chunk).collect()
}

/// Fills the KV of `batch` sequences up to `position`: the first by computing it, the others by copies, since
/// random numbers of the right size are all that timing needs.
pub fn fill(
    engine: &mut dyn Engine,
    batch: usize,
    position: usize,
    vocab: usize,
    block_tokens: usize,
) -> Result<()> {
    let each = (position + 1).div_ceil(block_tokens);
    for chunks in prompts(1, position, vocab, block_tokens, 2048) {
        step(engine, &chunks, &Drawing::default())?;
    }
    let pairs: Vec<(u32, u32)> =
        (each..batch * each).map(|block| ((block % each) as u32, block as u32)).collect();
    pairs.chunks(1024).try_for_each(|pairs| engine.copy_blocks(pairs))?;
    Ok(())
}
