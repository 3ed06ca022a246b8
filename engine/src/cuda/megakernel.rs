//! All layers of a decode step of a few sequences in one kernel, which keeps memory busy across products: `kernels/megakernel.cu`.

use super::driver::{Grid, Kernel, Memory, Stream, args, clear};
use super::fixed::Fixed;
use super::gemm::Operands;
use super::network::{Layer, Linear};
use super::plan::{List, Plan};
use super::step::Step;
use crate::model::ModelConfig;
use crate::{EngineError, KvDtype, KvMemory};

/// Most rows of a step.
pub(super) const MOST: usize = 4;
/// Warps that compute, and threads of a block: those, and four warps that fetch.
const WARPS: usize = 8;
const THREADS: u32 = 384;
/// As in the kernel: rows of a tile, bytes of a piece of a row, bytes of a stage of the ring, numbers of a fragment along k.
const ROWS: usize = 16;
const PIECE: usize = 1024;
const STAGE: usize = ROWS * (PIECE + 64);
const UNIT: usize = 64;
/// Shared memory of a block on Hopper.
const SHARED: usize = 227 * 1024;
/// Most of it that rows of x take.
const MOST_X: usize = 96 * 1024;
/// A ring of less would not bridge anything.
const FEWEST_STAGES: usize = 4;
const MOST_STAGES: usize = 16;

/// The kernel, with what it works on.
pub(super) struct Megakernel {
    kernel: Kernel,
    /// `LayerOf` each.
    layers: Memory,
    /// What blocks hand to each other, as `StepOf` has it.
    words: [Memory; 6],
    blocks: usize,
    /// By rows.
    rooms: [Option<Room>; MOST + 1],
}

/// `Matrix` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct MatrixOf {
    weights: u64,
    scales: u64,
    bias: u64,
}

impl MatrixOf {
    fn new(linear: &Linear) -> Self {
        let product = linear.product(0, 0);
        Self { weights: product.weights, scales: product.scales, bias: product.bias }
    }
}

/// `Layer` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct LayerOf {
    qkv: MatrixOf,
    o: MatrixOf,
    gate_up: MatrixOf,
    down: MatrixOf,
    norms: [u64; 4],
    pool: u64,
    window: i64,
}

impl LayerOf {
    fn new(layer: &Layer, pool: u64, window: Option<usize>) -> Self {
        let (q_norm, k_norm) = layer.head_norms();
        Self {
            qkv: MatrixOf::new(&layer.qkv),
            o: MatrixOf::new(&layer.o),
            gate_up: MatrixOf::new(&layer.gate_up),
            down: MatrixOf::new(&layer.down),
            norms: [layer.attention_norm.at, layer.mlp_norm.at, q_norm, k_norm],
            pool,
            window: window.unwrap_or(0) as i64,
        }
    }
}

/// `Step` of the kernel.
#[repr(C)]
struct StepOf {
    layers: u64,
    epoch: u64,
    x: u64,
    /// Hidden, q k and v, attended, gated, of two numbers each; partial and statistics of attention, of one.
    words: [u64; 6],
    /// Tables, table of row, positions, decode rows.
    lists: [u64; 4],
    angles: u64,
    count: i32,
    rows: i32,
    width: i32,
    ffn: i32,
    heads: i32,
    kv_heads: i32,
    block_tokens: i32,
    splits: i32,
    x_bytes: i32,
    held: i32,
    stages: i32,
    eps: f32,
    scale_log2: f32,
}

/// How a block's shared memory is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Room {
    x_bytes: usize,
    /// Tiles whose sums stay while x comes in parts.
    held: usize,
    stages: usize,
    /// In all.
    bytes: usize,
}

impl Room {
    /// For steps of `rows` rows by `blocks` blocks. `None`: there is not enough.
    fn new(
        config: &ModelConfig,
        operands: Operands,
        kv: KvDtype,
        blocks: usize,
        rows: usize,
    ) -> Option<Self> {
        if rows == 0 {
            return None;
        }
        let (eight, inner) = (operands != Operands::Bf16, config.heads * config.head_dim);
        let (pad, piece) = if eight { (8, PIECE) } else { (32, PIECE / 2) };
        let longest = config.hidden.max(inner).max(config.ffn);
        let newest = config.head_dim * (8 * 2 + 2 * kv.bytes());
        let attention = WARPS * 8 * (4 * config.head_dim + 8) + newest;
        let x_bytes = attention.max(MOST_X.min(2 * rows * (longest + pad))).next_multiple_of(128);
        let qkv = inner + 2 * config.kv_heads * config.head_dim;
        // As many tiles as a block has of products whose x does not fit at once.
        let tiles = [
            (config.hidden, qkv.div_ceil(ROWS)),
            (inner, config.hidden.div_ceil(ROWS)),
            (config.hidden, config.ffn.div_ceil(ROWS / 2)),
            (config.ffn, config.hidden.div_ceil(ROWS)),
        ];
        let fits = (x_bytes / (2 * rows)).saturating_sub(pad);
        let held = tiles.iter().filter(|(k, _)| *k > fits).map(|(_, tiles)| tiles.div_ceil(blocks));
        let held = held.max().unwrap_or(0);
        let others = x_bytes + 2 * WARPS * ROWS * 8 * 4 + held * ROWS * 8 * 4 + MOST * WARPS * 8 + 256;
        let stages = (SHARED.checked_sub(others)? / STAGE).min(MOST_STAGES);
        let enough = stages >= FEWEST_STAGES && fits >= piece;
        enough.then_some(Self { x_bytes, held, stages, bytes: others + stages * STAGE })
    }
}

