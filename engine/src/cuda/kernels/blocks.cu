// Whole KV blocks: from pool to pool, from block to block, and their checksums.

// Blocks of a layer in e4m3 as bf16, at the same places of a layer of their own. `vectors`: eight numbers each. Grid: (parts, blocks).
extern "C" __global__ void widen_blocks(uint4 *to, const uint2 *from, const int *blocks, int vectors) {
    size_t start = (size_t)blocks[blockIdx.y] * vectors;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
        uint2 bytes = from[start + i];
        u32 words[2] = {bytes.x, bytes.y}, pairs[4];
        for (int j = 0; j < 4; j++) {
            u32 pair = words[j / 2] >> j % 2 * 16;
            pairs[j] = bf16_pair(e4m3_float((u8)pair), e4m3_float((u8)(pair >> 8)));
        }
        to[start + i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}

// Copies cells from another pool of the same layout: the one at `sources[i]` bytes of it becomes cell number `cells[i]` of ours.
// Grid: (parts, cells).
extern "C" __global__ void copy_cells(uint4 *to, const uint4 *from, const int *cells, const size_t *sources, int vectors) {
    uint4 *cell = to + (size_t)cells[blockIdx.y] * vectors;
    const uint4 *source = from + sources[blockIdx.y] / sizeof(uint4);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) cell[i] = source[i];
}

// Copies block pairs (from, to) in all layers. Grid: (layers, pairs).
extern "C" __global__ void fork_blocks(uint4 *pool, const int2 *pairs, size_t layer_vectors, int vectors) {
    int2 pair = pairs[blockIdx.y];
    uint4 *layer = pool + blockIdx.x * layer_vectors;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x)
        layer[(size_t)pair.y * vectors + i] = layer[(size_t)pair.x * vectors + i];
}

DEVICE u32 crc_table_entry(u32 x) {
    for (int i = 0; i < 8; i++) x = x & 1 ? (x >> 1) ^ 0x82F63B78u : x >> 1;
    return x;
}

// Product of two polynomials modulo CRC-32C's, bits reflected: the most significant bit is x^0.
DEVICE u32 crc_times(u32 a, u32 b) {
    u32 product = 0;
    for (int i = 0; i < 32; i++) {
        if (a & 0x80000000u) product ^= b;
        a <<= 1;
        b = b & 1 ? (b >> 1) ^ 0x82F63B78u : b >> 1;
    }
    return product;
}

// CRC-32C (RFC 3720, appendix B.4) of each block of one layer. Each of 256 threads takes a slice of
// `slice` bytes (a multiple of 4, the last may be shorter: blocks are multiples of 16 bytes), then the slices' sums are
// joined: crc(AB) = crc(A) * x^(8 |B|) + crc(B). Grid: blocks.
extern "C" __global__ void checksums(u32 *out, const u8 *pool_layer, const int *blocks, int block_bytes, int slice) {
    __shared__ u32 table[4][256];
    __shared__ u32 joined;
    u32 entry = crc_table_entry(threadIdx.x);
    table[0][threadIdx.x] = entry;
    if (threadIdx.x == 0) joined = 0;
    __syncthreads();
    for (int i = 1; i < 4; i++) {
        entry = table[0][entry & 255] ^ (entry >> 8);
        table[i][threadIdx.x] = entry;
    }
    __syncthreads();
    int from = min((int)threadIdx.x * slice, block_bytes), to = min(from + slice, block_bytes);
    const u32 *words = (const u32 *)(pool_layer + (size_t)blocks[blockIdx.x] * block_bytes);
    u32 crc = from == 0 ? 0xffffffffu : 0u;
    for (int at = from; at < to; at += 4) {
        crc ^= words[at / 4];
        crc = table[3][crc & 255] ^ table[2][crc >> 8 & 255] ^ table[1][crc >> 16 & 255] ^ table[0][crc >> 24];
    }
    if (from < to) {
        // x^(8 * bytes after this slice), by squaring.
        u32 power = 0x80000000u, base = 0x00800000u;  // 1, x^8
        for (u32 rest = block_bytes - to; rest; rest >>= 1) {
            if (rest & 1) power = crc_times(power, base);
            base = crc_times(base, base);
        }
        atomicXor(&joined, crc_times(crc, power));
    }
    __syncthreads();
    if (threadIdx.x == 0) out[blocks[blockIdx.x]] = ~joined;
}
