// What a decoder layer needs besides matrix products, norms and collectives: random weights, the attention over one's
// own token, and the gated activation. Element-wise: no thread waits for, or reads what is written by, another.

#include "pattern.cuh"

namespace {

// Eight bf16 values: one access of 16 bytes.
struct alignas(16) Eight {
    bf16 at[8];
};

constexpr u32 WIDTH = 8;

}  // namespace

// A block of a random matrix whose element (row, column) has the index `first + row * pitch + column`: the same value in
// whatever block it is generated. Uniform in [-scale, scale).
extern "C" __global__ void __launch_bounds__(256) uniform_bf16(
    bf16 *out, u64 rows, u64 columns, u64 first, u64 pitch, u64 seed, f32 scale) {
    const u64 stream = pattern_stream(seed, 0);
    for (u64 row = blockIdx.x; row < rows; row += gridDim.x) {
        for (u64 column = threadIdx.x; column < columns; column += blockDim.x) {
            // 24 bits: every integer in between is exact in f32, and so is its product with a power of two.
            const u64 hash = pattern_hash(stream, first + row * pitch + column);
            const i32 number = static_cast<i32>(hash >> 40) - (1 << 23);
            const f32 unit = __fmul_rn(static_cast<f32>(number), 1.0f / (1 << 23));
            out[row * columns + column] = __float2bfloat16_rn(__fmul_rn(unit, scale));
        }
    }
}

// Attention over a context of one token, the token itself: the softmax of one score is 1, so that every query head's
// output is the value vector of its key/value head. `qkv` holds rows of `row` vectors, of which the values begin at
// `values`; a head has `head` vectors, and `group` query heads share one key/value head. `queries` vectors per token.
extern "C" __global__ void __launch_bounds__(256) attend_self_bf16(
    const Eight *qkv, Eight *out, u64 tokens, u32 row, u32 values, u32 queries, u32 head, u32 group) {
    const u64 threads = static_cast<u64>(gridDim.x) * blockDim.x;
    for (u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; i < tokens * queries; i += threads) {
        const u64 token = i / queries;
        const u32 at = static_cast<u32>(i % queries);
        out[i] = qkv[token * row + values + at / (head * group) * head + at % head];
    }
}

// out[t, i] = round(silu(gate[t, i]) * up[t, i]), where a row of `both` holds `width` vectors of gate, then as many of up.
extern "C" __global__ void __launch_bounds__(256) silu_mul_bf16(
    const Eight *both, Eight *out, u64 tokens, u32 width) {
    const u64 threads = static_cast<u64>(gridDim.x) * blockDim.x;
    for (u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; i < tokens * width; i += threads) {
        const u64 gate_at = i / width * 2 * width + i % width;
        const Eight gate = both[gate_at], up = both[gate_at + width];
        Eight product;
#pragma unroll
        for (u32 k = 0; k < WIDTH; ++k) {
            const f32 g = __bfloat162float(gate.at[k]);
            const f32 silu = __fdividef(g, 1.0f + __expf(-g));
            product.at[k] = __float2bfloat16_rn(silu * __bfloat162float(up.at[k]));
        }
        out[i] = product;
    }
}
