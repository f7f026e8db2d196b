// Entry points of all-gather and reduce-scatter of uneven parts.
//
// p2p_agv_packet_w<world>(link, send, recv, parts): all-gather by packets. `link`: the packet channel's.
// p2p_agv_direct_w<world>(link, send, peers, parts, chunk): by stores; `peers.at[r]` is rank r's result as mapped here. At
//     most kFlagCtas CTAs, of whole warps. `link`: the packet channel's.
// p2p_rsv_<dtype>_w<world>(link, send, recv, parts): reduce-scatter by Lamport packs. `link`: the Lamport channel's.
// p2p_rsvc<units>_<dtype>_w<world>(link, send, recv, parts): by cells. `link`: the cells' channel.
//
// `parts` is the same on all ranks, in bytes of whole elements, and not all are empty. The operand of an empty part is not
// touched. Launch: as for the even forms (gather.cu, all_reduce.cu, cells.cu), but at most one CTA of cells fits on an SM.
#include "uneven.cuh"

#define P2P_GATHER_V(WORLD)                                                                                        \
    extern "C" __global__ void __launch_bounds__(512)                                                              \
        p2p_agv_packet_w##WORLD(const __grid_constant__ p2p::Link link, const char* send, char* recv,              \
                                const __grid_constant__ p2p::Parts parts) {                                        \
        p2p::all_gather_packets_uneven<WORLD>(link, send, recv, parts);                                            \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(512)                                                              \
        p2p_agv_direct_w##WORLD(const __grid_constant__ p2p::Link link, const char* send,                          \
                                const __grid_constant__ p2p::Peers recv, const __grid_constant__ p2p::Parts parts, \
                                uint32_t chunk) {                                                                  \
        p2p::all_gather_direct_uneven<WORLD>(link, send, recv, parts, chunk);                                      \
    }
#define P2P_CELLS_V(T, DTYPE, WORLD, UNITS)                                                              \
    extern "C" __global__ void __launch_bounds__(512, 1) p2p_rsvc##UNITS##_##DTYPE##_w##WORLD(              \
        const __grid_constant__ p2p::Link link, const T* send, T* recv, const __grid_constant__ p2p::Parts parts) {   \
        p2p::reduce_scatter_cells_uneven<T, WORLD, UNITS>(link, send, recv, parts);                                   \
    }
#define P2P_REDUCE_SCATTER_V(T, DTYPE, WORLD)                                                                         \
    extern "C" __global__ void __launch_bounds__(512) p2p_rsv_##DTYPE##_w##WORLD(                                     \
        const __grid_constant__ p2p::Link link, const T* send, T* recv, const __grid_constant__ p2p::Parts parts) {   \
        p2p::reduce_scatter_uneven<T, WORLD>(link, send, recv, parts);                                                \
    }                                                                                                                 \
    P2P_CELLS_V(T, DTYPE, WORLD, 2)                                                                                \
    P2P_CELLS_V(T, DTYPE, WORLD, 4)
#define P2P_UNEVEN(WORLD)                            \
    P2P_GATHER_V(WORLD)                              \
    P2P_REDUCE_SCATTER_V(__nv_bfloat16, bf16, WORLD) \
    P2P_REDUCE_SCATTER_V(__half, f16, WORLD)         \
    P2P_REDUCE_SCATTER_V(float, f32, WORLD)

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_UNEVEN)
