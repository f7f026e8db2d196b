// Fills a buffer with generated data.

#include "pattern.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void fill(
    T *out, u64 count, u64 seed, u64 rank, u64 first_index, u32 kind, u32 world) {
    constexpr u32 WIDTH = 16 / sizeof(T);
    const u64 stream = pattern_stream(seed, rank);
    const u64 thread = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 threads = static_cast<u64>(gridDim.x) * blockDim.x;

    // Elements before the first 16-byte boundary, whole vectors, and what remains.
    const u64 misaligned = reinterpret_cast<uintptr_t>(out) % 16 / sizeof(T);
    u64 head = misaligned == 0 ? 0 : WIDTH - misaligned;
    if (head > count) head = count;
    const u64 vectors = (count - head) / WIDTH;
    const u64 tail = head + vectors * WIDTH;

    for (u64 v = thread; v < vectors; v += threads) {
        const u64 i = head + v * WIDTH;
        alignas(16) T values[WIDTH];
#pragma unroll
        for (u32 k = 0; k < WIDTH; ++k)
            values[k] = pattern_element<T>(kind, world, pattern_hash(stream, first_index + i + k));
        *reinterpret_cast<uint4 *>(out + i) = *reinterpret_cast<const uint4 *>(values);
    }
    // Fewer than 16 elements on either side, so the first block's threads suffice.
    if (thread < head + (count - tail)) {
        const u64 i = thread < head ? thread : tail + (thread - head);
        out[i] = pattern_element<T>(kind, world, pattern_hash(stream, first_index + i));
    }
}

}  // namespace

#define KERNEL(T)                                                                              \
    extern "C" __global__ void __launch_bounds__(256) fill_##T(                                \
        T *out, u64 count, u64 seed, u64 rank, u64 first_index, u32 kind, u32 world) {         \
        fill<T>(out, count, seed, rank, first_index, kind, world);                             \
    }
FOR_EACH_DTYPE(KERNEL)
