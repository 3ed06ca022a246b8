//! What is fixed for every step: device, weights, pool, kernels, buffers.

use std::sync::Arc;

use cudarc::driver::sys;

use super::buffers::{Buffers, Capacity, QUERIES_SM90, max_split_blocks};
use super::driver::{Device, Grid, Memory, Stream, args};
use super::gemm::Gemms;
use super::kernels::{self, FastAttention, Kernels};
use super::megakernel::{self, Megakernel};
use super::network::{Layer, Linear, Network};
use super::plan::Tiling;
use super::pool::DevicePool;
use super::{Attention, options, tensor_map};
use crate::model::ModelConfig;
use crate::{EngineError, KvMemory};

/// Queries of a block of the portable prefill kernel.
const QUERIES: usize = 64;
/// Keys of a tile of the Hopper kernel, and tiles under way.
const KEYS_SM90: usize = 128;
const STAGES_SM90: usize = 2;

/// What is fixed for every step.
pub(super) struct Fixed {
    pub(super) device: Arc<Device>,
    pub(super) config: ModelConfig,
    pub(super) kernels: Arc<Kernels>,
    pub(super) network: Network,
    pub(super) pool: Arc<DevicePool>,
    pub(super) buffers: Buffers,
    /// cos and sin of every position.
    pub(super) angles: Memory,
    /// A layer of KV in bf16, its blocks where they are in a layer of the pool: what chunks attend to where the pool is in eight bits.
    pub(super) widened: Option<Memory>,
    pub(super) maps: Option<Maps>,
    /// The number of the step that is being made, which `embed` counts.
    pub(super) epoch: Memory,
    /// Where it knows the network and the device.
    pub(super) megakernel: Option<Megakernel>,
    capacity: Capacity,
    attention: Attention,
}

/// How the Hopper kernel finds queries and KV.
pub(super) struct Maps {
    pub(super) q: sys::CUtensorMap,
    pub(super) kv: sys::CUtensorMap,
}

impl Fixed {
    #[allow(clippy::too_many_arguments)] // Each is a part that only the engine's construction knows.
    pub(super) fn new(
        device: Arc<Device>,
        config: ModelConfig,
        kernels: Arc<Kernels>,
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
        if let Some(rounding) = &kernels.quantise {
            rounding.swiglu.allow_shared(2 * config.ffn)?;
        }
        let widened = options::widened_bytes(pool.layout());
        let widened = (widened > 0).then(|| Memory::new(&device, widened, "a layer of KV in bf16"));
        let epoch = Memory::new(&device, 4, "the step's number")?;
        let mut fixed = Self {
            device,
            config,
            kernels,
            network,
            pool,
            buffers,
            angles,
            widened: widened.transpose()?,
            maps: None,
            epoch,
            megakernel: None,
            capacity,
            attention,
        };
        fixed.maps = fixed.hopper_maps(capacity.rows)?;
        fixed.megakernel = fixed.all_layers(stream)?;
        Ok(fixed)
    }

    fn all_layers(&self, stream: &Stream) -> Result<Option<Megakernel>, EngineError> {
        let (layout, operands) = (self.pool.layout(), self.network.operands());
        if self.fast().is_none() || self.attention != Attention::Best || !megakernel::knows(&self.config) {
            return Ok(None);
        }
        let kernel = kernels::megakernel(&self.device, operands, layout.dtype, layout.head_dim)?;
        kernel.map(|kernel| Megakernel::new(stream, self, kernel)).transpose()
    }

