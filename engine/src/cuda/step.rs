//! One step through the network: the kernels in order, queued on one stream.

use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Device, Event, Grid, Memory, Stream, args};
use super::gemm::{Gemms, Shape};
use super::kernels::{FastAttention, Kernels};
use super::network::{Layer, Linear, Network};
use super::plan::{List, Plan, Tiling};
use super::pool::DevicePool;
use super::profile::{Part, Profile};
use super::{Attention, tensor_map};
use crate::model::ModelConfig;
use crate::{EngineError, KvLayout, KvMemory};

/// Queries of a block of the prefill kernels: mma.sync, Hopper.
const QUERIES: usize = 64;
const QUERIES_SM90: usize = 128;
/// Keys of a tile of the Hopper kernel, and tiles under way.
const KEYS_SM90: usize = 128;
const STAGES_SM90: usize = 2;
/// Blocks of decode attention that fill a multiprocessor.
const DECODE_BLOCKS: usize = 2;

/// Scratch of one step, for `rows` rows.
pub(super) struct Buffers {
    /// Residual stream, `[rows, hidden]` bf16.
    x: Memory,
    /// Normed residual stream; also attention's wanted rows.
    normed: Memory,
    /// `[rows, (heads + 2 · kv_heads) · dim]`
    qkv: Memory,
    /// `[rows, heads · dim]`
    attended: Memory,
    /// `[rows, 2 · ffn]`
    gate_up: Memory,
    /// `[rows, ffn]`
    gated: Memory,
    /// The wanted rows' residual stream.
    x_wanted: Memory,
    /// What goes into the next product, as e4m3 with a scale a row; empty without quantisation.
    quantised: Memory,
    row_scales: Memory,
    /// `[wanted, vocab]` f32
    pub(super) logits: Memory,
    /// `[wanted]` i32
    pub(super) tokens: Memory,
    /// Splits of decode attention: sums and statistics.
    partial: Memory,
    stats: Memory,
    /// [`Plan::numbers`].
    pub(super) inputs: Memory,
}

/// Sizes that the buffers are made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capacity {
    pub(super) rows: usize,
    /// Most rows whose logits are wanted at once.
    pub(super) wanted: usize,
    /// Most entries of [`Plan::numbers`].
    pub(super) inputs: usize,
    /// Room for quantised rows.
    pub(super) quantise: bool,
}

impl Buffers {
    pub(super) fn new(
        device: &Arc<Device>,
        config: &ModelConfig,
        capacity: Capacity,
    ) -> Result<Self, EngineError> {
        let Capacity { rows, wanted, inputs, quantise } = capacity;
        let quantised_rows = if quantise { rows } else { 0 };
        let attended = config.heads * config.head_dim;
        let qkv = attended + 2 * config.kv_heads * config.head_dim;
        let memory = |numbers: usize, size| Memory::new(device, numbers * size, "the step's buffers");
        let splits = wanted * config.heads + max_split_blocks(device) * 8;
        Ok(Self {
            x: memory(rows * config.hidden, 2)?,
            normed: memory(rows * config.hidden.max(attended), 2)?,
            // A box of the prefill kernel may reach beyond the last row.
            qkv: memory((rows + QUERIES_SM90) * qkv, 2)?,
            attended: memory(rows * attended, 2)?,
            gate_up: memory(rows * 2 * config.ffn, 2)?,
            gated: memory(rows * config.ffn, 2)?,
            x_wanted: memory(wanted * config.hidden, 2)?,
            quantised: memory(quantised_rows * config.hidden.max(attended).max(config.ffn), 1)?,
            row_scales: memory(quantised_rows, 4)?,
            logits: memory(wanted * config.vocab, 4)?,
            tokens: memory(wanted, 4)?,
            partial: memory(splits * config.head_dim, 4)?,
            stats: memory(splits, 8)?,
            inputs: memory(inputs, 4)?,
        })
    }
}

fn max_split_blocks(device: &Device) -> usize {
    device.multiprocessors as usize * DECODE_BLOCKS
}

/// What is fixed for every step.
pub(super) struct Fixed {
    pub(super) device: Arc<Device>,
    pub(super) config: ModelConfig,
    pub(super) kernels: Kernels,
    pub(super) network: Network,
    pub(super) pool: Arc<DevicePool>,
    pub(super) buffers: Buffers,
    /// cos and sin of every position.
    angles: Memory,
    maps: Option<Maps>,
    capacity: Capacity,
    attention: Attention,
}

