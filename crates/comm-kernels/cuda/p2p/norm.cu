// Entry points of the fused all-reduce + residual + bias + RMSNorm: p2p_norm<1|1l|2>_<dtype>_w<world>(link, args).
//
// `link` is the packet channel's for norm1, the Lamport channel's for norm1l and norm2; `args` is NormArgs. Operands are
// element-aligned; `residual_out` may be `residual`, `output` may be `input`; tokens and hidden at least 1.
//
// norm1: clusters of 1, 2, 4 or 8 CTAs, one per token: grid = tokens * cluster, cluster * block >= packs of a row
//     (ceil(hidden * element size / 12)).
// norm1l: the same by packs of 16 bytes.
// norm2: block >= ceil(ceil(hidden * element size / 16) / world), a multiple of 32; any grid that is resident as a
// whole. All: at most 512 threads a CTA, grid * block <= slot_packs, equal launches on all ranks.
#include "norm.cuh"

#define P2P_NORM(T, DTYPE, WORLD)                                                                \
    extern "C" __global__ void __launch_bounds__(512) p2p_norm1_##DTYPE##_w##WORLD(              \
        const __grid_constant__ p2p::Link link, const __grid_constant__ p2p::NormArgs<T> args) { \
        p2p::norm_one_shot<T, WORLD, p2p::Packet>(link, args);                                   \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(512) p2p_norm1l_##DTYPE##_w##WORLD(             \
        const __grid_constant__ p2p::Link link, const __grid_constant__ p2p::NormArgs<T> args) { \
        p2p::norm_one_shot<T, WORLD, p2p::Lamport>(link, args);                                  \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(512) p2p_norm2_##DTYPE##_w##WORLD(              \
        const __grid_constant__ p2p::Link link, const __grid_constant__ p2p::NormArgs<T> args) { \
        p2p::norm_two_shot<T, WORLD>(link, args);                                                \
    }
#define P2P_DTYPES(WORLD)                \
    P2P_NORM(__nv_bfloat16, bf16, WORLD) \
    P2P_NORM(__half, f16, WORLD)         \
    P2P_NORM(float, f32, WORLD)

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_DTYPES)
#undef P2P_DTYPES
