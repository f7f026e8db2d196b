// Combining two accumulators, and what is left to do after the last.
#pragma once

#include "dtype.cuh"

enum ReduceOp : u32 { REDUCE_SUM = 0, REDUCE_PROD = 1, REDUCE_MIN = 2, REDUCE_MAX = 3, REDUCE_AVG = 4 };

// Explicitly rounded operations: the compiler must not contract them into fused multiply-adds, since every backend is
// to get the same bits.
__device__ __forceinline__ f32 add(f32 a, f32 b) { return __fadd_rn(a, b); }
__device__ __forceinline__ f64 add(f64 a, f64 b) { return __dadd_rn(a, b); }
template <typename A> __device__ __forceinline__ A add(A a, A b) { return static_cast<A>(a + b); }
__device__ __forceinline__ f32 multiply(f32 a, f32 b) { return __fmul_rn(a, b); }
__device__ __forceinline__ f64 multiply(f64 a, f64 b) { return __dmul_rn(a, b); }
template <typename A> __device__ __forceinline__ A multiply(A a, A b) {
    // Through 64 bits: the product of two 16-bit or narrower values would be a signed `int`.
    return static_cast<A>(static_cast<u64>(a) * static_cast<u64>(b));
}

template <typename T, u32 OP>
__device__ __forceinline__ typename Numeric<T>::Acc combine(
    typename Numeric<T>::Acc a, typename Numeric<T>::Acc b) {
    if constexpr (OP == REDUCE_SUM || OP == REDUCE_AVG) {
        return add(a, b);
    } else if constexpr (OP == REDUCE_PROD) {
        return multiply(a, b);
    } else if constexpr (Numeric<T>::FLOAT) {
        // A comparison with NaN is false, so a NaN in `a` stays; one in `b` is taken because it differs from itself.
        const bool take = OP == REDUCE_MIN ? b < a : b > a;
        return take || b != b ? b : a;
    } else {
        const T x = static_cast<T>(a), y = static_cast<T>(b);
        return (OP == REDUCE_MIN ? y < x : y > x) ? b : a;
    }
}

// The average divides; `count` operands were combined. Integers truncate towards zero.
template <typename T, u32 OP>
__device__ __forceinline__ T finish(typename Numeric<T>::Acc acc, u32 count) {
    if constexpr (OP != REDUCE_AVG) {
        return Numeric<T>::narrow(acc);
    } else if constexpr (sizeof(typename Numeric<T>::Acc) == 8 && Numeric<T>::FLOAT) {
        return Numeric<T>::narrow(__ddiv_rn(acc, static_cast<f64>(count)));
    } else if constexpr (Numeric<T>::FLOAT) {
        return Numeric<T>::narrow(__fdiv_rn(acc, static_cast<f32>(count)));
    } else if constexpr (Numeric<T>::SIGNED) {
        return static_cast<T>(static_cast<i64>(static_cast<T>(acc)) / static_cast<i64>(count));
    } else {
        return static_cast<T>(static_cast<u64>(acc) / static_cast<u64>(count));
    }
}
