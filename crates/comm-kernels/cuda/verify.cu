// Counts the elements that differ from what generated data should have become.

#include "pattern.cuh"
#include "reduce.cuh"

namespace {

constexpr u64 NONE = ~0ull;

// Element `index` of the reduction over all ranks, accumulated in rank order.
template <typename T, u32 OP>
__device__ __forceinline__ T reduced(u64 seed, u64 index, u32 kind, u32 world) {
    using N = Numeric<T>;
    typename N::Acc acc =
        N::widen(pattern_element<T>(kind, world, pattern_hash(pattern_stream(seed, 0), index)));
    for (u32 rank = 1; rank < world; ++rank) {
        const T next = pattern_element<T>(kind, world, pattern_hash(pattern_stream(seed, rank), index));
        acc = combine<T, OP>(acc, N::widen(next));
    }
    return finish<T, OP>(acc, world);
}

template <typename T>
__device__ __forceinline__ T expected(u64 seed, u64 rank, u64 index, u32 kind, u32 world, u32 op) {
    switch (op) {
        case REDUCE_SUM: return reduced<T, REDUCE_SUM>(seed, index, kind, world);
        case REDUCE_PROD: return reduced<T, REDUCE_PROD>(seed, index, kind, world);
        case REDUCE_MIN: return reduced<T, REDUCE_MIN>(seed, index, kind, world);
        case REDUCE_MAX: return reduced<T, REDUCE_MAX>(seed, index, kind, world);
        case REDUCE_AVG: return reduced<T, REDUCE_AVG>(seed, index, kind, world);
        default: return pattern_element<T>(kind, world, pattern_hash(pattern_stream(seed, rank), index));
    }
}

// `result[0]` grows by the number of wrong elements, `result[1]` falls to the lowest wrong index. The index reported
// is `report_base` plus the element's position in `data`.
template <typename T>
__device__ __forceinline__ void verify(
    const T *data, u64 count, u64 seed, u64 rank, u64 first_index, u64 report_base, u32 kind, u32 world, u32 op,
    u64 *result) {
    const u64 thread = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 threads = static_cast<u64>(gridDim.x) * blockDim.x;
    u64 wrong = 0, first = NONE;
    for (u64 i = thread; i < count; i += threads) {
        const T value = expected<T>(seed, rank, first_index + i, kind, world, op);
        if (bits_of(value) != bits_of(data[i])) {
            if (wrong == 0) first = report_base + i;
            ++wrong;
        }
    }
    if (wrong != 0) {
        atomicAdd(reinterpret_cast<unsigned long long *>(result), static_cast<unsigned long long>(wrong));
        atomicMin(reinterpret_cast<unsigned long long *>(result + 1), static_cast<unsigned long long>(first));
    }
}

}  // namespace

#define KERNEL(T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) verify_##T(                                              \
        const T *data, u64 count, u64 seed, u64 rank, u64 first_index, u64 report_base, u32 kind, u32 world,   \
        u32 op, u64 *result) {                                                                                 \
        verify<T>(data, count, seed, rank, first_index, report_base, kind, world, op, result);                 \
    }
FOR_EACH_DTYPE(KERNEL)

// Nothing wrong so far.
extern "C" __global__ void verify_reset(u64 *result) {
    result[0] = 0;
    result[1] = NONE;
}
