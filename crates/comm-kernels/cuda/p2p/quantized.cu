// Entry points of the quantised all-reduce: p2p_arq_<dtype>_w<world>(link, send, recv, count).
//
// `link` is the Lamport channel's. `send` and `recv` are element-aligned, equal or disjoint; `count` is at least 1.
// Launch: one-dimensional, equal on all ranks, resident as a whole, a multiple of 32 up to 512 threads a CTA, 33 packs
// of `slot_packs` for each warp; at least `world` warps, unless there is one for each row of a slice
// (ceil(ceil(count / 512) / world)).
#include "quantized.cuh"

#define P2P_QUANTIZED(T, DTYPE, WORLD)                                                  \
    extern "C" __global__ void __launch_bounds__(512) p2p_arq_##DTYPE##_w##WORLD(       \
        const __grid_constant__ p2p::Link link, const T* send, T* recv, size_t count) { \
        p2p::all_reduce_quantized<T, WORLD>(link, send, recv, count);                   \
    }
#define P2P_DTYPES(WORLD)                     \
    P2P_QUANTIZED(__nv_bfloat16, bf16, WORLD) \
    P2P_QUANTIZED(__half, f16, WORLD)         \
    P2P_QUANTIZED(float, f32, WORLD)

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_DTYPES)
#undef P2P_DTYPES
