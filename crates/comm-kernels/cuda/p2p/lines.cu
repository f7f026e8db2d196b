// Entry points of all-gather, broadcast and reduce-scatter by lines. The first two work on bytes.
//
// p2p_ag_lines_w<world>(link, send, recv, bytes): `bytes` per rank, at least 1.
// p2p_bc_lines_w<world>(link, send, recv, bytes, root): `bytes` at least 1; `root` below `world`.
// p2p_rs_lines_<dtype>_w<world>(link, send, recv, count): sums; `count` elements a rank, at least 1. Operands are
//     element-aligned.
//
// `link` is the lines' channel's, its slot_packs a multiple of 128. `send` and `recv` are equal, or as in place is
// meant, or disjoint; bytes may lie anywhere. Launch: one-dimensional, equal on all ranks, resident as a whole, whole
// warps, at most 256 threads a CTA and kFlagCtas CTAs, 4 * threads <= slot_packs. May be launched with programmatic
// stream serialization.
#include "line_sums.cuh"

#define P2P_LINES(WORLD)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                            \
        p2p_ag_lines_w##WORLD(const __grid_constant__ p2p::Link link, const char* send, char* recv, size_t bytes) { \
        p2p::all_gather_lines<WORLD>(link, send, recv, bytes);                                                      \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256, 1) p2p_bc_lines_w##WORLD(                                     \
        const __grid_constant__ p2p::Link link, const char* send, char* recv, size_t bytes, uint32_t root) {        \
        p2p::broadcast_lines<WORLD>(link, send, recv, bytes, int(root));                                            \
    }
#define P2P_LINE_SUMS(T, DTYPE, WORLD)                                                    \
    extern "C" __global__ void __launch_bounds__(256, 1) p2p_rs_lines_##DTYPE##_w##WORLD( \
        const __grid_constant__ p2p::Link link, const T* send, T* recv, size_t count) {   \
        p2p::reduce_scatter_lines<T, WORLD>(link, send, recv, count);                     \
    }
#define P2P_DTYPES(WORLD)                     \
    P2P_LINES(WORLD)                          \
    P2P_LINE_SUMS(__nv_bfloat16, bf16, WORLD) \
    P2P_LINE_SUMS(__half, f16, WORLD)         \
    P2P_LINE_SUMS(float, f32, WORLD)

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_DTYPES)
#undef P2P_DTYPES
