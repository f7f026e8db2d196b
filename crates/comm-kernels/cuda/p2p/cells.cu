// Entry points for large buffers.
//
// p2p_arc<units>_<dtype>_w<world>(link, send, peers, count): all-reduce; `peers.at[r]` is rank r's result buffer as
//     mapped here.
// p2p_rsc<units>_<dtype>_w<world>(link, send, recv, count): reduce-scatter; `count` elements a rank, at least 1;
// nothing
//     registered.
// units = 2 or 4: packs per thread, slice and chunk. More make longer bursts per peer, which the links carry better,
// and need a longer message to fill the pipeline.
//
// `link` is the cells' channel: scratch of cells_bytes(world, ctas) bytes with flags set to `first_round - 1`; cells
// need no initial value. Launch: one-dimensional, equal on all ranks, resident as a whole, a multiple of 32 up to 512
// threads a CTA, at most as many CTAs as the area has cells for. Two CTAs of 512 threads fit on an SM with units = 2,
// one with units = 4.
#include "cells.cuh"

#define P2P_CELL_OPS(T, DTYPE, WORLD, SUFFIX, UNITS, CTAS_PER_SM)                                        \
    extern "C" __global__ void __launch_bounds__(512, CTAS_PER_SM)                                       \
        p2p_arc##SUFFIX##_##DTYPE##_w##WORLD(const __grid_constant__ p2p::Link link, const T* send,      \
                                             const __grid_constant__ p2p::Peers recv, size_t count) {    \
        p2p::all_reduce_cells<T, WORLD, UNITS>(link, send, recv, count);                                 \
    }                                                                                                    \
    extern "C" __global__ void __launch_bounds__(512, CTAS_PER_SM) p2p_rsc##SUFFIX##_##DTYPE##_w##WORLD( \
        const __grid_constant__ p2p::Link link, const T* send, T* recv, size_t count) {                  \
        p2p::reduce_scatter_cells<T, WORLD, UNITS>(link, send, recv, count);                             \
    }
#define P2P_CELLS(T, DTYPE, WORLD)         \
    P2P_CELL_OPS(T, DTYPE, WORLD, 2, 2, 2) \
    P2P_CELL_OPS(T, DTYPE, WORLD, 4, 4, 1)
#define P2P_DTYPES(WORLD)                 \
    P2P_CELLS(__nv_bfloat16, bf16, WORLD) \
    P2P_CELLS(__half, f16, WORLD)         \
    P2P_CELLS(float, f32, WORLD)

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_DTYPES)
#undef P2P_DTYPES
