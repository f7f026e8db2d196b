// The only place where a kernel waits for another rank, and so the only place where a wait can end early.
//
// Owns: bounded spinning, the give-up decision, the error record. Never decides what arrival looks like: the caller's
// `missing` says which ranks' data is not there yet.
//
// # A rank that has given up falls silent
// What a rank computes after it has given up a wait is garbage, and the ranks it waited for may only have been late: if
// it went on sending, they could complete with that garbage and never know. So a thread sends nothing that depends on a
// wait it gave up, and no kernel that starts later sends anything, on any channel. The others' waits then end in errors
// of their own, or at the abort word.
//
// The same holds on a rank whose host has declared the failure (Broken): the others may have closed by now, and use the
// memory that this rank's late kernels would store into for something else.
//
// Memory that others read counts as sent: the wait may have been for their reading. So copies and sums between handshakes,
// by kernels that do not wait themselves, look at `broken` too (../stop.cuh).
#pragma once
#include "wire.cuh"

namespace p2p {

// The clock and the `broken` word are looked at once in so many polls (about 0.1 to 0.2 ms of waiting).
constexpr uint32_t kPollsPerCheck = 256;
// The host's abort word is read by one thread of the device at a time, about once a millisecond. More would be harmful:
// a few thousand waiting warps that read over PCIe hold their own rank up for longer than it takes the other ranks'
// waits to come to the same point, and the ranks then keep each other in that state, op after op.
constexpr uint32_t kAbortLookUnits = 1024;  // of 1024 ns

__device__ __forceinline__ uint64_t now_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

// Decides about a wait that has lasted `kPollsPerCheck` polls more. `started` is 0 at its first check. Returns the time
// the wait counts from, or 0 to give up. Out of line: it must not cost the spinning loop registers.
__device__ __noinline__ uint64_t check_wait(const Link& link, uint32_t round, uint32_t missing, uint64_t started) {
    const uint32_t broken = *reinterpret_cast<volatile uint32_t*>(link.broken);
    if (broken == kHushed) *reinterpret_cast<volatile uint32_t*>(link.broken) = kBroken;
    if (broken != kWhole) return 0;
    const uint64_t now = now_ns();
    if (started == 0) started = now;
    bool aborted = false;
    if (now - started < link.timeout_ns) {
        const uint32_t last = *reinterpret_cast<volatile uint32_t*>(&link.channel->looked), units = uint32_t(now >> 10);
        if (units - last < kAbortLookUnits || atomicCAS(&link.channel->looked, last, units) != last) return started;
        aborted = *reinterpret_cast<const volatile uint32_t*>(link.abort) != 0;
        if (!aborted) return started;
    }
    if (atomicExch(link.broken, uint32_t(kBroken)) == kWhole) {
        volatile ErrorRecord* error = link.error;
        error->op = link.op;
        error->round = round;
        error->missing = missing;
        error->waited_ns = now - started;
        __threadfence_system();
        error->cause = aborted ? kAborted : kTimedOut;
    }
    return 0;
}

// One thread's waits. After one has been given up the later ones return at once: the kernel runs to its end with
// whatever it has, sends none of it, and the host learns of it from the error record.
struct Waiter {
    bool gave_up = false;  // nothing may be sent any more

    // Spins until `missing()` returns 0. `missing` loads, keeps what it has loaded, and returns a bit per rank whose
    // data is not complete.
    template <class Missing>
    __device__ __forceinline__ void until_arrived(const Link& link, uint32_t round, Missing missing) {
        wait<false>(link, round, missing);
    }

    // The same by a whole warp, whose lanes give up together. `missing` returns the same in all of them.
    template <class Missing>
    __device__ __forceinline__ void until_arrived_by_warp(const Link& link, uint32_t round, Missing missing) {
        wait<true>(link, round, missing);
    }

private:
    template <bool kByWarp, class Missing>
    __device__ __forceinline__ void wait(const Link& link, uint32_t round, Missing missing) {
        if (gave_up) return;
        uint64_t started = 0;
        uint32_t polls = 0;
        for (;;) {
            const uint32_t late = missing();
            if (late == 0) return;
            if (++polls == kPollsPerCheck) {
                polls = 0;
                if (!kByWarp || threadIdx.x % 32 == 0) started = check_wait(link, round, late, started);
                if constexpr (kByWarp) started = __shfl_sync(0xffffffffu, started, 0);
                if (started == 0) {
                    gave_up = true;
                    return;
                }
            }
        }
    }
};

// Waits for the packs of stage `stage` at slot `at` from the ranks in `sources` (bit s: rank s) and returns them.
//
// One poll loads the slots of all ranks, wanted or not, before it looks at any: the loads must overlap, and a branch
// around each would make them wait for one another.
template <class Wire, int kWorld>
__device__ __forceinline__ void receive_all(const Link& link, Waiter& waiter, uint32_t round, Stage stage, size_t at,
                                            uint32_t sources, Words<Wire::kWords> (&v)[kWorld]) {
    const char* const first = slot<kWorld>(link, link.rank, round, stage, 0, at);
    const size_t pitch = size_t(link.slot_packs) * kPackBytes;
    uint4 raw[kWorld];
    waiter.until_arrived(link, round, [&] {
#pragma unroll
        for (int s = 0; s < kWorld; s++) raw[s] = load_pack(first + s * pitch);
        uint32_t missing = 0;
#pragma unroll
        for (int s = 0; s < kWorld; s++) missing |= Wire::arrived(raw[s], round) ? 0u : 1u << s;
        return missing & sources;
    });
#pragma unroll
    for (int s = 0; s < kWorld; s++) v[s] = Wire::payload(raw[s]);
}

// Tests only: makes this rank late between its sends and its first wait, or, where a kernel only waits for what others
// then read, between the two.
__device__ __forceinline__ void injected_stall(const Link& link) {
    if (link.stall_ns == 0) return;
    const uint64_t start = now_ns();
    while (now_ns() - start < link.stall_ns) __nanosleep(1000);
}

}  // namespace p2p