/// How the Hopper kernel finds queries and KV.
struct Maps {
    q: sys::CUtensorMap,
    kv: sys::CUtensorMap,
}

impl Fixed {
    #[allow(clippy::too_many_arguments)] // Each is a part that only the engine's construction knows.
    pub(super) fn new(
        device: Arc<Device>,
        config: ModelConfig,
        kernels: Kernels,
        network: Network,
        pool: Arc<DevicePool>,
        capacity: Capacity,
        stream: &Stream,
        attention: Attention,
    ) -> Result<Self, EngineError> {
        let buffers = Buffers::new(&device, &config, capacity)?;
        let half = config.head_dim / 2;
        let angles = Memory::new(&device, config.max_context * half * 8, "the table of rotations")?;
        let frequencies = config.rope.frequencies(config.head_dim);
        let on_device = Memory::new(&device, half * 4, "the frequencies")?;
        stream.upload(on_device.at, &frequencies)?;
        let (to, from, count, factor) =
            (angles.at, on_device.at, half as i32, config.rope.attention_factor());
        let grid = Grid::new((config.max_context, 1, 1), 64);
        kernels.rotation_table.launch(stream, grid, args![to, from, count, factor])?;
        stream.synchronize()?;
        if let Some(fast) = &kernels.fast {
            fast.prefill.allow_shared(portable_shared_bytes(config.head_dim))?;
        }
        let mut fixed =
            Self { device, config, kernels, network, pool, buffers, angles, maps: None, capacity, attention };
        fixed.maps = fixed.hopper_maps(capacity.rows)?;
        Ok(fixed)
    }

    /// Measures every kind of product at these numbers of rows.
    pub(super) fn tune(&self, gemms: &mut Gemms, stream: &Stream, rows: &[usize]) -> Result<(), EngineError> {
        let (network, buffers) = (&self.network, &self.buffers);
        let upto = |most: usize| rows.iter().copied().filter(|&rows| rows <= most).collect::<Vec<_>>();
        let within = upto(self.capacity.rows);
        type Pick = fn(&Layer) -> &Linear;
        let kinds: [(Pick, u64, u64, bool); 4] = [
            (|layer| &layer.qkv, buffers.normed.at, buffers.qkv.at, false),
            (|layer| &layer.o, buffers.attended.at, buffers.x.at, true),
            (|layer| &layer.gate_up, buffers.normed.at, buffers.gate_up.at, false),
            (|layer| &layer.down, buffers.gated.at, buffers.x.at, true),
        ];
        for (pick, x, out, add) in kinds {
            let linear = pick(&network.layers[0]);
            let mut product = linear.product(x, out);
            if linear.is_quantised() {
                (product.x, product.scales.1) = (buffers.quantised.at, buffers.row_scales.at);
            }
            let weights: Vec<u64> =
                network.layers.iter().map(|layer| pick(layer).product(x, out).weights).collect();
            gemms.tune(stream, pick(&network.layers[0]).shape(add, false), &within, &product, &weights)?;
        }
        let gate_up = &network.layers[0].gate_up;
        let product = gate_up.product(buffers.normed.at, buffers.gated.at);
        let weights: Vec<u64> = network.layers.iter().map(|l| l.gate_up.product(0, 0).weights).collect();
        gemms.tune_gated(
            stream,
            gate_up.gated_shape(),
            gate_up.shape(false, false),
            &within,
            &product,
            &weights,
        )?;
        let product = network.head.product(buffers.normed.at, buffers.logits.at);
        let rows = upto(self.capacity.wanted);
        gemms.tune(stream, network.head.shape(false, true), &rows, &product, &[product.weights])
    }

    fn hopper_maps(&self, rows: usize) -> Result<Option<Maps>, EngineError> {
        let layout = *self.pool.layout();
        let fits = matches!(layout.block_tokens, 16 | 32 | 64 | 128) && self.attention == Attention::Best;
        let Some(kernel) = self.fast().and_then(|fast| fast.prefill_sm90.as_ref()).filter(|_| fits) else {
            return Ok(None);
        };
        let dim = layout.head_dim;
        kernel.allow_shared(hopper_shared_bytes(dim))?;
        let pool_rows = pool_rows(&layout);
        Ok(Some(Maps {
            q: tensor_map::of_rows(self.buffers.qkv.at, rows + QUERIES_SM90, self.qkv_width(), QUERIES_SM90)?,
            kv: tensor_map::of_rows(self.pool.layer(0), pool_rows, dim, layout.block_tokens)?,
        }))
    }

