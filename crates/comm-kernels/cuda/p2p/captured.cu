// Entry points of large operations whose result buffers are registered after they have been captured.
//
// p2p_arg<units>_<dtype>_w<world>(cells, lamport, send, recv, count, entry): all-reduce, by cells or in two shots.
// p2p_agg_w<world>(link, send, recv, bytes, chunk, entry): all-gather, directly or by packets.
//
// `entry` is a CapturedEntry in this rank's device memory; every rank passes the entry that it reserved for the same
// call. Launch: as for both of the kernels that it stands for (cells.cu and all_reduce.cu, or the two in gather.cu).
#include "captured.cuh"

#define P2P_REDUCE_CAPTURED(T, DTYPE, WORLD, UNITS)                                                                  \
    extern "C" __global__ void __launch_bounds__(512) p2p_arg##UNITS##_##DTYPE##_w##WORLD(                           \
        const __grid_constant__ p2p::Link cells, const __grid_constant__ p2p::Link lamport, const T* send, T* recv,  \
        size_t count, const p2p::CapturedEntry* entry) {                                                             \
        p2p::all_reduce_captured<T, WORLD, UNITS>(cells, lamport, send, recv, count, entry);                         \
    }
#define P2P_CAPTURED(WORLD)                                                                                          \
    P2P_REDUCE_CAPTURED(__nv_bfloat16, bf16, WORLD, 2)                                                               \
    P2P_REDUCE_CAPTURED(__nv_bfloat16, bf16, WORLD, 4)                                                               \
    P2P_REDUCE_CAPTURED(__half, f16, WORLD, 2)                                                                       \
    P2P_REDUCE_CAPTURED(__half, f16, WORLD, 4)                                                                       \
    P2P_REDUCE_CAPTURED(float, f32, WORLD, 2)                                                                        \
    P2P_REDUCE_CAPTURED(float, f32, WORLD, 4)                                                                        \
    extern "C" __global__ void __launch_bounds__(512)                                                                \
        p2p_agg_w##WORLD(const __grid_constant__ p2p::Link link, const char* send, char* recv, size_t bytes,         \
                         uint32_t chunk, const p2p::CapturedEntry* entry) {                                          \
        p2p::all_gather_captured<WORLD>(link, send, recv, bytes, chunk, entry);                                      \
    }

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_CAPTURED)
