// The data generator: every element follows from a seed, a rank and an index, so that any device can say what any rank
// sent. It is the same function, bit for bit, as the Rust module `pattern`, which documents it.
#pragma once

#include "dtype.cuh"

enum PatternKind : u32 { PATTERN_BITS = 0, PATTERN_SUM = 1, PATTERN_PROD = 2, PATTERN_AVG = 3 };

constexpr u64 PATTERN_GAMMA = 0x9E3779B97F4A7C15ull;

// The finaliser of splitmix64.
__host__ __device__ __forceinline__ u64 mix64(u64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ u64 pattern_stream(u64 seed, u64 rank) {
    return mix64(seed + (rank + 1) * PATTERN_GAMMA);
}

__device__ __forceinline__ u64 pattern_hash(u64 stream, u64 index) {
    return mix64(stream + (index + 1) * PATTERN_GAMMA);
}

// How large the values for sums and averages may be, so that all partial sums are exact.
template <typename T> struct Magnitude { static constexpr i32 SUM = 0, AVG = 1024; };
template <> struct Magnitude<f64> { static constexpr i32 SUM = 32768, AVG = 1024; };
template <> struct Magnitude<f32> { static constexpr i32 SUM = 32768, AVG = 1024; };
template <> struct Magnitude<f16> { static constexpr i32 SUM = 64, AVG = 4; };
template <> struct Magnitude<bf16> { static constexpr i32 SUM = 8, AVG = 1; };
template <> struct Magnitude<f8e4m3> { static constexpr i32 SUM = 2, AVG = 1; };
template <> struct Magnitude<f8e5m2> { static constexpr i32 SUM = 1, AVG = 1; };
template <> struct Magnitude<i8> { static constexpr i32 SUM = 0, AVG = 1; };
template <> struct Magnitude<u8> { static constexpr i32 SUM = 0, AVG = 1; };

// An integer in -magnitude ..= magnitude.
__device__ __forceinline__ i32 pattern_small(u64 hash, i32 magnitude) {
    const u32 span = 2 * static_cast<u32>(magnitude) + 1;
    return static_cast<i32>(__umulhi(static_cast<u32>(hash >> 32), span)) - magnitude;
}

template <typename T> __device__ __forceinline__ T pattern_number(i32 value) {
    if constexpr (Numeric<T>::FLOAT) {
        return Numeric<T>::narrow(static_cast<typename Numeric<T>::Acc>(value));
    } else {
        return static_cast<T>(value);
    }
}

template <typename T>
__device__ __forceinline__ T pattern_element(u32 kind, u32 world, u64 hash) {
    if (kind == PATTERN_AVG) {
        i32 value = pattern_small(hash, Magnitude<T>::AVG);
        if constexpr (!Numeric<T>::SIGNED) value += Magnitude<T>::AVG;
        return pattern_number<T>(value * static_cast<i32>(world));
    }
    if constexpr (Numeric<T>::FLOAT) {
        if (kind == PATTERN_SUM) return pattern_number<T>(pattern_small(hash, Magnitude<T>::SUM));
        if (kind == PATTERN_PROD) {
            const i32 exponent = pattern_small(hash, 1);
            const f32 power = exponent < 0 ? 0.5f : exponent == 0 ? 1.0f : 2.0f;
            return Numeric<T>::narrow(static_cast<typename Numeric<T>::Acc>(hash & 1 ? -power : power));
        }
    }
    return from_bits<T>(hash);
}
