// Entry points of averages: sums by packs, divided by the number of ranks in fp32 before they are rounded.
//
// p2p_ar1avg_<dtype>_w<world>, p2p_ar2avg_..., p2p_rsavg_...: as p2p_ar1, p2p_ar2 and p2p_rs (all_reduce.cu).
// p2p_rsvavg_...: as p2p_rsv (uneven.cu).
//
// Entry points of their own, so that sums have nothing to decide.
#include "uneven.cuh"

#define P2P_AVERAGE(NAME, BODY, WIRE, T, DTYPE, WORLD)                                     \
    extern "C" __global__ void __launch_bounds__(512) p2p_##NAME##avg_##DTYPE##_w##WORLD(  \
        const __grid_constant__ p2p::Link link, const T* send, T* recv, size_t count) {    \
        p2p::BODY<T, WORLD, p2p::WIRE, true>(link, send, recv, count);                     \
    }
#define P2P_AVERAGES(T, DTYPE, WORLD)                                                                               \
    P2P_AVERAGE(ar1, all_reduce_one_shot, Packet, T, DTYPE, WORLD)                                                  \
    P2P_AVERAGE(ar2, all_reduce_two_shot, Lamport, T, DTYPE, WORLD)                                                 \
    P2P_AVERAGE(rs, reduce_scatter, Lamport, T, DTYPE, WORLD)                                                       \
    extern "C" __global__ void __launch_bounds__(512) p2p_rsvavg_##DTYPE##_w##WORLD(                                \
        const __grid_constant__ p2p::Link link, const T* send, T* recv, const __grid_constant__ p2p::Parts parts) { \
        p2p::reduce_scatter_uneven<T, WORLD, true>(link, send, recv, parts);                                        \
    }
#define P2P_DTYPES(WORLD)                    \
    P2P_AVERAGES(__nv_bfloat16, bf16, WORLD) \
    P2P_AVERAGES(__half, f16, WORLD)         \
    P2P_AVERAGES(float, f32, WORLD)

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_DTYPES)
#undef P2P_DTYPES
