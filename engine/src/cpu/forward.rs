//! One step through the network: the layers' calls in order, each spread over the team.

use super::buffers::{Buffer, Buffer8, Buffers, MLP_ROWS, Side};
use super::marks::Marks;
use super::network::{Layer, Linear, Multiplied, Network};
use super::plan::Plan;
use super::region::KvRegion;
use super::simd::Kernels;
use super::simd::attention::{AttentionLayer, AttentionTask};
use super::simd::gemm::{Gemm, ROW_BLOCK};
use super::simd::int8::{EightRow, Gemm8, Kernels8};
use super::simd::rows::{NormRow, QkvRow, SwigluRow};
use super::team::Team;
use crate::KvMemory;
use crate::model::ModelConfig;
use crate::profile::Part;

/// Rows of a task of row work.
const ROWS_PER_TASK: usize = 8;

/// What a step works with.
pub(super) struct Step<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) network: &'a Network,
    pub(super) kv: &'a KvRegion,
    pub(super) kernels: &'static Kernels,
    pub(super) kernels8: &'static Kernels8,
    pub(super) team: &'a mut Team,
    pub(super) buffers: &'a mut Buffers,
    pub(super) marks: Option<&'a mut Marks>,
}

impl Step<'_> {
    /// Runs the plan; the logits of the wanted rows, `[wanted, vocab]`.
    pub(super) fn run(&mut self, plan: &Plan<'_>, on_layer: &mut dyn FnMut(usize)) -> Vec<Vec<f32>> {
        let network = self.network;
        self.mark(Part::Embed);
        self.embed(plan);
        for (index, layer) in network.layers.iter().enumerate() {
            let rows = plan.rows.len();
            self.norm(&layer.attention_norm, rows, &layer.qkv.weights);
            self.mark(Part::Qkv);
            self.linear(&layer.qkv, Side::Normed, Side::Qkv, rows);
            self.mark(Part::Rotate);
            self.write_kv(plan, index, layer);
            on_layer(index);
            if index + 1 < network.layers.len() {
                self.attend(&plan.tasks, index, &layer.o, rows);
                self.mlp(layer, rows);
            } else {
                self.keep_wanted(plan);
                self.attend(&plan.wanted_tasks, index, &layer.o, plan.wanted.len());
                self.mlp(layer, plan.wanted.len());
            }
        }
        let logits = self.logits(plan.wanted.len());
        self.mark(Part::End);
        logits
    }

    fn mark(&mut self, part: Part) {
        if let Some(marks) = &mut self.marks {
            marks.mark(part);
        }
    }

    /// Embeddings into `x`, angles into `cos` and `sin`.
    fn embed(&mut self, plan: &Plan<'_>) {
        let (half, factor) = (self.config.head_dim / 2, self.config.rope.attention_factor());
        let Buffers { x, cos, sin, frequencies, .. } = &mut *self.buffers;
        cos.clear();
        sin.clear();
        for (index, row) in plan.rows.iter().enumerate() {
            // SAFETY: `forward` admits no more tokens than the buffer has rows; nobody else uses it now.
            let out = unsafe { std::slice::from_raw_parts_mut(x.row(index), self.config.hidden) };
            self.network.embed(row.token, out);
            for frequency in &frequencies[..half] {
                let angle = f64::from(row.position as f32 * frequency);
                cos.push(angle.cos() as f32 * factor);
                sin.push(angle.sin() as f32 * factor);
            }
        }
    }

    /// `normed = norm(x)`, in INT8 too if the product that follows takes it.
    fn norm(&mut self, weight: &[f32], rows: usize, product: &Multiplied) {
        self.mark(Part::Norm);
        let (kernels, eps) = (self.kernels, self.config.rms_eps);
        let Buffers { x, normed, .. } = &*self.buffers;
        let rounding = Rounding::of(self.buffers, self.kernels8, Side::Normed, weight.len(), product);
        by_rows(self.team, rows, &|row| {
            // SAFETY: each row is visited once; `x` is only read.
            unsafe {
                (kernels.norm)(&NormRow { x: x.row(row), weight, eps, out: normed.row(row) });
                if let Some(rounding) = &rounding {
                    rounding.row(row);
                }
            }
        });
    }

    /// Norms and rotates heads, writes K and V of every row into its block.
    fn write_kv(&mut self, plan: &Plan<'_>, index: usize, layer: &Layer) {
        let (config, kernels, kv) = (self.config, self.kernels, self.kv);
        let half = config.head_dim / 2;
        let Buffers { qkv, cos, sin, .. } = &*self.buffers;
        let head_norms = layer.head_norms.as_ref().map(|(q, k)| (&q[..], &k[..], config.rms_eps));
        by_rows(self.team, plan.rows.len(), &|row| {
            let place = plan.rows[row];
            // SAFETY: each row is visited once. The block is one of the batch's, which the caller owns; no two
            // rows share a slot of it.
            unsafe {
                (kernels.qkv)(&QkvRow {
                    qkv: qkv.row(row),
                    heads: config.heads,
                    kv_heads: config.kv_heads,
                    head_dim: config.head_dim,
                    cos: &cos[row * half..][..half],
                    sin: &sin[row * half..][..half],
                    head_norms,
                    query_scale: 1.0 / (config.head_dim as f32).sqrt(),
                    block: kv.block(index, place.block),
                    block_tokens: kv.layout().block_tokens,
                    slot: place.slot,
                    dtype: kv.layout().dtype,
                });
            }
        });
    }

    /// `x += o(attention(q, kv))`.
    fn attend(&mut self, tasks: &[AttentionTask<'_>], index: usize, o: &Linear, rows: usize) {
        self.mark(Part::Attention);
        let (kernels, kv) = (self.kernels, self.kv);
        let Buffers { qkv, attended, .. } = &*self.buffers;
        let layer = AttentionLayer {
            layout: kv.layout(),
            kv: kv.block(index, 0),
            group: self.config.group(),
            window: self.config.windows[index],
            q: qkv.at(),
            ldq: qkv.stride,
            out: attended.at(),
            ldo: attended.stride,
        };
        // SAFETY: tasks write disjoint heads of rows; the KV they read was written before this loop.
        self.team.run(tasks.len(), &|task| unsafe { (kernels.attention)(&layer, &tasks[task]) });
        let width = self.config.heads * self.config.head_dim;
        if let Some(rounding) = Rounding::of(self.buffers, self.kernels8, Side::Attended, width, &o.weights) {
            // SAFETY: each row is visited once.
            by_rows(self.team, rows, &|row| unsafe { rounding.row(row) });
        }
        self.mark(Part::Output);
        self.linear(o, Side::Attended, Side::Residual, rows);
    }

    /// `x += down(silu(gate(norm(x))) · up(norm(x)))`.
    fn mlp(&mut self, layer: &Layer, rows: usize) {
        self.norm(&layer.mlp_norm, rows, &layer.gate_up.weights);
        for first in (0..rows).step_by(MLP_ROWS) {
            let count = MLP_ROWS.min(rows - first);
            self.mark(Part::GateUp);
            self.linear_from(&layer.gate_up, Side::Normed, Side::GateUp, count, first);
            self.mark(Part::Swiglu);
            let (kernels, ffn) = (self.kernels, self.config.ffn);
            let up = layer.gate_up.weights.n() / 2;
            let Buffers { gate_up, gated, .. } = &*self.buffers;
            let rounding = Rounding::of(self.buffers, self.kernels8, Side::Gated, ffn, &layer.down.weights);
            by_rows(self.team, count, &|row| {
                // SAFETY: each row is visited once; gate and up lie in the row.
                unsafe {
                    let gate = gate_up.row(row);
                    (kernels.swiglu)(&SwigluRow { gate, up: gate.add(up), out: gated.row(row), n: ffn });
                    if let Some(rounding) = &rounding {
                        rounding.row(row);
                    }
                }
            });
            self.mark(Part::Down);
            self.linear_from(&layer.down, Side::Gated, Side::Residual, count, first);
        }
    }

    /// The last layer's rest is computed for rows whose logits are wanted: they move to the front.
    fn keep_wanted(&mut self, plan: &Plan<'_>) {
        let (x, qkv) = (&self.buffers.x, &self.buffers.qkv);
        for (to, &(from, _)) in plan.wanted.iter().enumerate().filter(|(to, wanted)| *to != wanted.0) {
            // SAFETY: `to < from`, both rows of the buffers, different and so not overlapping.
            unsafe {
                std::ptr::copy_nonoverlapping(x.row(from), x.row(to), x.stride);
                std::ptr::copy_nonoverlapping(qkv.row(from), qkv.row(to), qkv.stride);
            }
        }
    }

    fn logits(&mut self, rows: usize) -> Vec<Vec<f32>> {
        let head = &self.network.head;
        self.norm(&self.network.norm, rows, head);
        self.mark(Part::Head);
        let mut logits: Vec<Vec<f32>> = Vec::new();
        // One row block at a time, so that the scratch is bounded.
        for first in (0..rows).step_by(ROW_BLOCK) {
            let count = ROW_BLOCK.min(rows - first);
            let (n, mut out) = (head.n(), vec![0.0f32; count * head.n()]);
            let target = Target { at: out.as_mut_ptr(), stride: n, bias: None, add: false };
            self.multiply(head, Side::Normed, first, count, &target);
            logits.extend(out.chunks_exact(n).map(<[f32]>::to_vec));
        }
        logits
    }

    fn linear(&mut self, linear: &Linear, from: Side, to: Side, rows: usize) {
        self.linear_from(linear, from, to, rows, 0);
    }

    /// One product; `first` is where the rows begin in buffers of all tokens.
    fn linear_from(&mut self, linear: &Linear, from: Side, to: Side, rows: usize, first: usize) {
        let row = |side: Side| if side.is_mlp() { 0 } else { first };
        let out = to.of(self.buffers);
        let target = Target {
            // SAFETY: a row of the buffer.
            at: unsafe { out.row(row(to)) },
            stride: out.stride,
            bias: linear.bias.as_deref(),
            add: to == Side::Residual,
        };
        self.multiply(&linear.weights, from, row(from), rows, &target);
    }

    /// Rows of a buffer from `start`, times weights.
    fn multiply(&mut self, weights: &Multiplied, from: Side, start: usize, rows: usize, to: &Target<'_>) {
        let (kernels, kernels8) = (self.kernels, self.kernels8);
        let (bias, out, ldo, add) = (to.bias, to.at, to.stride, to.add);
        match (weights, from.rounded(self.buffers)) {
            (Multiplied::Int8(weights), Some(rounded)) => {
                // SAFETY: `start` is a row of the buffer, which nobody writes during the product.
                let (a, groups) = unsafe { (rounded.row(start), rounded.groups(start)) };
                let (lda, group, ldg) = (rounded.stride, rounded.group, rounded.group_stride);
                let job = Gemm8 { a, lda, group, groups, ldg, weights, bias, out, ldo, add };
                // SAFETY: tasks cover disjoint rows or columns of `out`; `a` is only read.
                spread(self.team, rows, weights.panels(), &|r, p| unsafe { job.run(kernels8, r, p) });
            }
            (Multiplied::Brain(weights), _) => {
                let from = from.of(self.buffers);
                // SAFETY: `start` is a row of the buffer.
                let a = unsafe { from.row(start) };
                let job = Gemm { a, lda: from.stride, weights, bias, out, ldo, add };
                // SAFETY: as above.
                spread(self.team, rows, weights.panels(), &|r, p| unsafe { job.run(kernels, r, p) });
            }
            (Multiplied::Int8(_), None) => unreachable!("an INT8 network has buffers for its rows"),
        }
    }
}

