//! The tables: what each row runs.

use anyhow::{Result, bail};
use engine::SamplingParams;
use engine::roofline::{self, Numbers, Work};

use super::measure::{Chunk, Drawing, Times, decodes, fill, prompts, time_of, times, tokens, with_batch};
use super::report::{Row, Table};
use super::{BLOCK_TOKENS, Ceilings, Kind, Measured, STEP_TOKENS, Settings};

/// Batches of the decode table.
const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
/// Prompts of the prefill table: how many, how long.
const PROMPTS: [(usize, usize); 8] =
    [(1, 128), (1, 512), (1, 1040), (1, 1500), (1, 2048), (1, 8192), (16, 2048), (8, 8192)];
/// Sequences that decode beside a prompt.
const BESIDE: usize = 128;

/// Measures one table.
pub(super) fn measure(
    kind: Kind,
    settings: &Settings,
    measured: &mut Measured,
    ceilings: &Ceilings,
    progress: &mut dyn FnMut(&str),
) -> Result<Table> {
    let mut bench = Bench { settings, measured, ceilings, progress };
    let (title, rows) = match kind {
        Kind::Prefill => ("prefill", bench.prefill()?),
        Kind::Decode => ("decode", bench.decode()?),
        Kind::Graphs => ("graphs", bench.graphs()?),
        Kind::Megakernel => ("one kernel for all layers", bench.megakernel()?),
        Kind::Chunk => ("chunk", bench.chunk()?),
        Kind::Int8 => ("eight bits", bench.eight_bits()?),
        Kind::Draw => ("drawing", bench.draw()?),
        Kind::Copies => bail!("copies are measured with an engine of their own"),
    };
    Ok(Table { title: title.into(), rows })
}

pub(super) fn chunk_of(chunk: &Chunk) -> roofline::Chunk {
    roofline::Chunk { position: chunk.position, tokens: chunk.tokens.len(), draws: chunk.draws }
}

struct Bench<'a> {
    settings: &'a Settings,
    measured: &'a mut Measured,
    ceilings: &'a Ceilings,
    progress: &'a mut dyn FnMut(&str),
}

