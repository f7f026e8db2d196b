// Entry points of residual + bias + RMSNorm with an fp8 result: rmsnorm_fp8_<dtype>_<vector|scalar>.
//
// `quantized`: aligned to as many bytes as an access has elements. `scale`: one number to read, or with `per_token` one
// for each row to write. `output` may be null.

#include "rmsnorm.cuh"

#define KERNEL(T, SUFFIX, WIDTH, KEEP)                                                                           \
    extern "C" __global__ void __launch_bounds__(1024, 1) rmsnorm_fp8_##T##SUFFIX(                               \
        const T *input, const T *residual, T *residual_out, const T *bias, const T *weight, T *output,           \
        u64 tokens, u64 hidden, f32 eps, f32 weight_offset, u8 *quantized, f32 *scale, u32 per_token) {          \
        rmsnorm<T, WIDTH, KEEP, true>(                                                                           \
            input, residual, residual_out, bias, weight, output, tokens, hidden, eps, weight_offset,             \
            Quantized{quantized, scale, per_token != 0});                                                        \
    }
KERNEL(f32, _vector, 4, 4)
KERNEL(f16, _vector, 8, 2)
KERNEL(bf16, _vector, 8, 2)
KERNEL(f32, _scalar, 1, 4)
KERNEL(f16, _scalar, 1, 4)
KERNEL(bf16, _scalar, 1, 4)