/// Where a product goes.
struct Target<'a> {
    at: *mut f32,
    stride: usize,
    bias: Option<&'a [f32]>,
    /// Added to what is there.
    add: bool,
}

/// Rows on their way to INT8.
struct Rounding<'a> {
    kernels: &'static Kernels8,
    from: &'a Buffer,
    width: usize,
    turn: bool,
    to: &'a Buffer8,
}

impl<'a> Rounding<'a> {
    /// Of a side, where the product that takes it is in INT8.
    fn of(
        buffers: &'a Buffers,
        kernels: &'static Kernels8,
        side: Side,
        width: usize,
        product: &Multiplied,
    ) -> Option<Self> {
        let Multiplied::Int8(weights) = product else { return None };
        let to = side.rounded(buffers)?;
        Some(Self { kernels, from: side.of(buffers), width, turn: weights.turned, to })
    }

    /// # Safety
    /// A row of both buffers, whose numbers are there and which nobody else uses now.
    unsafe fn row(&self, row: usize) {
        // SAFETY: the caller's; the CPU has the kernels' instructions.
        unsafe {
            (self.kernels.quantise)(&EightRow {
                x: self.from.row(row),
                n: self.width,
                turn: self.turn,
                group: self.to.group,
                out: self.to.row(row),
                groups: self.to.groups(row),
            });
        }
    }
}

/// Spreads row work over the team.
fn by_rows(team: &mut Team, rows: usize, body: &(dyn Fn(usize) + Sync)) {
    let tasks = rows.div_ceil(ROWS_PER_TASK);
    team.run(tasks, &|task| (task * ROWS_PER_TASK..rows.min((task + 1) * ROWS_PER_TASK)).for_each(body));
}

/// Spreads a product over the team: row blocks × groups of panels.
fn spread(
    team: &mut Team,
    rows: usize,
    panels: usize,
    body: &(dyn Fn(std::ops::Range<usize>, std::ops::Range<usize>) + Sync),
) {
    let row_blocks = rows.div_ceil(ROW_BLOCK);
    // Some tasks per thread, so that a thread that is held up does not hold up the others.
    let groups = (8 * team.threads()).div_ceil(row_blocks.max(1)).clamp(1, panels);
    team.run(row_blocks * groups, &|task| {
        let (block, group) = (task / groups, task % groups);
        let rows = block * rows / row_blocks..(block + 1) * rows / row_blocks;
        body(rows, group * panels / groups..(group + 1) * panels / groups);
    });
}
