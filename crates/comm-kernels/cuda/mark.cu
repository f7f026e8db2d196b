// Says that a stream has got to a point, so that the host can see the progress of replayed graphs.

#include "pattern.cuh"

// Counts the passes and writes the count and the tag where the host sees them. The addition is atomic, so that no two
// passes, which may overlap on different streams or beside one another in a graph, share a count: they write different
// slots, and the highest count in sight never falls while fewer passes overlap than there are slots.
static __device__ void pass(u64 *counter, ulonglong2 *slots, u32 slot_count, u64 tag) {
    const u64 count = atomicAdd(reinterpret_cast<unsigned long long *>(counter), 1ull) + 1;
    slots[count % slot_count] = make_ulonglong2(count, tag);
}

extern "C" __global__ void __launch_bounds__(1) mark(u64 *counter, ulonglong2 *slots, u32 slot_count, u64 tag) {
    pass(counter, slots, slot_count, tag);
}

// Counts one pass, or two of different counters; the second counter is null where there is one alone. Nothing orders
// them as the host sees them.
extern "C" __global__ void __launch_bounds__(1)
    mark_two(u64 *counter, ulonglong2 *slots, u32 slot_count, u64 tag, u64 *second_counter, ulonglong2 *second_slots,
             u32 second_slot_count, u64 second_tag) {
    pass(counter, slots, slot_count, tag);
    if (second_counter != nullptr) {
        pass(second_counter, second_slots, second_slot_count, second_tag);
    }
}
