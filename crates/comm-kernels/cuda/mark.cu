// Says that a stream has got to a point, so that the host can see the progress of replayed graphs.

#include "pattern.cuh"

// Counts the passes and writes the count and the tag where the host sees them. Passes that overlap, on different streams,
// write different slots, so that the highest count in sight never falls.
extern "C" __global__ void __launch_bounds__(1) mark(u64 *counter, ulonglong2 *slots, u32 slot_count, u64 tag) {
    const u64 count = atomicAdd(reinterpret_cast<unsigned long long *>(counter), 1ull) + 1;
    slots[count % slot_count] = make_ulonglong2(count, tag);
}
