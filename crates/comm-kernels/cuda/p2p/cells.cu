// Entry points for large buffers.
//
// p2p_arc_<dtype>_w<world>(link, send, peers, count): all-reduce; `peers.at[r]` is rank r's result buffer as mapped here.
// p2p_arc2, p2p_rsc2, p2p_arc4, p2p_rsc4: the same with two or four packs per thread, slice and chunk.
// p2p_rsc_<dtype>_w<world>(link, send, recv, count): reduce-scatter; `count` elements a rank, nothing registered.
//
// `link` is the cells' channel: scratch of cells_bytes(world, ctas) bytes with flags set to `first_round - 1`; cells need
// no initial value. Launch: one-dimensional, equal on all ranks, resident as a whole, 32 to 512 threads a CTA, at most
// as many CTAs as the area has cells for. Two CTAs of 512 threads fit on an SM
// (one of p2p_arc4 and p2p_rsc4).
#include "cells.cuh"

#define P2P_CELL_OPS(T, DTYPE, WORLD, SUFFIX, UNITS, CTAS_PER_SM)                                                      \
    extern "C" __global__ void __launch_bounds__(512, CTAS_PER_SM) p2p_arc##SUFFIX##_##DTYPE##_w##WORLD(               \
        const __grid_constant__ p2p::Link link, const T* send, const __grid_constant__ p2p::Peers recv,                \
        size_t count) {                                                                                                \
        p2p::all_reduce_cells<T, WORLD, UNITS>(link, send, recv, count);                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512, CTAS_PER_SM) p2p_rsc##SUFFIX##_##DTYPE##_w##WORLD(               \
        const __grid_constant__ p2p::Link link, const T* send, T* recv, size_t count) {                                \
        p2p::reduce_scatter_cells<T, WORLD, UNITS>(link, send, recv, count);                                           \
    }
#define P2P_CELLS(T, DTYPE, WORLD)                                                                                     \
    P2P_CELL_OPS(T, DTYPE, WORLD, , 1, 2)                                                                              \
    P2P_CELL_OPS(T, DTYPE, WORLD, 2, 2, 2)                                                                             \
    P2P_CELL_OPS(T, DTYPE, WORLD, 4, 4, 1)
#define P2P_DTYPES(WORLD)                                                                                              \
    P2P_CELLS(__nv_bfloat16, bf16, WORLD)                                                                              \
    P2P_CELLS(__half, f16, WORLD)                                                                                      \
    P2P_CELLS(float, f32, WORLD)

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_DTYPES)
#undef P2P_DTYPES
