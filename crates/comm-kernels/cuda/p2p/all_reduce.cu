// Entry points of all-reduce and reduce-scatter over packs.
//
// p2p_ar1_<dtype>_w<world>(link, send, recv, count): all-reduce, one hop, by packets: the smallest sizes.
// p2p_ar1l_<dtype>_w<world>(link, send, recv, count): the same by Lamport packs: where the wire begins to count.
// p2p_ar2_<dtype>_w<world>(link, send, recv, count): all-reduce, two hops, by Lamport packs: middle sizes.
// p2p_rs_<dtype>_w<world>(link, send, recv, count): reduce-scatter by Lamport packs; `count` elements a rank.
//
// Measured: packets have the least latency; from some size on Lamport packs' fewer bytes outweigh the restoring of marks, and
// in two hops they always do.
//
// `link` is the packet channel's for ar1, the Lamport channel's for ar1l, ar2 and rs. `send` and `recv` are element-aligned,
// equal or disjoint (reduce-scatter: see reduce.cuh); `count` is at least 1. Launch: one-dimensional, equal on all
// ranks, resident as a whole, at most 512 threads a CTA; ar2 and rs: grid * block <= slot_packs; ar1: ceil(bytes / 12)
// <= slot_packs; ar1l: ceil(bytes / 16) <= slot_packs. No dynamic shared memory. May be launched with programmatic stream serialization.
#include "reduce.cuh"

#define P2P_REDUCE(NAME, BODY, WIRE, T, DTYPE, WORLD)                                   \
    extern "C" __global__ void __launch_bounds__(512) p2p_##NAME##_##DTYPE##_w##WORLD(  \
        const __grid_constant__ p2p::Link link, const T* send, T* recv, size_t count) { \
        p2p::BODY<T, WORLD, p2p::WIRE>(link, send, recv, count);                        \
    }
#define P2P_REDUCTIONS(T, DTYPE, WORLD)                            \
    P2P_REDUCE(ar1, all_reduce_one_shot, Packet, T, DTYPE, WORLD)  \
    P2P_REDUCE(ar1l, all_reduce_one_shot, Lamport, T, DTYPE, WORLD) \
    P2P_REDUCE(ar2, all_reduce_two_shot, Lamport, T, DTYPE, WORLD) \
    P2P_REDUCE(rs, reduce_scatter, Lamport, T, DTYPE, WORLD)
#define P2P_DTYPES(WORLD)                      \
    P2P_REDUCTIONS(__nv_bfloat16, bf16, WORLD) \
    P2P_REDUCTIONS(__half, f16, WORLD)         \
    P2P_REDUCTIONS(float, f32, WORLD)

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_DTYPES)
#undef P2P_DTYPES
