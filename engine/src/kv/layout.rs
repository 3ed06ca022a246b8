//! Where one block of one layer lies in the pool.

/// Element type of the KV pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 16-bit brain float.
    Bf16,
    /// 32-bit float.
    F32,
    /// 8-bit float, e4m3: see [`super::fp8`].
    Fp8,
}

impl KvDtype {
    /// Bytes per element.
    pub fn bytes(self) -> usize {
        match self {
            KvDtype::Bf16 => 2,
            KvDtype::F32 => 4,
            KvDtype::Fp8 => 1,
        }
    }

    /// The type of that name.
    pub fn named(name: &str) -> Option<Self> {
        [KvDtype::Bf16, KvDtype::F32, KvDtype::Fp8].into_iter().find(|dtype| dtype.name() == name)
    }

    /// The name used in configuration and compatibility hashes.
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::Bf16 => "bf16",
            KvDtype::F32 => "f32",
            KvDtype::Fp8 => "fp8",
        }
    }
}

/// Shape of a KV pool: `[layers, blocks, 2 (K, V), kv_heads, block_tokens, head_dim]`, row-major, so that
/// one block of one layer is one contiguous range of `block_bytes()`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Transformer layers.
    pub layers: usize,
    /// Blocks in the pool.
    pub blocks: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Tokens per block.
    pub block_tokens: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Element type.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes of one block of one layer.
    pub fn block_bytes(&self) -> usize {
        2 * self.kv_heads * self.block_tokens * self.head_dim * self.dtype.bytes()
    }

    /// Bytes from one layer to the next.
    pub fn layer_bytes(&self) -> usize {
        self.blocks * self.block_bytes()
    }

    /// Bytes of the whole pool.
    pub fn total_bytes(&self) -> usize {
        self.layers * self.layer_bytes()
    }

    /// Byte offset of a block of a layer from the pool's start.
    pub fn offset(&self, layer: usize, block: u32) -> usize {
        debug_assert!(layer < self.layers && (block as usize) < self.blocks);
        layer * self.layer_bytes() + block as usize * self.block_bytes()
    }

    /// Blocks needed for `tokens` tokens.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }
}
