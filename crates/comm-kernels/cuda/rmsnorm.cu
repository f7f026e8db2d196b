// Entry points of residual + bias + RMSNorm: rmsnorm_<dtype>_<vector|scalar>, by 16 bytes and by single elements.

#include "rmsnorm.cuh"

#define KERNEL(T, SUFFIX, WIDTH, KEEP)                                                                        \
    extern "C" __global__ void __launch_bounds__(1024, 1) rmsnorm_##T##SUFFIX(                                   \
        const T *input, const T *residual, T *residual_out, const T *bias, const T *weight, T *output,        \
        u64 tokens, u64 hidden, f32 eps, f32 weight_offset) {                                                 \
        rmsnorm<T, WIDTH, KEEP, false>(                                                                              \
            input, residual, residual_out, bias, weight, output, tokens, hidden, eps, weight_offset, {});         \
    }
KERNEL(f32, _vector, 4, 4)
KERNEL(f16, _vector, 8, 2)
KERNEL(bf16, _vector, 8, 2)
KERNEL(f32, _scalar, 1, 4)
KERNEL(f16, _scalar, 1, 4)
KERNEL(bf16, _scalar, 1, 4)
