// Element types, their fp32 accumulation, and reading and writing callers' buffers, whatever their alignment.
//
// Owns: conversions and loads/stores of caller memory in packs. Never touches scratch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "wire.cuh"

namespace p2p {

template <class T>
struct Numeric;

template <>
struct Numeric<float> {
    static constexpr int kPerWord = 1;
    __device__ __forceinline__ static void unpack(uint32_t w, float* v) { v[0] = __uint_as_float(w); }
    __device__ __forceinline__ static uint32_t pack(const float* v) { return __float_as_uint(v[0]); }
};

template <>
struct Numeric<__nv_bfloat16> {
    static constexpr int kPerWord = 2;
    __device__ __forceinline__ static void unpack(uint32_t w, float* v) {
        v[0] = __uint_as_float(w << 16);
        v[1] = __uint_as_float(w & 0xffff0000u);
    }
    __device__ __forceinline__ static uint32_t pack(const float* v) {
        const __nv_bfloat162 h = __floats2bfloat162_rn(v[0], v[1]);
        return *reinterpret_cast<const uint32_t*>(&h);
    }
};

template <>
struct Numeric<__half> {
    static constexpr int kPerWord = 2;
    __device__ __forceinline__ static void unpack(uint32_t w, float* v) {
        const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&w));
        v[0] = f.x, v[1] = f.y;
    }
    __device__ __forceinline__ static uint32_t pack(const float* v) {
        const __half2 h = __floats2half2_rn(v[0], v[1]);
        return *reinterpret_cast<const uint32_t*>(&h);
    }
};

// fp32 accumulators of one pack. Ranks are added in the order 0, 1, 2, ...: the first is assigned, not added to zero,
// so that a sum of -0.0 stays -0.0.
template <class T, int kWords>
struct Accumulator {
    static constexpr int kElems = kWords * Numeric<T>::kPerWord;
    float v[kElems];

    __device__ __forceinline__ void set(const Words<kWords>& x) {
#pragma unroll
        for (int i = 0; i < kWords; i++) Numeric<T>::unpack(x.w[i], v + i * Numeric<T>::kPerWord);
    }
    __device__ __forceinline__ void add(const Words<kWords>& x) {
        Accumulator other;
        other.set(x);
#pragma unroll
        for (int i = 0; i < kElems; i++) v[i] += other.v[i];
    }
    // An average's last step, in fp32: a true division, whose bits the host backend gives too. By a power of two a product
    // has the same.
    template <int kBy>
    __device__ __forceinline__ void divide() {
#pragma unroll
        for (int i = 0; i < kElems; i++)
            v[i] = (kBy & (kBy - 1)) == 0 ? __fmul_rn(v[i], 1.0f / kBy) : __fdiv_rn(v[i], float(kBy));
    }
    __device__ __forceinline__ Words<kWords> rounded() const {
        Words<kWords> r;
#pragma unroll
        for (int i = 0; i < kWords; i++) r.w[i] = Numeric<T>::pack(v + i * Numeric<T>::kPerWord);
        return r;
    }
};

// The largest power of two up to 16 that divides all given addresses and strides (in bytes).
__device__ __forceinline__ uint32_t common_alignment(uint64_t bits) {
    const uint32_t low = uint32_t(bits) | 16u;
    return low & (~low + 1);
}

__device__ __forceinline__ uint64_t address(const void* p) { return reinterpret_cast<uint64_t>(p); }

// Reads `bytes` (1 to 4 * kWords, whole elements of at least `kUnit` bytes) at `from`; the rest of the words is zero.
// `align` is a power of two that divides the address. The branches are uniform for all packs but a slice's last.
template <int kUnit, int kWords>
__device__ __forceinline__ Words<kWords> read_pack(const char* from, uint32_t bytes, uint32_t align) {
    Words<kWords> v;
    if (bytes == 4 * kWords && align >= 16 && kWords == 4) {
        const uint4 p = *reinterpret_cast<const uint4*>(from);
        v.w[0] = p.x, v.w[1] = p.y, v.w[2] = p.z, v.w[kWords - 1] = p.w;
    } else if (bytes == 4 * kWords && align >= 4) {
#pragma unroll
        for (int i = 0; i < kWords; i++) v.w[i] = reinterpret_cast<const uint32_t*>(from)[i];
    } else {
#pragma unroll
        for (int i = 0; i < kWords; i++) {
            uint32_t w = 0;
#pragma unroll
            for (int b = 0; b < 4; b += kUnit) {
                if (4 * i + b < int(bytes)) {
                    uint32_t part;
                    if (kUnit == 1) part = *reinterpret_cast<const uint8_t*>(from + 4 * i + b);
                    if (kUnit == 2) part = *reinterpret_cast<const uint16_t*>(from + 4 * i + b);
                    if (kUnit == 4) part = *reinterpret_cast<const uint32_t*>(from + 4 * i + b);
                    w |= part << (8 * b);
                }
            }
            v.w[i] = w;
        }
    }
    return v;
}

