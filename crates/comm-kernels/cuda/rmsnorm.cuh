// Residual + bias + RMSNorm over rows whose partial sums have been summed already, with an fp8 result where one is asked
// for (`QUANTIZED`; comm-core's `NormQuantization` defines it).
//
//   r[t, h]            = round(input[t, h] + residual[t, h] + bias[h])
//   residual_out[t, h] = r[t, h]
//   output[t, h]       = round(r[t, h] * rsqrt(mean_h(r[t, h]^2) + eps) * (weight[h] + weight_offset))
//
// A row belongs to one group of `blockDim.x` threads (a multiple of 32); a block holds `blockDim.y` groups, and more
// than one only where a group is a single warp. So the sum over a row needs either shuffles alone, or the whole block.
//
// In place (`output` = `input`, `residual_out` = `residual`) is safe: each thread reads an element before it writes
// the same element, and a row's outputs are written after the block-wide sum, that is after all of the row was read.
#pragma once

#include "dtype.cuh"
#include "fp8.cuh"

namespace {

constexpr u32 WARP = 32;
constexpr u32 FULL = 0xffffffffu;

__device__ __forceinline__ f32 warp_sum(f32 value) {
#pragma unroll
    for (u32 distance = WARP / 2; distance > 0; distance /= 2)
        value = __fadd_rn(value, __shfl_xor_sync(FULL, value, distance));
    return value;
}

// The sum over the threads of a row's group, the same bits in each of them. Every thread of the block calls it.
__device__ __forceinline__ f32 row_sum(f32 value, f32 *partial) {
    value = warp_sum(value);
    if (blockDim.x == WARP) return value;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // The previous row's sums may still be being read.
    __syncthreads();
    if (lane == 0) partial[warp] = value;
    __syncthreads();
    return warp_sum(lane < blockDim.x / WARP ? partial[lane] : 0.0f);
}

// The largest `value` over the threads of a row's group, in each of them. Every thread of the block calls it.
__device__ __forceinline__ u32 row_max(u32 value, f32 *partial) {
    auto warp_max = [](u32 v) {
#pragma unroll
        for (u32 distance = WARP / 2; distance > 0; distance /= 2) v = max(v, __shfl_xor_sync(FULL, v, distance));
        return v;
    };
    value = warp_max(value);
    if (blockDim.x == WARP) return value;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    __syncthreads();
    if (lane == 0) partial[warp] = __uint_as_float(value);
    __syncthreads();
    return warp_max(lane < blockDim.x / WARP ? __float_as_uint(partial[lane]) : 0u);
}

// Where an fp8 result goes.
struct Quantized {
    u8 *output;
    f32 *scale;      // one to read, or one for each row to write
    bool per_token;  // the latter
};

template <typename T, u32 WIDTH> struct alignas(sizeof(T) * WIDTH) Vector {
    T at[WIDTH];
};

// `WIDTH` elements per access; `KEEP` accesses of a thread's share of a row stay in registers between the two passes,
// and the rest is read again from `residual_out`, where the same thread wrote it.
//
// `QUANTIZED`: `output` may be null. With a scale per token, results stay in registers or are computed anew for the
// third pass; it is the same arithmetic, so the same bits.
template <typename T, u32 WIDTH, u32 KEEP, bool QUANTIZED>
__device__ __forceinline__ void rmsnorm(
    const T *input, const T *residual, T *residual_out, const T *bias, const T *weight, T *output, u64 tokens,
    u64 hidden, f32 eps, f32 weight_offset, const Quantized &quantized) {
    using N = Numeric<T>;
    using V = Vector<T, WIDTH>;
    __shared__ f32 partial[WARP];
    const u64 vectors = hidden / WIDTH;
    const u64 row_step = static_cast<u64>(gridDim.x) * blockDim.y;

    for (u64 block_row = static_cast<u64>(blockIdx.x) * blockDim.y; block_row < tokens; block_row += row_step) {
        // A group beyond the last row does nothing. Then its warp is a group of its own, so no barrier is missed.
        const u64 row = block_row + threadIdx.y;
        if (row >= tokens) return;
        const V *in = reinterpret_cast<const V *>(input + row * hidden);
        const V *res = reinterpret_cast<const V *>(residual + row * hidden);
        V *res_out = reinterpret_cast<V *>(residual_out + row * hidden);
        V *out = reinterpret_cast<V *>(output + row * hidden);
        const V *add = reinterpret_cast<const V *>(bias);
        const V *scale = reinterpret_cast<const V *>(weight);

        f32 squares = 0.0f;
        auto first_pass = [&](u64 v) {
            const V a = in[v], b = res[v];
            V c;
            if (bias != nullptr) c = add[v];
            V r;
#pragma unroll
            for (u32 k = 0; k < WIDTH; ++k) {
                f32 sum = __fadd_rn(N::widen(a.at[k]), N::widen(b.at[k]));
                if (bias != nullptr) sum = __fadd_rn(sum, N::widen(c.at[k]));
                r.at[k] = N::narrow(sum);
                const f32 rounded = N::widen(r.at[k]);
                squares = __fmaf_rn(rounded, rounded, squares);
            }
            res_out[v] = r;
            return r;
        };
        // The weights are fetched before the sum is known, so that their latency hides behind it.
        V kept[KEEP], weights[KEEP];
#pragma unroll
        for (u32 k = 0; k < KEEP; ++k) {
            const u64 v = threadIdx.x + static_cast<u64>(k) * blockDim.x;
            if (v < vectors) {
                weights[k] = scale[v];
                kept[k] = first_pass(v);
            }
        }
        for (u64 v = threadIdx.x + static_cast<u64>(KEEP) * blockDim.x; v < vectors; v += blockDim.x) first_pass(v);

        const f32 mean = __fdiv_rn(row_sum(squares, partial), static_cast<f32>(hidden));
        const f32 factor = rsqrtf(__fadd_rn(mean, eps));

        auto normed = [&](const V &r, const V &w) {
            V y;
#pragma unroll
            for (u32 k = 0; k < WIDTH; ++k) {
                const f32 gain = __fadd_rn(N::widen(w.at[k]), weight_offset);
                y.at[k] = N::narrow(__fmul_rn(__fmul_rn(N::widen(r.at[k]), factor), gain));
            }
            return y;
        };
        u32 amax = 0;
        f32 inverse = 0.0f;
        if (QUANTIZED && !quantized.per_token) inverse = __fdiv_rn(1.0f, *quantized.scale);
        auto quantize = [&](u64 v, const V &y) {
            struct alignas(WIDTH) Bytes {
                u8 at[WIDTH];
            } bytes;
#pragma unroll
            for (u32 k = 0; k < WIDTH; ++k)
                bytes.at[k] = static_cast<u8>(fp8::pack2(N::widen(y.at[k]), 0.0f, inverse));
            reinterpret_cast<Bytes *>(quantized.output + row * hidden)[v] = bytes;
        };
        auto second_pass = [&](u64 v, const V &r, const V &w) {
            const V y = normed(r, w);
            if (!QUANTIZED || output != nullptr) out[v] = y;
            if (QUANTIZED && !quantized.per_token) quantize(v, y);
            if (QUANTIZED && quantized.per_token) {
#pragma unroll
                for (u32 k = 0; k < WIDTH; ++k) amax = max(amax, fp8::magnitude(N::widen(y.at[k])));
            }
            return y;
        };
#pragma unroll
        for (u32 k = 0; k < KEEP; ++k) {
            const u64 v = threadIdx.x + static_cast<u64>(k) * blockDim.x;
            if (v < vectors) kept[k] = second_pass(v, kept[k], weights[k]);
        }
        for (u64 v = threadIdx.x + static_cast<u64>(KEEP) * blockDim.x; v < vectors; v += blockDim.x) {
            const V r = res_out[v], w = scale[v];
            second_pass(v, r, w);
        }
        if (QUANTIZED && quantized.per_token) {
            const fp8::Scale s = fp8::scale_of(row_max(amax, partial));
            inverse = s.inverse;
            if (threadIdx.x == 0) quantized.scale[row] = s.scale;
#pragma unroll
            for (u32 k = 0; k < KEEP; ++k) {
                const u64 v = threadIdx.x + static_cast<u64>(k) * blockDim.x;
                if (v < vectors) quantize(v, kept[k]);
            }
            for (u64 v = threadIdx.x + static_cast<u64>(KEEP) * blockDim.x; v < vectors; v += blockDim.x) {
                const V r = res_out[v], w = scale[v];
                quantize(v, normed(r, w));
            }
        }
    }
}

}  // namespace