    /// The tensor-core kernels, where they know the head and block size.
    fn fast(&self) -> Option<&FastAttention> {
        let fits = self.pool.layout().block_tokens.is_multiple_of(16) && self.attention != Attention::Plain;
        self.kernels.fast.as_ref().filter(|_| fits)
    }

    pub(super) fn tiling(&self) -> Tiling {
        let queries = if self.maps.is_some() { QUERIES_SM90 } else { QUERIES };
        Tiling { queries, singles_apart: true }
    }

    fn qkv_width(&self) -> usize {
        (self.config.heads + 2 * self.config.kv_heads) * self.config.head_dim
    }

    /// How many ways decode attention is split along the keys, so that few sequences fill the device too.
    pub(super) fn splits(&self, sequences: usize) -> usize {
        let parts = self.config.group().div_ceil(8) * self.config.kv_heads;
        (max_split_blocks(&self.device) / (parts * sequences.max(1))).clamp(1, 64)
    }
}

/// The pool seen as rows of one head of one token.
fn pool_rows(layout: &KvLayout) -> usize {
    layout.total_bytes() / (layout.head_dim * layout.dtype.bytes())
}

/// Two tiles each of keys and values, rows padded by 16 bytes.
fn portable_shared_bytes(dim: usize) -> usize {
    4 * 64 * (dim + 8) * 2
}