/// Whether the kernel knows such a network; which device it is for is the caller's to ask.
pub(super) fn knows(config: &ModelConfig) -> bool {
    let inner = config.heads * config.head_dim;
    [config.hidden, inner, config.ffn].iter().all(|k| k.is_multiple_of(UNIT))
        && matches!(config.head_dim, 64 | 128)
}

impl Megakernel {
    pub(super) fn new(stream: &Stream, fixed: &Fixed, kernel: Kernel) -> Result<Self, EngineError> {
        let (config, pool, device) = (&fixed.config, &fixed.pool, &fixed.device);
        let blocks = device.multiprocessors as usize;
        let words = |count: usize| Memory::new(device, count * 8, "the step's buffers");
        let pairs = |numbers: usize| words(MOST * numbers / 2);
        let (operands, kv) = (fixed.network.operands(), pool.layout().dtype);
        // At most as many splits as there are blocks, of up to eight heads each.
        let splits = config.heads * MOST + blocks * 8;
        let layers: Vec<LayerOf> = (fixed.network.layers.iter().enumerate())
            .map(|(index, layer)| LayerOf::new(layer, pool.layer(index), config.windows[index]))
            .collect();
        let table = Memory::new(device, std::mem::size_of_val(&layers[..]), "the table of layers")?;
        stream.upload(table.at, &layers)?;
        stream.synchronize()?;
        kernel.allow_shared(SHARED)?;
        Ok(Self {
            kernel,
            layers: table,
            words: [
                pairs(config.hidden)?,
                pairs(fixed.qkv_width())?,
                pairs(config.heads * config.head_dim)?,
                pairs(config.ffn)?,
                words(splits * config.head_dim)?,
                words(splits * 2)?,
            ],
            blocks,
            rooms: std::array::from_fn(|rows| Room::new(config, operands, kv, blocks, rows)),
        })
    }

    /// Whether a step of so many rows fits.
    pub(super) fn has_room(&self, rows: usize) -> bool {
        matches!(self.rooms.get(rows), Some(Some(_)))
    }

    /// Steps until a flag would be one that an old word may still hold: two a layer, of 32 bits.
    pub(super) fn steps_of_flags(layers: usize) -> u32 {
        // Some steps are not counted by the caller: those that are timed at the start.
        (u32::MAX / (2 * layers.max(1) as u32)).saturating_sub(1001)
    }

    /// Flags begin anew, as steps do. Nothing may be running.
    pub(super) fn restart_flags(&self, epoch: &Memory) -> Result<(), EngineError> {
        self.words.iter().chain([epoch]).try_for_each(|memory| clear(memory.at, memory.bytes))
    }

    /// Whether it can do this step: single tokens only, each of which is drawn from.
    pub(super) fn can(&self, plan: &Plan) -> bool {
        let single = plan.tasks == 0 && plan.decodes == plan.rows && plan.wanted.len() == plan.rows;
        single && self.has_room(plan.rows)
    }

    /// Queues all layers: from `x` to `x`.
    pub(super) fn queue(&self, step: &Step<'_>) -> Result<(), EngineError> {
        let (fixed, rows) = (step.fixed, step.plan.rows);
        let config = &fixed.config;
        let Some(&Some(room)) = self.rooms.get(rows) else {
            return Err(EngineError::Device(format!("no room for {rows} rows in the megakernel")));
        };
        let of = StepOf {
            layers: self.layers.at,
            epoch: fixed.epoch.at,
            x: fixed.buffers.x.at,
            words: std::array::from_fn(|i| self.words[i].at),
            lists: [List::Tables, List::TableOfRow, List::Positions, List::DecodeRows].map(|l| step.list(l)),
            angles: fixed.angles.at,
            count: config.layers as i32,
            rows: rows as i32,
            width: config.hidden as i32,
            ffn: config.ffn as i32,
            heads: config.heads as i32,
            kv_heads: config.kv_heads as i32,
            block_tokens: fixed.pool.layout().block_tokens as i32,
            splits: fixed.splits_among(self.blocks, rows) as i32,
            x_bytes: room.x_bytes as i32,
            held: room.held as i32,
            stages: room.stages as i32,
            eps: config.rms_eps,
            scale_log2: fixed.attention_scale(),
        };
        let grid = Grid { blocks: (self.blocks, 1, 1), threads: THREADS, shared: room.bytes as u32 };
        self.kernel.launch_together(step.stream, grid, args![of])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roofline::shapes::named;

    #[test]
    fn flags_do_not_wrap_before_they_begin_anew() {
        for layers in [1, 32, 80, 126] {
            let most = u64::from(Megakernel::steps_of_flags(layers)) + 1000;
            assert!((most + 1) * 2 * layers as u64 <= 1 << 32, "{layers} layers");
            assert!(most > 1 << 23, "{layers} layers");
        }
    }

    #[test]
    fn shared_memory_holds_x_and_a_ring_that_bridges_something() {
        for (shape, operands, rows) in [
            ("llama-8b", Operands::Bf16, 1),
            ("llama-8b", Operands::Int8, 4),
            ("llama-70b-layer", Operands::Fp8, 4),
            ("smollm2", Operands::Bf16, 2),
        ] {
            let room = Room::new(&named(shape).unwrap(), operands, KvDtype::Bf16, 132, rows).unwrap();
            assert!(room.bytes <= SHARED && room.stages >= FEWEST_STAGES, "{shape}: {room:?}");
        }
        let one = Room::new(&named("llama-8b").unwrap(), Operands::Bf16, KvDtype::Bf16, 132, 1).unwrap();
        assert_eq!((one.held, one.stages), (0, 10));
        // Four rows of 14336 numbers come in parts: two tiles of a block's wait.
        let four = Room::new(&named("llama-8b").unwrap(), Operands::Bf16, KvDtype::Bf16, 132, 4).unwrap();
        assert_eq!(four.held, 2);
    }
}
