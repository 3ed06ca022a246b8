//! Draws that the device makes from the logits of a step, with their log-probabilities, penalties, bans and constraints.

use std::f32::consts::LOG2_E;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::driver::{Device, Grid, Pinned, Stream, args};
use super::kernels::Drawing;
use super::plan::Plan;
use crate::sampling::{self, GREEDY_BELOW, MAX_LOGPROBS};
use crate::{Batch, Constraint, EngineError, SampleRequest, Sampled};

/// Draws and edits of one step that there is room for; the host makes those beyond.
const DRAWS: usize = 4096;
const EDITS: usize = 1 << 19;

/// `Draw` of `draw.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Draw {
    row: i32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    /// log2(e) / temperature; 0 takes the best token.
    rate: f32,
    padding: u32,
    unit: f64,
}

/// `Edit` of `draw.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Edit {
    row: i32,
    token: u32,
    bias: f32,
    repetition: f32,
    minus: f32,
    /// Whether the device writes `raw`, the logit before.
    keeps: i32,
    raw: f32,
}

/// `Drawn` of `draw.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Drawn {
    token: u32,
    logit: f32,
}

const MOST: usize = MAX_LOGPROBS as usize;

/// `Raw` of `draw.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Raw {
    best: f32,
    count: u32,
    total: u64,
    tokens: [u32; MOST],
    logits: [f32; MOST],
}

impl Raw {
    /// The logarithm of the sum of exp(logit).
    fn log_sum(&self) -> f64 {
        f64::from(self.best) + (self.total as f64 / 2f64.powi(40)).ln()
    }

    fn top(&self) -> Vec<(u32, f32)> {
        let count = self.count as usize;
        let mut top: Vec<_> =
            self.tokens.iter().copied().zip(self.logits.iter().copied()).take(count).collect();
        top.sort_unstable_by(sampling::best_first);
        let log_sum = self.log_sum();
        top.iter_mut().for_each(|(_, logit)| *logit = (f64::from(*logit) - log_sum) as f32);
        top
    }
}

/// Lists that the device reads where they are, and what it draws.
pub(super) struct Draws {
    vocab: usize,
    draws: Pinned,
    drawn: Pinned,
    edits: Pinned,
    /// Rows whose log-probabilities are wanted, with how many of the best; what comes of it.
    wants: Pinned,
    raws: Pinned,
    /// Rows that are masked, and their masks.
    masked: Pinned,
    masks: Pinned,
    used: Used,
}

/// How much of the lists the step at hand takes.
#[derive(Default)]
struct Used {
    draws: usize,
    edits: usize,
    raws: usize,
    masks: usize,
}

/// Where a step's wanted rows get their tokens from.
pub(super) enum Source {
    /// The largest logit, which every step finds.
    Best,
    Device(Place),
    /// The host, from the logits.
    Host,
}

/// Where a row's draws are on the lists: one for each of its requests.
pub(super) struct Place {
    draws: Range<usize>,
    edits: Range<usize>,
    raw: Option<usize>,
}

impl Draws {
    /// For at most `rows` wanted rows a step.
    pub(super) fn new(device: &Arc<Device>, vocab: usize, rows: usize) -> Result<Self, EngineError> {
        let list = |count: usize, each: usize| Pinned::new(device, count * each, "what draws need");
        Ok(Self {
            vocab,
            draws: list(DRAWS, size_of::<Draw>())?,
            drawn: list(DRAWS, size_of::<Drawn>())?,
            edits: list(EDITS, size_of::<Edit>())?,
            wants: list(rows, 8)?,
            raws: list(rows, size_of::<Raw>())?,
            masked: list(rows, 4)?,
            masks: list(rows * vocab.div_ceil(32), 4)?,
            used: Used::default(),
        })
    }

