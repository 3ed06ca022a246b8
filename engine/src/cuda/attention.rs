//! Attention of a step: single tokens, chunks, or anything by the plain kernel.

use super::driver::{Grid, args};
use super::fixed::{hopper_shared_bytes, portable_shared_bytes};
use super::kernels::FastAttention;
use super::network::Layer;
use super::plan::List;
use super::step::Step;
use crate::{EngineError, KvMemory};

impl Step<'_> {
    /// With `unturned`, q and k of this layer are not rotated yet, and KV not in the pool: all rows are single tokens then.
    pub(super) fn attend(&self, index: usize, unturned: Option<&Layer>) -> Result<(), EngineError> {
        let window = self.fixed.config.windows[index].unwrap_or(0) as i32;
        let scale = self.fixed.attention_scale();
        match self.fixed.fast() {
            Some(fast) => {
                self.attend_decodes(fast, index, window, scale, unturned)?;
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
        unturned: Option<&Layer>,
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
        let parts = fixed.head_groups();
        let kernel = if unturned.is_some() { &fast.decode_turning } else { &fast.decode };
        let (angles, eps) = (fixed.angles.at, config.rms_eps);
        let (q_norm, k_norm) = unturned.map_or((0, 0), Layer::head_norms);
        kernel.launch_chained(
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
                scale,
                angles,
                q_norm,
                k_norm,
                eps
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
        if self.plan.tasks == 0 {
            return Ok(());
        }
        self.widen(index)?;
        let (kv, kv_rows, layer_row) = fixed.kv_of_chunks(index);
        let (out, tasks, tables) =
            (fixed.buffers.attended.at, self.list(List::Tasks), self.list(List::Tables));
        let (heads, kv_heads) = (config.heads as i32, config.kv_heads as i32);
        let block_tokens = layout.block_tokens as i32;
        let mut grid = Grid::new((config.heads, self.plan.tasks, 1), 128);
        if let (Some(kernel), Some(maps)) = (&fast.prefill_sm90, &fixed.maps) {
            let (layer_row, beyond) = (layer_row as i32, kv_rows as i32);
            let block_shift = layout.block_tokens.trailing_zeros() as i32;
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
        let pool = kv + (layer_row * layout.head_dim * 2) as u64;
        let (q, stride) = (fixed.buffers.qkv.at, fixed.qkv_width() as i32);
        grid.shared = portable_shared_bytes(layout.head_dim) as u32;
        fast.prefill.launch_chained(
            self.stream,
            grid,
            args![out, q, pool, tasks, tables, stride, heads, kv_heads, block_tokens, window, scale],
        )
    }

    /// Makes the KV that the chunks attend to bf16, where the pool is in eight bits.
    fn widen(&self, index: usize) -> Result<(), EngineError> {
        let (fixed, blocks, count) = (self.fixed, self.list(List::Widened), self.plan.widened.len());
        let Some(widened) = fixed.widened.as_ref().filter(|_| count > 0) else { return Ok(()) };
        let (to, from) = (widened.at, fixed.pool.layer(index));
        let vectors = fixed.pool.layout().block_bytes() / 8;
        let (grid, vectors) = (Grid::new((vectors.div_ceil(1024), count, 1), 256), vectors as i32);
        fixed.kernels.widen_blocks.launch(self.stream, grid, args![to, from, blocks, vectors])
    }
}
