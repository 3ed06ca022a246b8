//! One step through the network: the kernels in order, queued on one stream.

use super::driver::{Event, Grid, Stream, args};
use super::fixed::Fixed;
use super::gemm::{Gemms, Shape};
use super::network::{Layer, Linear};
use super::plan::{List, Plan};
use super::profile::Profile;
use crate::profile::Part;
use crate::{EngineError, KvMemory};

/// Queues a step whose inputs are on the device.
pub(super) struct Step<'a> {
    pub(super) fixed: &'a Fixed,
    pub(super) gemms: &'a mut Gemms,
    pub(super) stream: &'a Stream,
    pub(super) plan: &'a Plan,
    /// Recorded when the KV of the layer is in the pool.
    pub(super) layer_events: Option<&'a [Event]>,
    /// Notes when each part begins.
    pub(super) profile: Option<&'a mut Profile>,
    /// One kernel makes all layers, where it can.
    pub(super) together: bool,
}

/// What goes into a product.
#[derive(Clone, Copy)]
enum X {
    /// bf16, there.
    Brain(u64),
    /// bf16, there, to be normed by these weights.
    Unnormed(u64, u64),
    /// Eight bits, in their buffer.
    Rounded,
}

impl Step<'_> {
    fn mark(&mut self, part: Part) -> Result<(), EngineError> {
        match &mut self.profile {
            Some(profile) => profile.mark(self.stream, part),
            None => Ok(()),
        }
    }

    /// Everything up to the logits and the greedy tokens of the wanted rows.
    pub(super) fn queue(&mut self) -> Result<(), EngineError> {
        let fixed = self.fixed;
        let (rows, buffers) = (self.plan.rows, &fixed.buffers);
        self.mark(Part::Embed)?;
        self.embed()?;
        // It cannot say when one of its layers is done.
        let whole = self.together && self.layer_events.is_none() && self.profile.is_none();
        if let Some(kernel) = fixed.megakernel.as_ref().filter(|kernel| whole && kernel.can(self.plan)) {
            kernel.queue(self)?;
            return self.head(buffers.x.at, rows);
        }
        for (index, layer) in fixed.network.layers.iter().enumerate() {
            self.mark(Part::Norm)?;
            let normed =
                self.norm_for(layer.qkv.shape(false, false), buffers.x.at, layer.attention_norm.at, rows)?;
            self.mark(Part::Qkv)?;
            self.linear(&layer.qkv, normed, buffers.qkv.at, rows, false, false)?;
            let last = index + 1 == fixed.network.layers.len();
            self.rotate_and_attend(index, layer, !last || !self.plan.wanted.is_empty())?;
            if !last {
                self.mark(Part::Output)?;
                self.linear(&layer.o, X::Brain(buffers.attended.at), buffers.x.at, rows, true, false)?;
                self.mlp(layer, buffers.x.at, rows)?;
            } else if !self.plan.wanted.is_empty() {
                self.mark(Part::Output)?;
                self.last(layer)?;
            }
        }
        self.mark(Part::End)
    }

    /// KV into the pool, then attention where `attends`: in one kernel where all rows are single tokens, and so few that their keys
    /// are split.
    fn rotate_and_attend(&mut self, index: usize, layer: &Layer, attends: bool) -> Result<(), EngineError> {
        let few = self.plan.tasks == 0 && self.fixed.splits(self.plan.decodes) > 1;
        let turns = attends && few && self.fixed.fast().is_some();
        if !turns {
            self.mark(Part::Rotate)?;
            self.rotate_and_store(index, layer)?;
            self.kv_is_final(index)?;
        }
        if attends {
            self.mark(Part::Attention)?;
            self.attend(index, turns.then_some(layer))?;
        }
        if turns { self.kv_is_final(index) } else { Ok(()) }
    }

    fn kv_is_final(&self, index: usize) -> Result<(), EngineError> {
        self.layer_events.map_or(Ok(()), |events| events[index].record(self.stream))
    }

    /// The last layer's rest and the head, for the wanted rows only.
    fn last(&mut self, layer: &Layer) -> Result<(), EngineError> {
        let fixed = self.fixed;
        let (buffers, config) = (&fixed.buffers, &fixed.config);
        let rows = self.plan.wanted.len();
        let (mut x, mut attended) = (buffers.x.at, buffers.attended.at);
        // Decode steps want every row: nothing to pick.
        if rows != self.plan.rows {
            self.pick(buffers.x_wanted.at, x, config.hidden)?;
            self.pick(buffers.normed.at, attended, config.heads * config.head_dim)?;
            (x, attended) = (buffers.x_wanted.at, buffers.normed.at);
        }
        self.linear(&layer.o, X::Brain(attended), x, rows, true, false)?;
        self.mlp(layer, x, rows)?;
        self.head(x, rows)
    }

    /// Logits of these rows, and the tokens that are greedily drawn.
    fn head(&mut self, x: u64, rows: usize) -> Result<(), EngineError> {
        let fixed = self.fixed;
        let (buffers, config) = (&fixed.buffers, &fixed.config);
        self.mark(Part::Norm)?;
        let head = &fixed.network.head;
        let normed = self.norm_for(head.shape(false, true), x, fixed.network.norm.at, rows)?;
        self.mark(Part::Head)?;
        self.linear(head, normed, buffers.logits.at, rows, false, true)?;
        self.mark(Part::Draw)?;
        let (out, logits, columns) = (buffers.tokens.at, buffers.logits.at, config.vocab as i32);
        let grid = Grid::new((rows, 1, 1), 1024);
        fixed.kernels.argmax.launch_chained(self.stream, grid, args![out, logits, columns])
    }

    pub(super) fn list(&self, list: List) -> u64 {
        self.fixed.buffers.inputs.at + 4 * self.plan.start(list) as u64
    }

    fn embed(&self) -> Result<(), EngineError> {
        let (x, table) = (self.fixed.buffers.x.at, self.fixed.network.embedding.product(0, 0).weights);
        let (tokens, width) = (self.list(List::Tokens), (self.fixed.config.hidden / 8) as i32);
        let epoch = self.fixed.epoch.at;
        let grid = Grid::new((self.plan.rows, 1, 1), 128);
        self.fixed.kernels.embed.launch(self.stream, grid, args![x, table, tokens, width, epoch])
    }

    fn pick(&self, out: u64, x: u64, width: usize) -> Result<(), EngineError> {
        let (from, width) = (self.list(List::Wanted), (width / 8) as i32);
        let grid = Grid::new((self.plan.wanted.len(), 1, 1), 128);
        self.fixed.kernels.pick_rows.launch_chained(self.stream, grid, args![out, x, from, width])
    }

    fn norm(&self, y: u64, x: u64, weight: u64, rows: usize) -> Result<(), EngineError> {
        let (width, eps) = ((self.fixed.config.hidden / 8) as i32, self.fixed.config.rms_eps);
        let threads = (width as u32).next_multiple_of(32).min(512);
        let grid = Grid::new((rows, 1, 1), threads);
        self.fixed.kernels.rms_norm.launch_chained(self.stream, grid, args![y, x, weight, width, eps])
    }

    fn linear(
        &mut self,
        linear: &Linear,
        x: X,
        out: u64,
        rows: usize,
        add: bool,
        wide: bool,
    ) -> Result<(), EngineError> {
        self.multiply(linear, linear.shape(add, wide), x, out, rows)
    }

    fn multiply(
        &mut self,
        linear: &Linear,
        shape: Shape,
        x: X,
        out: u64,
        rows: usize,
    ) -> Result<(), EngineError> {
        let buffers = &self.fixed.buffers;
        let (at, norm) = match x {
            X::Brain(x) => (x, 0),
            X::Unnormed(x, weight) => (x, weight),
            X::Rounded => (0, 0),
        };
        let mut product = linear.product(at, out);
        product.norm = (norm, self.fixed.config.rms_eps);
        product.rounded = (buffers.quantised.at, buffers.row_scales.at);
        if let X::Brain(x) = x
            && self.gemms.takes_rounded(shape, rows)
        {
            self.quantise(x, rows, linear.inputs())?;
        }
        self.gemms.run(self.stream, shape, rows, &product)
    }

    /// Rows of `width` numbers in eight bits, into their buffer.
    fn quantise(&self, x: u64, rows: usize, width: usize) -> Result<(), EngineError> {
        let (out, scales, width) =
            (self.fixed.buffers.quantised.at, self.fixed.buffers.row_scales.at, (width / 8) as i32);
        match &self.fixed.kernels.quantise {
            Some(kernels) => {
                let grid = Grid::new((rows, 1, 1), 256);
                kernels.rows.launch_chained(self.stream, grid, args![out, scales, x, width])
            }
            None => Ok(()),
        }
    }

    /// A norm, in the form that the product after it takes.
    fn norm_for(&mut self, next: Shape, x: u64, weight: u64, rows: usize) -> Result<X, EngineError> {
        if self.gemms.norms(next, rows) {
            return Ok(X::Unnormed(x, weight));
        }
        let (buffers, width) = (&self.fixed.buffers, self.fixed.config.hidden / 8);
        let kernels = self.fixed.kernels.quantise.as_ref();
        let fused = kernels.filter(|_| width <= 1024 && self.gemms.takes_rounded(next, rows));
        let Some(kernels) = fused else {
            self.norm(buffers.normed.at, x, weight, rows)?;
            return Ok(X::Brain(buffers.normed.at));
        };
        let (out, scales, eps) = (buffers.quantised.at, buffers.row_scales.at, self.fixed.config.rms_eps);
        let (grid, width) = (Grid::new((rows, 1, 1), (width as u32).next_multiple_of(32)), width as i32);
        kernels.norm.launch_chained(self.stream, grid, args![out, scales, x, weight, width, eps])?;
        Ok(X::Rounded)
    }

    /// `x += down(silu(gate(norm(x))) · up(norm(x)))`.
    fn mlp(&mut self, layer: &Layer, x: u64, rows: usize) -> Result<(), EngineError> {
        let fixed = self.fixed;
        let buffers = &fixed.buffers;
        self.mark(Part::Norm)?;
        let (gated, apart) = (layer.gate_up.gated_shape(), layer.gate_up.shape(false, false));
        let joined = self.gemms.joins(gated, rows);
        let normed = self.norm_for(if joined { gated } else { apart }, x, layer.mlp_norm.at, rows)?;
        self.mark(Part::GateUp)?;
        let fed = if joined {
            self.multiply(&layer.gate_up, gated, normed, buffers.gated.at, rows)?;
            self.mark(Part::Swiglu)?;
            self.rounded_for(&layer.down, buffers.gated.at, rows)?
        } else {
            self.multiply(&layer.gate_up, apart, normed, buffers.gate_up.at, rows)?;
            self.mark(Part::Swiglu)?;
            self.swiglu_for(&layer.down, rows)?
        };
        self.mark(Part::Down)?;
        self.linear(&layer.down, fed, x, rows, true, false)
    }

    /// Rows in the form that the product after them takes.
    fn rounded_for(&self, next: &Linear, x: u64, rows: usize) -> Result<X, EngineError> {
        if !self.gemms.takes_rounded(next.shape(true, false), rows) {
            return Ok(X::Brain(x));
        }
        self.quantise(x, rows, next.inputs())?;
        Ok(X::Rounded)
    }

    /// SwiGLU, in the form that the product after it takes.
    fn swiglu_for(&self, next: &Linear, rows: usize) -> Result<X, EngineError> {
        let (buffers, width) = (&self.fixed.buffers, self.fixed.config.ffn / 8);
        let kernels = self.fixed.kernels.quantise.as_ref();
        let Some(kernels) = kernels.filter(|_| self.gemms.takes_rounded(next.shape(true, false), rows))
        else {
            self.swiglu(rows)?;
            return Ok(X::Brain(buffers.gated.at));
        };
        let (out, scales, gate_up) = (buffers.quantised.at, buffers.row_scales.at, buffers.gate_up.at);
        let mut grid = Grid::new((rows, 1, 1), 512);
        grid.shared = (16 * width) as u32;
        let width = width as i32;
        kernels.swiglu.launch_chained(self.stream, grid, args![out, scales, gate_up, width])?;
        Ok(X::Rounded)
    }

    fn swiglu(&self, rows: usize) -> Result<(), EngineError> {
        let fixed = self.fixed;
        let vectors = fixed.config.ffn / 8;
        let (out, gate_up, width) = (fixed.buffers.gated.at, fixed.buffers.gate_up.at, vectors as i32);
        let grid = Grid::new((vectors.div_ceil(256), rows, 1), 256);
        fixed.kernels.swiglu.launch_chained(self.stream, grid, args![out, gate_up, width])
    }

    fn rotate_and_store(&self, index: usize, layer: &Layer) -> Result<(), EngineError> {
        const THREADS: usize = 128;
        let fixed = self.fixed;
        let config = &fixed.config;
        let (qkv, pool, angles) = (fixed.buffers.qkv.at, fixed.pool.layer(index), fixed.angles.at);
        let (positions, slots) = (self.list(List::Positions), self.list(List::Slots));
        let ((q_norm, k_norm), eps) = (layer.head_norms(), config.rms_eps);
        let (heads, kv_heads, dim) = (config.heads as i32, config.kv_heads as i32, config.head_dim as i32);
        let block_tokens = fixed.pool.layout().block_tokens as i32;
        let all = config.heads + 2 * config.kv_heads;
        // A thread takes 16 numbers of a head.
        let threads = all * config.head_dim / 16;
        let grid = Grid::new((threads.div_ceil(THREADS), self.plan.rows, 1), THREADS as u32);
        fixed.kernels.rotate_and_store.launch_chained(
            self.stream,
            grid,
            args![
                qkv,
                pool,
                angles,
                positions,
                slots,
                q_norm,
                k_norm,
                eps,
                heads,
                kv_heads,
                dim,
                block_tokens
            ],
        )
    }
}