    /// Queues the draws of a step behind it; says where each wanted row's tokens will come from. The logits of rows that are drawn
    /// from may not be the model's afterwards.
    pub(super) fn queue(
        &mut self,
        stream: &Stream,
        kernels: &Drawing,
        logits: u64,
        (plan, batch): (&Plan, &Batch<'_>),
    ) -> Result<Vec<Source>, EngineError> {
        self.used = Used::default();
        let rows = plan.wanted_segments.iter().enumerate();
        let sources = rows.map(|(row, &index)| self.place(row as i32, batch.segments[index].samples));
        let sources: Vec<_> = sources.collect();
        let Used { draws, edits, raws, masks } = self.used;
        let columns = self.vocab as i32;
        let (out, list) = (self.raws.device_address(), self.wants.device_address());
        kernels.raw.launch(stream, Grid::new((raws, 1, 1), 1024), args![out, logits, list, columns])?;
        let (rows, list) = (self.masked.device_address(), self.masks.device_address());
        let (grid, words) = (Grid::new((8, masks, 1), 1024), self.vocab.div_ceil(32) as i32);
        kernels.mask.launch(stream, grid, args![logits, rows, list, words, columns])?;
        let (list, count) = (self.edits.device_address(), edits as i32);
        let grid = Grid::new((edits.div_ceil(256), 1, 1), 256);
        kernels.edit.launch(stream, grid, args![logits, list, count, columns])?;
        let (out, list) = (self.drawn.device_address(), self.draws.device_address());
        kernels.draw.launch(stream, Grid::new((draws, 1, 1), 1024), args![out, logits, list, columns])?;
        Ok(sources)
    }

    /// Puts what a row's requests need on the lists, if there is room and they change its logits alike.
    fn place(&mut self, row: i32, requests: &[SampleRequest<'_>]) -> Source {
        let Some(first) = requests.first().filter(|_| !requests.iter().all(sampling::is_argmax)) else {
            return Source::Best;
        };
        if !requests.iter().all(|other| changes_alike(first, other))
            || self.used.draws + requests.len() > DRAWS
        {
            return Source::Host;
        }
        let Some(edits) = self.place_edits(row, first) else { return Source::Host };
        let raw = first.params.logprobs.map(|count| {
            self.wants.as_mut_slice::<[i32; 2]>()[self.used.raws] = [row, count as i32];
            self.used.raws += 1;
            self.used.raws - 1
        });
        if let Some(constraint) = first.constraint {
            self.place_mask(row, first, constraint);
        }
        let start = self.used.draws;
        for request in requests {
            self.draws.as_mut_slice::<Draw>()[self.used.draws] = draw_of(row, request);
            self.used.draws += 1;
        }
        Source::Device(Place { draws: start..self.used.draws, edits, raw })
    }

    fn place_edits(&mut self, row: i32, request: &SampleRequest<'_>) -> Option<Range<usize>> {
        let start = self.used.edits;
        if !sampling::is_edited(request) {
            return Some(start..start);
        }
        let (list, keeps) =
            (sampling::edits(request, self.vocab), i32::from(request.params.logprobs.is_some()));
        let room = self.edits.as_mut_slice::<Edit>().get_mut(start..start + list.len())?;
        for (to, (token, sampling::Edit { bias, repetition, minus })) in room.iter_mut().zip(list) {
            *to = Edit { row, token, bias, repetition, minus, keeps, raw: 0.0 };
        }
        self.used.edits += room.len();
        Some(start..self.used.edits)
    }

    fn place_mask(&mut self, row: i32, request: &SampleRequest<'_>, constraint: &dyn Constraint) {
        let (words, at) = (self.vocab.div_ceil(32), self.used.masks);
        let mut logits = vec![0.0; self.vocab];
        constraint.restrict(request.choice, request.output, &mut logits);
        let mask = &mut self.masks.as_mut_slice::<u32>()[at * words..][..words];
        for (word, logits) in mask.iter_mut().zip(logits.chunks(32)) {
            let bit = |(at, logit): (usize, &f32)| u32::from(*logit != f32::NEG_INFINITY) << at;
            *word = logits.iter().enumerate().map(bit).sum();
        }
        self.masked.as_mut_slice::<i32>()[at] = row;
        self.used.masks += 1;
    }

    /// What a row's requests drew; the stream must have passed it.
    pub(super) fn drawn(&self, place: &Place) -> Vec<Sampled> {
        let raw = place.raw.map(|at| self.raws.as_slice::<Raw>()[at]);
        let edits = &self.edits.as_slice::<Edit>()[place.edits.clone()];
        let sampled = |&Drawn { token, logit }: &Drawn| {
            let Some(raw) = &raw else {
                return Sampled { token, logprob: f32::NAN, top: Vec::new() };
            };
            // Log-probabilities are the model's.
            let logit = edits.iter().find(|edit| edit.token == token).map_or(logit, |edit| edit.raw);
            Sampled { token, logprob: (f64::from(logit) - raw.log_sum()) as f32, top: raw.top() }
        };
        self.drawn.as_slice::<Drawn>()[place.draws.clone()].iter().map(sampled).collect()
    }
}

/// Whether two requests of one row leave it the same logits to draw from, and want the same to be known of it: choices of one request do.
fn changes_alike(first: &SampleRequest<'_>, other: &SampleRequest<'_>) -> bool {
    let constraint =
        |request: &SampleRequest<'_>| request.constraint.map(|c| std::ptr::from_ref(c).cast::<()>());
    let same = first.params == other.params && constraint(first) == constraint(other);
    same && (first.prompt, first.output, first.banned) == (other.prompt, other.output, other.banned)
}

fn draw_of(row: i32, request: &SampleRequest<'_>) -> Draw {
    let params = request.params;
    let greedy = params.temperature < GREEDY_BELOW;
    Draw {
        row,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        rate: if greedy { 0.0 } else { LOG2_E / params.temperature },
        padding: 0,
        unit: sampling::unit(request),
    }
}
