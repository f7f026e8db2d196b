// Numbers as fp8 (e4m3) with a scale.
//
// Owns the device's half of what comm-core's `quantize` module defines: the same bits, so every operation that could be
// fused or approximated is spelt out as the one that is rounded to nearest.
#pragma once
#include <cuda_fp8.h>

#include <cstdint>

namespace fp8 {

constexpr float kMax = 448.0f;
// 2^-100: keeps scales and their inverses ordinary numbers.
constexpr uint32_t kLeastAmax = (127u - 100u) << 23;

// Magnitudes are compared as integers, in which NaN is larger than anything.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

struct Scale {
    float scale;
    float inverse;
};

__device__ __forceinline__ Scale scale_of(uint32_t amax) {
    const float a = __uint_as_float(max(amax, kLeastAmax));
    return Scale{__fdiv_rn(a, kMax), __fdiv_rn(kMax, a)};
}

// Two numbers, the first in the low byte.
__device__ __forceinline__ uint32_t pack2(float a, float b, float inverse) {
    const float2 scaled = make_float2(__fmul_rn(a, inverse), __fmul_rn(b, inverse));
    return __nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ uint32_t pack4(const float* v, float inverse) {
    return pack2(v[0], v[1], inverse) | pack2(v[2], v[3], inverse) << 16;
}

// What four fp8 numbers stand for.
__device__ __forceinline__ void unpack4(uint32_t packed, float scale, float* v) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(packed >> (16 * i)), __NV_E4M3);
        const float2 f = __half22float2(__half2(raw));
        v[2 * i] = __fmul_rn(f.x, scale);
        v[2 * i + 1] = __fmul_rn(f.y, scale);
    }
}

}  // namespace fp8
