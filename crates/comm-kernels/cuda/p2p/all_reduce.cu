// Entry points of all-reduce and reduce-scatter over packs.
//
// Names: p2p_<op>_<wire>_<dtype>_w<world>, op = ar1 (one-shot all-reduce), ar2 (two-shot all-reduce), rs
// (reduce-scatter); wire = lamport | packet. `link.channel` and `link.scratch` are those of that wire's channel.
//
// Parameters: the link; `send`, `recv` (element-aligned, equal or disjoint; reduce-scatter: see reduce.cuh); `count` in
// elements, at least 1. Launch: one-dimensional, equal on all ranks, resident as a whole, at most 512 threads a CTA,
// grid * block <= slot_packs (ar2, rs); packs(count) <= slot_packs (ar1). No dynamic shared memory. May be launched
// with programmatic stream serialization.
#include "reduce.cuh"

#define P2P_REDUCE(NAME, BODY, WIRE, WIRE_NAME, T, DTYPE, WORLD)                                                       \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        p2p_##NAME##_##WIRE_NAME##_##DTYPE##_w##WORLD(const __grid_constant__ p2p::Link link, const T* send, T* recv,  \
                                                      size_t count) {                                                  \
        p2p::BODY<T, WORLD, p2p::WIRE>(link, send, recv, count);                                                       \
    }
#define P2P_WIRES(T, DTYPE, WORLD)                                                                                     \
    P2P_REDUCE(ar1, all_reduce_one_shot, Lamport, lamport, T, DTYPE, WORLD)                                            \
    P2P_REDUCE(ar2, all_reduce_two_shot, Lamport, lamport, T, DTYPE, WORLD)                                            \
    P2P_REDUCE(rs, reduce_scatter, Lamport, lamport, T, DTYPE, WORLD)                                                  \
    P2P_REDUCE(ar1, all_reduce_one_shot, Packet, packet, T, DTYPE, WORLD)                                              \
    P2P_REDUCE(ar2, all_reduce_two_shot, Packet, packet, T, DTYPE, WORLD)
#define P2P_DTYPES(WORLD)                                                                                              \
    P2P_WIRES(__nv_bfloat16, bf16, WORLD)                                                                              \
    P2P_WIRES(__half, f16, WORLD)                                                                                      \
    P2P_WIRES(float, f32, WORLD)

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_DTYPES)
#undef P2P_DTYPES
