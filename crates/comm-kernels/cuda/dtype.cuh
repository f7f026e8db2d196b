// The element types: storage, and the type that reductions of it accumulate in.
//
// Names, order and meaning follow comm-core's `DType` and `ReduceOp`. Conversions round to nearest, ties to even; the
// 8-bit floats saturate to their largest finite value.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

using f64 = double;
using f32 = float;
using f16 = __half;
using bf16 = __nv_bfloat16;
using f8e4m3 = __nv_fp8_e4m3;
using f8e5m2 = __nv_fp8_e5m2;
using i8 = int8_t;
using u8 = uint8_t;
using i32 = int32_t;
using u32 = uint32_t;
using i64 = int64_t;
using u64 = uint64_t;

// Applies `X(element)` to every element type, in the order of `DType::ALL`.
#define FOR_EACH_DTYPE(X) \
    X(f64) X(f32) X(f16) X(bf16) X(f8e4m3) X(f8e5m2) X(i8) X(u8) X(i32) X(u32) X(i64) X(u64)

// The unsigned integer with as many bits as a type.
template <int BYTES> struct BitsOf;
template <> struct BitsOf<1> { using Type = u8; };
template <> struct BitsOf<2> { using Type = uint16_t; };
template <> struct BitsOf<4> { using Type = u32; };
template <> struct BitsOf<8> { using Type = u64; };
template <typename T> using Bits = typename BitsOf<sizeof(T)>::Type;

template <typename T> __device__ __forceinline__ Bits<T> bits_of(T value) {
    Bits<T> bits;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <typename T> __device__ __forceinline__ T from_bits(u64 raw) {
    const Bits<T> bits = static_cast<Bits<T>>(raw);
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}

// `Acc` accumulates; integers accumulate as unsigned integers of their own width, for which wrapping is defined.
template <typename T> struct Numeric {
    static constexpr bool FLOAT = true;
    static constexpr bool SIGNED = true;
    using Acc = f32;
    static __device__ __forceinline__ Acc widen(T value) { return static_cast<f32>(value); }
    static __device__ __forceinline__ T narrow(Acc value) { return T(value); }
};
template <> struct Numeric<f64> {
    static constexpr bool FLOAT = true;
    static constexpr bool SIGNED = true;
    using Acc = f64;
    static __device__ __forceinline__ Acc widen(f64 value) { return value; }
    static __device__ __forceinline__ f64 narrow(Acc value) { return value; }
};
template <> struct Numeric<f16> {
    static constexpr bool FLOAT = true;
    static constexpr bool SIGNED = true;
    using Acc = f32;
    static __device__ __forceinline__ Acc widen(f16 value) { return __half2float(value); }
    static __device__ __forceinline__ f16 narrow(Acc value) { return __float2half_rn(value); }
};
template <> struct Numeric<bf16> {
    static constexpr bool FLOAT = true;
    static constexpr bool SIGNED = true;
    using Acc = f32;
    static __device__ __forceinline__ Acc widen(bf16 value) { return __bfloat162float(value); }
    static __device__ __forceinline__ bf16 narrow(Acc value) { return __float2bfloat16_rn(value); }
};
template <typename T, bool SIGNED_TYPE> struct Integer {
    static constexpr bool FLOAT = false;
    static constexpr bool SIGNED = SIGNED_TYPE;
    using Acc = Bits<T>;
    static __device__ __forceinline__ Acc widen(T value) { return static_cast<Acc>(value); }
    static __device__ __forceinline__ T narrow(Acc value) { return static_cast<T>(value); }
};
template <> struct Numeric<i8> : Integer<i8, true> {};
template <> struct Numeric<u8> : Integer<u8, false> {};
template <> struct Numeric<i32> : Integer<i32, true> {};
template <> struct Numeric<u32> : Integer<u32, false> {};
template <> struct Numeric<i64> : Integer<i64, true> {};
template <> struct Numeric<u64> : Integer<u64, false> {};
