// Says that a stream has got to a point, so that the host can see the progress of replayed graphs.

#include "pattern.cuh"

// A counter is one word, so that one atomic addition takes both a count and a place to show it in: the count in the low
// 48 bits, which last for almost nine years at a call a microsecond (a pass may add many), and above it the passes, which
// may wrap: the number of slots is a power of two (Mark::check).
static constexpr u64 ONE_PASS = 1ull << 48;

// Adds to the count and writes it and the tag where the host sees them. The addition is atomic, so that no two passes,
// which may overlap on different streams or beside one another in a graph, share a place: they write different slots
// whatever they add, and the highest count in sight never falls while fewer passes overlap than there are slots.
static __device__ void pass(u64 *counter, ulonglong2 *slots, u32 slot_count, u32 adds, u64 tag) {
    const u64 before = atomicAdd(reinterpret_cast<unsigned long long *>(counter), ONE_PASS + adds);
    const u64 count = (before + adds) % ONE_PASS;
    slots[(before / ONE_PASS + 1) % slot_count] = make_ulonglong2(count, tag);
}

extern "C" __global__ void __launch_bounds__(1)
    mark(u64 *counter, ulonglong2 *slots, u32 slot_count, u32 adds, u64 tag) {
    pass(counter, slots, slot_count, adds, tag);
}

// One pass, or two of different counters; the second counter is null where there is one alone. Nothing orders them as
// the host sees them.
extern "C" __global__ void __launch_bounds__(1)
    mark_two(u64 *counter, ulonglong2 *slots, u32 slot_count, u32 adds, u64 tag, u64 *second_counter,
             ulonglong2 *second_slots, u32 second_slot_count, u32 second_adds, u64 second_tag) {
    pass(counter, slots, slot_count, adds, tag);
    if (second_counter != nullptr) {
        pass(second_counter, second_slots, second_slot_count, second_adds, second_tag);
    }
}
