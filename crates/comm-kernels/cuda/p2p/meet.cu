// Entry points that move no payload: the barrier of all ranks, and the handshakes of one pair.
//
// p2p_barrier_w<world>(link): one CTA of 32 threads. What this rank's stream did before is visible to all ranks after.
// p2p_pair(link, counters, peer, step): one thread. `link.scratch` is an area of kFlagBytes that is zero at the start;
//     `counters` points to this rank's PairCounters, zero at the start.
//
// A message of a pair goes through one staging buffer of the sender. Sender: kAwaitFree, write the buffer, kAnnounce.
// Receiver: kAwaitFull, read the buffer, kRelease. Whoever reads or writes it looks at `link.broken` first (../stop.cuh):
// a sender that gave up waiting for the buffer must leave it alone. The counters live in device memory, so that a replayed
// graph goes on counting; they wrap, and are compared by signed difference.
#include "gather.cuh"

namespace p2p {

struct PairCounters {
    uint32_t sent[kMaxRanks];
    uint32_t received[kMaxRanks];
};

enum PairStep : uint32_t { kAwaitFree = 0, kAnnounce = 1, kAwaitFull = 2, kRelease = 3 };
enum PairFlag : uint32_t { kFull = 0, kFree = 1 };

}  // namespace p2p

extern "C" __global__ void __launch_bounds__(32)
    p2p_pair(const __grid_constant__ p2p::Link link, p2p::PairCounters* counters, uint32_t peer, uint32_t step) {
    using namespace p2p;
    if (threadIdx.x != 0) return;
    Waiter waiter;
    auto await = [&](PairFlag kind, uint32_t number) {
        const uint32_t* ours = flag(link, link.rank, 0, kind, peer);
        waiter.until_arrived(link, number, [&] { return Flag::raised(ours, number) ? 0u : 1u << peer; });
    };
    auto raise = [&](PairFlag kind, uint32_t number) {
        if (*reinterpret_cast<volatile uint32_t*>(link.broken) != 0) return;
        Flag::raise_after_writes(flag(link, peer, 0, kind, link.rank), number);
    };
    switch (step) {
        case kAwaitFree: await(kFree, counters->sent[peer]); break;
        case kAnnounce: raise(kFull, ++counters->sent[peer]); break;
        case kAwaitFull:
            await(kFull, counters->received[peer] + 1);
            injected_stall(link);
            break;
        case kRelease: raise(kFree, ++counters->received[peer]); break;
    }
}

// A thread for each flag of a channel. Waits for nothing and nobody waits for it: it runs beside the channel's kernels.
extern "C" __global__ void __launch_bounds__(256) p2p_lift(const __grid_constant__ p2p::Link link) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p2p::kFlagBytes / sizeof(uint32_t)) p2p::lift_flag(link, i);
}

#define P2P_BARRIER(WORLD)                                                                                             \
    extern "C" __global__ void __launch_bounds__(32) p2p_barrier_w##WORLD(const __grid_constant__ p2p::Link link) {    \
        p2p::Waiter waiter;                                                                                            \
        const uint32_t round = p2p::claim_rounds_by_thread(link, 1, waiter.gave_up);                                   \
        p2p::meet<WORLD>(link, waiter, p2p::kExit, round, true);                                                       \
        p2p::injected_stall(link);                                                                                     \
    }

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_BARRIER)
