// Entry points for the largest buffers: steps.cuh, step_sums.cuh.
//
// p2p_ars_<dtype>_w<world>(link, send, peers, count, tile, tiles): all-reduce; `peers.at[r]` is rank r's result buffer
//     as mapped here.
// p2p_rss_<dtype>_w<world>(link, send, recv, count, tile, tiles): reduce-scatter; `count` elements a rank; nothing
//     registered.
// p2p_ag_steps_w<world>(link, send, peers, bytes, tile), p2p_ag_spread_w<world>(link, send, peers, bytes): all-gather,
//     `bytes` per rank.
//
// `tile`: a multiple of 8192 up to 32768; `tiles`: tiles of a round and slice, at most 256, such that two rounds of
// `world` slices fit into the area behind its flags. `link` is the cells' channel for what sums, the packet channel for
// what gathers. Counts are at least 1. Launch: one-dimensional, equal on all ranks, resident as a whole, at most
// kFlagCtas CTAs: of 512 threads for what sums, of 32 for p2p_ag_steps, of 64 for p2p_ag_spread.
#include "step_sums.cuh"

#define P2P_STEPS(T, DTYPE, WORLD)                                                                         \
    extern "C" __global__ void __launch_bounds__(512, 1) p2p_ars_##DTYPE##_w##WORLD(                       \
        const __grid_constant__ p2p::Link link, const T* send, const __grid_constant__ p2p::Peers recv,    \
        size_t count, uint32_t tile, uint32_t tiles) {                                                     \
        p2p::all_reduce_steps<T, WORLD>(link, send, recv, count, tile, tiles);                             \
    }                                                                                                      \
    extern "C" __global__ void __launch_bounds__(512, 1)                                                   \
        p2p_rss_##DTYPE##_w##WORLD(const __grid_constant__ p2p::Link link, const T* send, T* recv,         \
                                   size_t count, uint32_t tile, uint32_t tiles) {                          \
        p2p::reduce_scatter_steps<T, WORLD>(link, send, recv, count, tile, tiles);                         \
    }
#define P2P_WORLD(WORLD)                                                                                   \
    P2P_STEPS(__nv_bfloat16, bf16, WORLD)                                                                  \
    P2P_STEPS(__half, f16, WORLD)                                                                          \
    P2P_STEPS(float, f32, WORLD)                                                                           \
    extern "C" __global__ void __launch_bounds__(32)                                                       \
        p2p_ag_steps_w##WORLD(const __grid_constant__ p2p::Link link, const char* send,                    \
                              const __grid_constant__ p2p::Peers recv, size_t bytes, uint32_t tile) {      \
        p2p::all_gather_steps<WORLD>(link, send, recv, bytes, tile);                                       \
    }                                                                                                      \
    extern "C" __global__ void __launch_bounds__(64)                                                       \
        p2p_ag_spread_w##WORLD(const __grid_constant__ p2p::Link link, const char* send,                   \
                               const __grid_constant__ p2p::Peers recv, size_t bytes) {                    \
        p2p::all_gather_spread<WORLD>(link, send, recv, bytes);                                            \
    }

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_WORLD)
#undef P2P_WORLD