impl Bench<'_> {
    fn time(&mut self, name: &str, steps: &[Vec<Chunk>], drawing: &Drawing) -> Result<Times> {
        (self.progress)(name);
        times(self.measured.engine(), steps, drawing, self.settings.runs)
    }

    /// A row of `steps`, with the sum of the steps' floors beside it.
    fn row(&mut self, name: String, steps: &[Vec<Chunk>], counted_tokens: usize) -> Result<Row> {
        self.row_drawn(name, steps, counted_tokens, &Drawing::default())
    }

    fn row_drawn(
        &mut self,
        name: String,
        steps: &[Vec<Chunk>],
        counted_tokens: usize,
        drawing: &Drawing,
    ) -> Result<Row> {
        let took = self.time(&name, steps, drawing)?;
        Ok(self.floored(name, steps, counted_tokens, took))
    }

    fn floored(&self, name: String, steps: &[Vec<Chunk>], counted_tokens: usize, took: Times) -> Row {
        let (config, weights) = (&self.settings.config, self.measured.streamed_bytes());
        let floors = steps.iter().map(|chunks| {
            let chunks: Vec<_> = chunks.iter().map(chunk_of).collect();
            // What the engine says it reads: it knows which of its weights are rounded.
            let work = Work::of(config, Numbers { kv: self.settings.kv_type(), ..Numbers::BF16 }, &chunks);
            Work { weight_bytes: weights as f64, ..work }.floor_ms(self.ceilings)
        });
        let floors: Option<Vec<_>> = floors.collect();
        let floor_ms = floors.as_ref().map(|all| all.iter().map(|floor| floor.0).sum::<f64>());
        let bound = floors.and_then(|all| all.first().map(|floor| floor.1.name().to_owned()));
        Row {
            tokens_per_second: counted_tokens as f64 / took.median_ms * 1e3,
            fraction: floor_ms.map(|floor| floor / took.median_ms),
            name,
            took,
            floor_ms,
            bound,
        }
    }

    fn prefill(&mut self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let wanted: Vec<_> = match self.settings.prompts.as_slice() {
            [] => PROMPTS.to_vec(),
            lengths => lengths.iter().map(|&length| (1, length)).collect(),
        };
        for (count, length) in wanted {
            let pool = self.measured.engine().kv().layout().blocks;
            if length > self.settings.max_prompt || count * length.div_ceil(BLOCK_TOKENS) > pool {
                continue;
            }
            let steps = prompts(count, length, self.settings.config.vocab, BLOCK_TOKENS, STEP_TOKENS);
            rows.push(self.row(format!("{count} × {length} tokens"), &steps, count * length)?);
        }
        Ok(rows)
    }

    fn fill(&mut self, batch: usize) -> Result<()> {
        (self.progress)("filling KV");
        let Settings { context, config, .. } = self.settings;
        fill(self.measured.engine(), batch, *context, config.vocab, BLOCK_TOKENS)
    }

    fn one_step(&self, batch: usize) -> Vec<Vec<Chunk>> {
        vec![decodes(batch, self.settings.context, self.settings.config.vocab, BLOCK_TOKENS)]
    }

    fn batches(&self) -> Vec<usize> {
        BATCHES.into_iter().filter(|&batch| batch <= self.settings.max_batch).collect()
    }

    fn decode(&mut self) -> Result<Vec<Row>> {
        self.fill(self.settings.max_batch)?;
        let mut rows = Vec::new();
        for batch in self.batches() {
            rows.push(self.row(format!("batch {batch}"), &self.one_step(batch), batch)?);
        }
        Ok(rows)
    }

    fn eight_bits(&mut self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for (count, length) in [(1, 2048), (16, 2048)] {
            let pool = self.measured.engine().kv().layout().blocks;
            if length <= self.settings.max_prompt && count * length.div_ceil(BLOCK_TOKENS) <= pool {
                let steps = prompts(count, length, self.settings.config.vocab, BLOCK_TOKENS, STEP_TOKENS);
                rows.push(self.row(format!("{count} × {length} tokens"), &steps, count * length)?);
            }
        }
        self.fill(self.settings.max_batch)?;
        for batch in [1, 128].into_iter().filter(|&batch| batch <= self.settings.max_batch) {
            rows.push(self.row(format!("decode batch {batch}"), &self.one_step(batch), batch)?);
        }
        Ok(rows)
    }

    /// What the draw costs a decode step, greedy and otherwise. Log-probabilities are the host's work, and are shown for what they cost.
    fn draw(&mut self) -> Result<Vec<Row>> {
        self.fill(self.settings.max_batch)?;
        let warm = SamplingParams { temperature: 0.8, ..SamplingParams::default() };
        let ways = [
            ("greedy", SamplingParams::default()),
            ("temperature", warm.clone()),
            ("top-p 0.9", SamplingParams { top_p: 0.9, ..warm.clone() }),
            ("top-k 40, top-p 0.9", SamplingParams { top_k: 40, top_p: 0.9, ..warm.clone() }),
            (
                "min-p 0.05, repetition 1.1",
                SamplingParams { min_p: 0.05, repetition_penalty: 1.1, ..warm.clone() },
            ),
            ("with 5 log-probabilities", SamplingParams { logprobs: Some(5), ..warm }),
        ];
        let (context, vocab) = (self.settings.context, self.settings.config.vocab);
        let mut rows = Vec::new();
        for batch in [1, 32, 128].into_iter().filter(|&batch| batch <= self.settings.max_batch) {
            for (name, params) in &ways {
                let drawing = Drawing { params: params.clone(), output: tokens(context, vocab, 7) };
                let name = format!("batch {batch}, {name}");
                rows.push(self.row_drawn(name, &self.one_step(batch), batch, &drawing)?);
            }
        }
        Ok(rows)
    }

    fn megakernel(&mut self) -> Result<Vec<Row>> {
        self.fill(self.settings.max_batch)?;
        let mut rows = Vec::new();
        for batch in self.batches().into_iter().filter(|batch| matches!(batch, 1 | 2 | 4)) {
            for (on, name) in [(true, "one kernel"), (false, "kernels apart")] {
                if !self.measured.set_megakernel(Some(on)) {
                    return Ok(rows);
                }
                rows.push(self.row(format!("batch {batch}, {name}"), &self.one_step(batch), batch)?);
            }
        }
        self.measured.set_megakernel(None);
        Ok(rows)
    }

    fn graphs(&mut self) -> Result<Vec<Row>> {
        self.fill(self.settings.max_batch)?;
        let mut rows = Vec::new();
        for batch in self.batches().into_iter().filter(|batch| matches!(batch, 1 | 8 | 32 | 128 | 256)) {
            for on in [true, false] {
                if !self.measured.set_graphs(on) {
                    return Ok(rows);
                }
                let name = format!("batch {batch}, graphs {}", if on { "on" } else { "off" });
                rows.push(self.row(name, &self.one_step(batch), batch)?);
            }
            self.measured.set_graphs(true);
            rows.extend(self.ahead(batch)?);
        }
        self.measured.set_graphs(true);
        Ok(rows)
    }

    /// A step that is queued while the one before it runs, so that the device never waits for the host.
    fn ahead(&mut self, batch: usize) -> Result<Option<Row>> {
        const STEPS: usize = 16;
        let name = format!("batch {batch}, graphs on, {STEPS} queued at once");
        (self.progress)(&name);
        let (steps, runs) = (self.one_step(batch), self.settings.runs);
        let Measured::Cuda(engine) = &mut *self.measured else { return Ok(None) };
        let took = with_batch(&steps[0], &Drawing::default(), |batch| {
            time_of(runs, STEPS, || Ok(engine.repeat(batch, STEPS)?))
        })?;
        let row = self.floored(name, &steps, batch, took);
        Ok(Some(row))
    }

    /// ITL of 128 sequences with a prompt of 8192 tokens beside them, for chunk sizes; 0 is decode alone. The chunk's
    /// prompt is half done: its attention costs what it costs on average.
    fn chunk(&mut self) -> Result<Vec<Row>> {
        let beside = BESIDE.min(self.settings.max_batch);
        self.fill(beside)?;
        let (context, vocab) = (self.settings.context, self.settings.config.vocab);
        let first = beside * (context + 1).div_ceil(BLOCK_TOKENS);
        let position = 4096.min(self.settings.max_prompt / 2);
        let mut rows = Vec::new();
        for size in [0, 128, 256, 512, 1024, 2048, 4096] {
            let mut step = decodes(beside, context, vocab, BLOCK_TOKENS);
            if size > 0 && position + size <= STEP_TOKENS {
                step.push(Chunk {
                    tokens: super::measure::tokens(size, vocab, 5),
                    position,
                    blocks: super::measure::table(first, position + size, BLOCK_TOKENS),
                    draws: false,
                });
            } else if size > 0 {
                continue;
            }
            rows.push(self.row(format!("{beside} decoding + chunk of {size}"), &[step], size.max(beside))?);
        }
        Ok(rows)
    }
}
