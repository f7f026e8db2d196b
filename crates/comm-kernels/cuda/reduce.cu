// Element-wise reduction of several buffers into one, in the order in which they are given.
//
// reduce_<dtype>(out, inputs, number, count, op, unless): `unless`: null, or a word that makes the kernel do nothing
//     (stop.cuh).

#include "reduce.cuh"
#include "stop.cuh"

namespace {

constexpr u32 MAX_INPUTS = 32;

struct Inputs {
    const void *address[MAX_INPUTS];
};

// Loads issued before the first is used. More would cost registers that the one-byte types need for accumulators.
constexpr u32 BATCH = 4;

template <typename T, u32 OP>
__device__ __forceinline__ void reduce_one(T *out, const Inputs &inputs, u32 number, u64 i) {
    using N = Numeric<T>;
    typename N::Acc acc = N::widen(static_cast<const T *>(inputs.address[0])[i]);
    for (u32 n = 1; n < number; ++n)
        acc = combine<T, OP>(acc, N::widen(static_cast<const T *>(inputs.address[n])[i]));
    out[i] = finish<T, OP>(acc, number);
}

// `out` may be one of the inputs: an element is read from all inputs before it is written, by the same thread.
template <typename T, u32 OP>
__device__ __forceinline__ void reduce(T *out, const Inputs &inputs, u32 number, u64 count) {
    using N = Numeric<T>;
    constexpr u32 WIDTH = 16 / sizeof(T);
    const u64 thread = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 threads = static_cast<u64>(gridDim.x) * blockDim.x;

    // Vectors are possible where all buffers are equally far from a 16-byte boundary.
    const u64 phase = reinterpret_cast<uintptr_t>(out) % 16;
    bool together = true;
    for (u32 n = 0; n < number; ++n) together &= reinterpret_cast<uintptr_t>(inputs.address[n]) % 16 == phase;
    if (!together) {
        for (u64 i = thread; i < count; i += threads) reduce_one<T, OP>(out, inputs, number, i);
        return;
    }
    u64 head = phase == 0 ? 0 : WIDTH - phase / sizeof(T);
    if (head > count) head = count;
    const u64 vectors = (count - head) / WIDTH;
    const u64 tail = head + vectors * WIDTH;

    for (u64 v = thread; v < vectors; v += threads) {
        const u64 i = head + v * WIDTH;
        typename N::Acc acc[WIDTH];
        for (u32 first = 0; first < number; first += BATCH) {
            alignas(16) T values[BATCH][WIDTH];
#pragma unroll
            for (u32 b = 0; b < BATCH; ++b) {
                if (first + b < number)
                    *reinterpret_cast<uint4 *>(values[b]) =
                        *reinterpret_cast<const uint4 *>(static_cast<const T *>(inputs.address[first + b]) + i);
            }
#pragma unroll
            for (u32 b = 0; b < BATCH; ++b) {
                if (first + b < number) {
                    const bool begin = b == 0 && first == 0;
#pragma unroll
                    for (u32 k = 0; k < WIDTH; ++k) {
                        const typename N::Acc value = N::widen(values[b][k]);
                        acc[k] = begin ? value : combine<T, OP>(acc[k], value);
                    }
                }
            }
        }
        alignas(16) T result[WIDTH];
#pragma unroll
        for (u32 k = 0; k < WIDTH; ++k) result[k] = finish<T, OP>(acc[k], number);
        *reinterpret_cast<uint4 *>(out + i) = *reinterpret_cast<const uint4 *>(result);
    }
    // Fewer than 16 elements on either side, so the first block's threads suffice.
    if (thread < head + (count - tail))
        reduce_one<T, OP>(out, inputs, number, thread < head ? thread : tail + (thread - head));
}

}  // namespace

#define KERNEL(T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                \
        reduce_##T(T *out, const __grid_constant__ Inputs inputs, u32 number, u64 count, u32 op,     \
                   const u32 *unless) {                                                              \
        if (stopped(unless)) return;                                                                 \
        switch (op) {                                                                                \
            case REDUCE_SUM: return reduce<T, REDUCE_SUM>(out, inputs, number, count);               \
            case REDUCE_PROD: return reduce<T, REDUCE_PROD>(out, inputs, number, count);             \
            case REDUCE_MIN: return reduce<T, REDUCE_MIN>(out, inputs, number, count);               \
            case REDUCE_MAX: return reduce<T, REDUCE_MAX>(out, inputs, number, count);               \
            default: return reduce<T, REDUCE_AVG>(out, inputs, number, count);                       \
        }                                                                                            \
    }
FOR_EACH_DTYPE(KERNEL)