/// `Shared<DIM>` of the Hopper kernel, and room to align it.
fn hopper_shared_bytes(dim: usize) -> usize {
    (QUERIES_SM90 + 2 * STAGES_SM90 * KEYS_SM90) * dim * 2 + 128 + 1024
}

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
        for (index, layer) in fixed.network.layers.iter().enumerate() {
            self.mark(Part::Norm)?;
            self.norm(buffers.normed.at, buffers.x.at, layer.attention_norm.at, rows)?;
            self.mark(Part::Qkv)?;
            self.linear(&layer.qkv, buffers.normed.at, buffers.qkv.at, rows, false, false)?;
            self.mark(Part::Rotate)?;
            self.rotate_and_store(index, layer)?;
            if let Some(events) = self.layer_events {
                events[index].record(self.stream)?;
            }
            if index + 1 < fixed.network.layers.len() {
                self.mark(Part::Attention)?;
                self.attend(index)?;
                self.mark(Part::Output)?;
                self.linear(&layer.o, buffers.attended.at, buffers.x.at, rows, true, false)?;
                self.mlp(layer, buffers.x.at, rows)?;
            } else if !self.plan.wanted.is_empty() {
                self.mark(Part::Attention)?;
                self.attend(index)?;
                self.mark(Part::Output)?;
                self.last(layer)?;
            }
        }
        self.mark(Part::End)
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
        self.linear(&layer.o, attended, x, rows, true, false)?;
        self.mlp(layer, x, rows)?;
        self.mark(Part::Norm)?;
        self.norm(buffers.normed.at, x, fixed.network.norm.at, rows)?;
        self.mark(Part::Head)?;
        self.linear(&fixed.network.head, buffers.normed.at, buffers.logits.at, rows, false, true)?;
        self.mark(Part::Draw)?;
        let (out, logits, columns) = (buffers.tokens.at, buffers.logits.at, config.vocab as i32);
        let grid = Grid::new((rows, 1, 1), 1024);
        fixed.kernels.argmax.launch_chained(self.stream, grid, args![out, logits, columns])
    }

    fn list(&self, list: List) -> u64 {
        self.fixed.buffers.inputs.at + 4 * self.plan.start(list) as u64
    }

    fn embed(&self) -> Result<(), EngineError> {
        let (x, table) = (self.fixed.buffers.x.at, self.fixed.network.embedding.product(0, 0).weights);
        let (tokens, width) = (self.list(List::Tokens), (self.fixed.config.hidden / 8) as i32);
        let grid = Grid::new((self.plan.rows, 1, 1), 128);
        self.fixed.kernels.embed.launch(self.stream, grid, args![x, table, tokens, width])
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
        x: u64,
        out: u64,
        rows: usize,
        add: bool,
        wide: bool,
    ) -> Result<(), EngineError> {
        let shape: Shape = linear.shape(add, wide);
        let mut product = linear.product(x, out);
        if linear.is_quantised() {
            (product.x, product.scales.1) = self.quantise(x, rows, linear.inputs())?;
        }
        self.gemms.run(self.stream, shape, rows, &product)
    }

    /// Rows of `width` numbers as e4m3: where they and their scales are.
    fn quantise(&self, x: u64, rows: usize, width: usize) -> Result<(u64, u64), EngineError> {
        let (out, scales, width) =
            (self.fixed.buffers.quantised.at, self.fixed.buffers.row_scales.at, (width / 8) as i32);
        if let Some(kernel) = &self.fixed.kernels.quantise {
            let grid = Grid::new((rows, 1, 1), 256);
            kernel.launch_chained(self.stream, grid, args![out, scales, x, width])?;
        }
        Ok((out, scales))
    }

    /// `x += down(silu(gate(norm(x))) · up(norm(x)))`.
    fn mlp(&mut self, layer: &Layer, x: u64, rows: usize) -> Result<(), EngineError> {
        let fixed = self.fixed;
        let buffers = &fixed.buffers;
        self.mark(Part::Norm)?;
        self.norm(buffers.normed.at, x, layer.mlp_norm.at, rows)?;
        self.mark(Part::GateUp)?;
        let gated = layer.gate_up.gated_shape();
        if self.gemms.knows(gated, rows) {
            let product = layer.gate_up.product(buffers.normed.at, buffers.gated.at);
            self.gemms.run(self.stream, gated, rows, &product)?;
        } else {
            self.linear(&layer.gate_up, buffers.normed.at, buffers.gate_up.at, rows, false, false)?;
            self.mark(Part::Swiglu)?;
            self.swiglu(rows)?;
        }
        self.mark(Part::Down)?;
        self.linear(&layer.down, buffers.gated.at, x, rows, true, false)
    }

    fn swiglu(&self, rows: usize) -> Result<(), EngineError> {
        let fixed = self.fixed;
        let vectors = fixed.config.ffn / 8;
        let (out, gate_up, width) = (fixed.buffers.gated.at, fixed.buffers.gate_up.at, vectors as i32);
        let grid = Grid::new((vectors.div_ceil(256), rows, 1), 256);
        fixed.kernels.swiglu.launch_chained(self.stream, grid, args![out, gate_up, width])
    }

    fn rotate_and_store(&self, index: usize, layer: &Layer) -> Result<(), EngineError> {
        const WARPS: usize = 8;
        let fixed = self.fixed;
        let config = &fixed.config;
        let (qkv, pool, angles) = (fixed.buffers.qkv.at, fixed.pool.layer(index), fixed.angles.at);
        let (positions, slots) = (self.list(List::Positions), self.list(List::Slots));
        let (q_norm, k_norm) = layer.head_norms.as_ref().map_or((0, 0), |(q, k)| (q.at, k.at));
        let eps = config.rms_eps;
        let (heads, kv_heads, dim) = (config.heads as i32, config.kv_heads as i32, config.head_dim as i32);
        let block_tokens = fixed.pool.layout().block_tokens as i32;
        let all = config.heads + 2 * config.kv_heads;
        let grid = Grid::new((all.div_ceil(WARPS), self.plan.rows, 1), 32 * WARPS as u32);
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

    fn attend(&self, index: usize) -> Result<(), EngineError> {
        let window = self.fixed.config.windows[index].unwrap_or(0) as i32;
        let scale = std::f32::consts::LOG2_E / (self.fixed.config.head_dim as f32).sqrt();
        match self.fixed.fast() {
            Some(fast) => {
                self.attend_decodes(fast, index, window, scale)?;
                self.attend_chunks(fast, index, window, scale)
            }
            None => self.attend_plainly(index, window, scale),
        }
    }

    fn attend_plainly(&self, index: usize, window: i32, scale: f32) -> Result<(), EngineError> {
        let fixed = self.fixed;
        let config = &fixed.config;
        let (out, q, pool) = (fixed.buffers.attended.at, fixed.buffers.qkv.at, fixed.pool.layer(index));
        let (tables, table_of_row) = (self.list(List::Tables), self.list(List::TableOfRow));
        let (positions, stride) = (self.list(List::Positions), self.fixed.qkv_width() as i32);
        let (heads, kv_heads, dim) = (config.heads as i32, config.kv_heads as i32, config.head_dim as i32);
        let block_tokens = fixed.pool.layout().block_tokens as i32;
        let mut grid = Grid::new((self.plan.rows, config.heads, 1), 32);
        grid.shared = 8 * config.head_dim as u32;
        fixed.kernels.attention_any.launch_chained(
            self.stream,
            grid,
            args![
                out,
                q,
                pool,
                tables,
                table_of_row,
                positions,
                stride,
                heads,
                kv_heads,
                dim,
                block_tokens,
                window,
                scale
            ],
        )
    }

    fn attend_decodes(
        &self,
        fast: &FastAttention,
        index: usize,
        window: i32,
        scale: f32,
    ) -> Result<(), EngineError> {
        let fixed = self.fixed;
        let (config, buffers) = (&fixed.config, &fixed.buffers);
        let sequences = self.plan.decodes;
        let splits = fixed.splits(sequences);
        let (out, partial, stats) = (buffers.attended.at, buffers.partial.at, buffers.stats.at);
        let (q, pool, tables) = (buffers.qkv.at, fixed.pool.layer(index), self.list(List::Tables));
        let (table_of_row, positions) = (self.list(List::TableOfRow), self.list(List::Positions));
        let (rows, stride) = (self.list(List::DecodeRows), fixed.qkv_width() as i32);
        let (heads, kv_heads) = (config.heads as i32, config.kv_heads as i32);
        let block_tokens = fixed.pool.layout().block_tokens as i32;
        let parts = config.kv_heads * config.group().div_ceil(8);
        fast.decode.launch_chained(
            self.stream,
            Grid::new((parts, splits, sequences), 128),
            args![
                out,
                partial,
                stats,
                q,
                pool,
                tables,
                table_of_row,
                positions,
                rows,
                stride,
                heads,
                kv_heads,
                block_tokens,
                window,
                scale
            ],
        )?;
        if splits == 1 {
            return Ok(());
        }
        let (grid, splits) = (Grid::new((config.heads, sequences, 1), config.head_dim as u32), splits as i32);
        fast.join.launch_chained(self.stream, grid, args![out, partial, stats, rows, splits])
    }

    fn attend_chunks(
        &self,
        fast: &FastAttention,
        index: usize,
        window: i32,
        scale: f32,
    ) -> Result<(), EngineError> {
        let fixed = self.fixed;
        let (config, layout) = (&fixed.config, fixed.pool.layout());
        let (out, tasks, tables) =
            (fixed.buffers.attended.at, self.list(List::Tasks), self.list(List::Tables));
        let (heads, kv_heads) = (config.heads as i32, config.kv_heads as i32);
        let block_tokens = layout.block_tokens as i32;
        let mut grid = Grid::new((config.heads, self.plan.tasks, 1), 128);
        if let (Some(kernel), Some(maps)) = (&fast.prefill_sm90, &fixed.maps) {
            let layer_row = (pool_rows(layout) / layout.layers * index) as i32;
            let block_shift = layout.block_tokens.trailing_zeros() as i32;
            let beyond = pool_rows(layout) as i32;
            grid.threads = 384;
            grid.shared = hopper_shared_bytes(layout.head_dim) as u32;
            return kernel.launch_chained(
                self.stream,
                grid,
                args![
                    out,
                    maps.q,
                    maps.kv,
                    tasks,
                    tables,
                    heads,
                    kv_heads,
                    block_shift,
                    layer_row,
                    beyond,
                    window,
                    scale
                ],
            );
        }
        let (q, pool, stride) = (fixed.buffers.qkv.at, fixed.pool.layer(index), fixed.qkv_width() as i32);
        grid.shared = portable_shared_bytes(layout.head_dim) as u32;
        fast.prefill.launch_chained(
            self.stream,
            grid,
            args![out, q, pool, tasks, tables, stride, heads, kv_heads, block_tokens, window, scale],
        )
    }
}