    /// Measures every kind of product at these numbers of rows.
    pub(super) fn tune(&self, gemms: &mut Gemms, stream: &Stream, rows: &[usize]) -> Result<(), EngineError> {
        let (network, buffers) = (&self.network, &self.buffers);
        let upto = |most: usize| rows.iter().copied().filter(|&rows| rows <= most).collect::<Vec<_>>();
        let within = upto(self.capacity.rows);
        type Pick = fn(&Layer) -> &Linear;
        // Products that add to the residual stream have no norm before them, the others do.
        let kinds: [(Pick, u64, u64, bool); 4] = [
            (|layer| &layer.qkv, buffers.normed.at, buffers.qkv.at, false),
            (|layer| &layer.o, buffers.attended.at, buffers.x.at, true),
            (|layer| &layer.gate_up, buffers.normed.at, buffers.gate_up.at, false),
            (|layer| &layer.down, buffers.gated.at, buffers.x.at, true),
        ];
        let norm = (network.norm.at, self.config.rms_eps);
        for (pick, x, out, add) in kinds {
            let linear = pick(&network.layers[0]);
            let mut product = linear.product(x, out);
            product.rounded = (buffers.quantised.at, buffers.row_scales.at);
            product.norm = if add { (0, 0.0) } else { norm };
            let weights: Vec<u64> =
                network.layers.iter().map(|layer| pick(layer).product(x, out).weights).collect();
            gemms.tune(stream, pick(&network.layers[0]).shape(add, false), &within, &product, &weights)?;
        }
        let gate_up = &network.layers[0].gate_up;
        let mut product = gate_up.product(buffers.normed.at, buffers.gated.at);
        product.rounded = (buffers.quantised.at, buffers.row_scales.at);
        product.norm = norm;
        let weights: Vec<u64> = network.layers.iter().map(|l| l.gate_up.product(0, 0).weights).collect();
        gemms.tune_gated(
            stream,
            gate_up.gated_shape(),
            gate_up.shape(false, false),
            &within,
            &product,
            &weights,
        )?;
        let mut product = network.head.product(buffers.normed.at, buffers.logits.at);
        product.norm = norm;
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
        let (kv, kv_rows, _) = self.kv_of_chunks(0);
        Ok(Some(Maps {
            q: tensor_map::of_rows(self.buffers.qkv.at, rows + QUERIES_SM90, self.qkv_width(), QUERIES_SM90)?,
            kv: tensor_map::of_rows(kv, kv_rows, dim, layout.block_tokens)?,
        }))
    }

    /// The bf16 KV that chunks attend to in a layer: where all of it is, its rows (one head of one token each), and which row the layer
    /// begins at.
    pub(super) fn kv_of_chunks(&self, layer: usize) -> (u64, usize, usize) {
        let layout = self.pool.layout();
        let rows = layout.layer_bytes() / (layout.head_dim * layout.dtype.bytes());
        match &self.widened {
            Some(widened) => (widened.at, rows, 0),
            None => (self.pool.layer(0), rows * layout.layers, rows * layer),
        }
    }

    /// The tensor-core kernels, where they know the head and block size.
    pub(super) fn fast(&self) -> Option<&FastAttention> {
        let fits = self.pool.layout().block_tokens.is_multiple_of(16) && self.attention != Attention::Plain;
        self.kernels.fast.as_ref().filter(|_| fits)
    }

    pub(super) fn tiling(&self) -> Tiling {
        let queries = if self.maps.is_some() { QUERIES_SM90 } else { QUERIES };
        let widens = self.widened.is_some() && self.fast().is_some();
        Tiling { queries, singles_apart: true, widens }
    }

    pub(super) fn qkv_width(&self) -> usize {
        (self.config.heads + 2 * self.config.kv_heads) * self.config.head_dim
    }

    /// How many ways decode attention is split along the keys, so that few sequences fill the device too.
    pub(super) fn splits(&self, sequences: usize) -> usize {
        self.splits_among(max_split_blocks(&self.device), sequences)
    }

    /// The same where so many blocks are to have work.
    pub(super) fn splits_among(&self, blocks: usize, sequences: usize) -> usize {
        (blocks / (self.head_groups() * sequences.max(1))).clamp(1, 64)
    }

    /// Up to eight query heads of one kv head each: what a block of decode attention takes.
    pub(super) fn head_groups(&self) -> usize {
        self.config.group().div_ceil(8) * self.config.kv_heads
    }

    /// What scores are multiplied by, for powers of two.
    pub(super) fn attention_scale(&self) -> f32 {
        std::f32::consts::LOG2_E / (self.config.head_dim as f32).sqrt()
    }
}

/// Two tiles each of keys and values, rows padded by 16 bytes.
pub(super) fn portable_shared_bytes(dim: usize) -> usize {
    4 * 64 * (dim + 8) * 2
}

/// `Shared<DIM>` of the Hopper kernel, and room to align it.
pub(super) fn hopper_shared_bytes(dim: usize) -> usize {
    (QUERIES_SM90 + 2 * STAGES_SM90 * KEYS_SM90) * dim * 2 + 128 + 1024
}
