// Entry points of the fused all-reduce + residual + bias + RMSNorm with an fp8 result:
// p2p_norm<1|1l|2>_fp8_<dtype>_w<world>(link, args, quantized).
//
// As norm.cu says of the ones without; `args.output` may be null here.
#include "norm.cuh"

#define P2P_NORM(T, DTYPE, WORLD)                                                               \
    extern "C" __global__ void __launch_bounds__(512) p2p_norm1_fp8_##DTYPE##_w##WORLD(         \
        const __grid_constant__ p2p::Link link, const __grid_constant__ p2p::NormArgs<T> args,  \
        const __grid_constant__ p2p::NormQuantized quantized) {                                 \
        p2p::norm_one_shot<T, WORLD, p2p::Packet, true>(link, args, quantized);                 \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(512) p2p_norm1l_fp8_##DTYPE##_w##WORLD(        \
        const __grid_constant__ p2p::Link link, const __grid_constant__ p2p::NormArgs<T> args,  \
        const __grid_constant__ p2p::NormQuantized quantized) {                                 \
        p2p::norm_one_shot<T, WORLD, p2p::Lamport, true>(link, args, quantized);                \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(512) p2p_norm2_fp8_##DTYPE##_w##WORLD(         \
        const __grid_constant__ p2p::Link link, const __grid_constant__ p2p::NormArgs<T> args,  \
        const __grid_constant__ p2p::NormQuantized quantized) {                                 \
        p2p::norm_two_shot<T, WORLD, true>(link, args, quantized);                              \
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