// Whether whole packs of `kWords` words at this alignment are moved by their widest instructions.
template <int kWords>
__device__ __forceinline__ bool moves_wide(uint32_t align) {
    return align >= (kWords == 4 ? 16 : 4);
}

// A whole, well-aligned pack, without branches, so that several such loads overlap.
template <int kWords>
__device__ __forceinline__ Words<kWords> read_wide(const char* from) {
    Words<kWords> v;
    if constexpr (kWords == 4) {
        const uint4 p = *reinterpret_cast<const uint4*>(from);
        v.w[0] = p.x, v.w[1] = p.y, v.w[2] = p.z, v.w[3] = p.w;
    } else {
#pragma unroll
        for (int i = 0; i < kWords; i++) v.w[i] = reinterpret_cast<const uint32_t*>(from)[i];
    }
    return v;
}

template <int kWords>
__device__ __forceinline__ void write_wide(char* to, const Words<kWords>& v) {
    if constexpr (kWords == 4) {
        *reinterpret_cast<uint4*>(to) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
    } else {
#pragma unroll
        for (int i = 0; i < kWords; i++) reinterpret_cast<uint32_t*>(to)[i] = v.w[i];
    }
}

// The counterpart of `read_pack`: writes the first `bytes` bytes and nothing beyond.
template <int kUnit, int kWords>
__device__ __forceinline__ void write_pack(char* to, const Words<kWords>& v, uint32_t bytes, uint32_t align) {
    if (bytes == 4 * kWords && align >= 16 && kWords == 4) {
        *reinterpret_cast<uint4*>(to) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[kWords - 1]);
    } else if (bytes == 4 * kWords && align >= 4) {
#pragma unroll
        for (int i = 0; i < kWords; i++) reinterpret_cast<uint32_t*>(to)[i] = v.w[i];
    } else {
#pragma unroll
        for (int i = 0; i < kWords; i++) {
#pragma unroll
            for (int b = 0; b < 4; b += kUnit) {
                if (4 * i + b < int(bytes)) {
                    const uint32_t part = v.w[i] >> (8 * b);
                    if (kUnit == 1) *reinterpret_cast<uint8_t*>(to + 4 * i + b) = uint8_t(part);
                    if (kUnit == 2) *reinterpret_cast<uint16_t*>(to + 4 * i + b) = uint16_t(part);
                    if (kUnit == 4) *reinterpret_cast<uint32_t*>(to + 4 * i + b) = part;
                }
            }
        }
    }
}

// A buffer cut into one slice per rank, `stride` bytes apart, each a run of packs of which the last may be partial.
// `total` ends the buffer: slices past it are short or empty.
template <int kWords>
struct Slices {
    static constexpr uint32_t kBytes = 4 * kWords;
    static constexpr bool kUneven = false;
    size_t stride;
    size_t total;

    // Bytes of pack `j` of slice `s`; 0 if there is none.
    __device__ __forceinline__ uint32_t bytes(int s, size_t j) const {
        const size_t in_slice = j * kBytes, begin = s * stride + in_slice;
        if (in_slice >= stride || begin >= total) return 0;
        const size_t left = min(stride - in_slice, total - begin);
        return left < kBytes ? uint32_t(left) : kBytes;
    }
    __device__ __forceinline__ size_t offset(int s, size_t j) const { return s * stride + j * kBytes; }
    // Packs that are whole in every slice: those below this index need no length checks.
    __device__ __forceinline__ size_t whole_packs(int slices) const {
        const size_t before_last = (slices - 1) * stride;
        return before_last >= total ? 0 : min(stride, total - before_last) / kBytes;
    }
    // Packs of the longest slice.
    __device__ __forceinline__ size_t packs() const { return (min(stride, total) + kBytes - 1) / kBytes; }

    // Cuts `total` bytes into `parts` slices of whole packs.
    __device__ __forceinline__ static Slices cut(size_t total, int parts) {
        const size_t packs = (total + kBytes - 1) / kBytes;
        return Slices{(packs + parts - 1) / parts * kBytes, total};
    }
};

}  // namespace p2p
