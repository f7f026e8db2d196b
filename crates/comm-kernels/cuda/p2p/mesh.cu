// Meeting and messages in a mesh with gaps: no rank touches memory other than its own and its neighbours'.
//
// p2p_mesh_barrier(link, routes, world): one CTA of 32 * world threads. What this rank's stream did before is visible to
//     all ranks after, through memory that they reach.
// p2p_mesh_pair(link, counters, peer, step, holder, box): one thread; a step of p2p_pair (meet.cu) with a peer that is no
//     neighbour. Both ranks' flags, and the message, lie in the memory of `holder`, a neighbour of both, which takes no
//     part. `box`: 1 to kFlagCtas - 1, of this message's direction and pair alone.
//
// # The barrier
// A rank's token goes to its neighbours, and those pass it on to whom they serve: one flag word per origin, which the
// origin stores if it is a neighbour, else the rank that passes it on. A word's value only grows, so a rank that is ahead
// overwrites nothing that is missed.
//
// A warp per origin, because a lane that waits for a token must not keep another from passing one on.
//
// What a rank y wrote is visible to x: y's CTA barrier and release store, the serving rank's acquiring load and release
// store by one thread, x's acquiring load and CTA barrier form one chain at system scope.
#include "meet.cuh"

namespace p2p {

struct MeshRoutes {
    uint32_t neighbours;           // bit r: rank r's memory may be touched
    uint8_t forwards[kMaxRanks];   // bit x of entry y: this rank passes y's token on to x
    uint8_t via[kMaxRanks];        // who passes y's token on to this rank; y if it comes directly
};

// As in meet.cu.
struct MeshPairCounters {
    uint32_t sent[kMaxRanks];
    uint32_t received[kMaxRanks];
};

enum MeshPairStep : uint32_t { kAwaitFree = 0, kAnnounce = 1, kAwaitFull = 2, kRelease = 3 };
enum MeshPairFlag : uint32_t { kFull = 0, kFree = 1 };

}  // namespace p2p

extern "C" __global__ void __launch_bounds__(256)
    p2p_mesh_barrier(const __grid_constant__ p2p::Link link, const __grid_constant__ p2p::MeshRoutes routes,
                     uint32_t world) {
    using namespace p2p;
    bool silent = false;
    const uint32_t round = claim_rounds(link, 1, silent);
    if (silent) return;
    const uint32_t origin = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0 && origin < world && origin != link.rank) {
        Waiter waiter;
        const bool near = routes.neighbours >> origin & 1;
        if (near) Flag::raise_after_writes(flag(link, origin, 0, kExit, link.rank), round);
        const uint32_t* token = flag(link, link.rank, 0, kExit, origin);
        const uint32_t via = routes.via[origin];
        const uint32_t* carrier = flag(link, link.rank, 0, kExit, via);
        waiter.until_arrived(link, round, [&] {
            if (Flag::raised(token, round)) return 0u;
            // Who did not come itself is to blame for what it was to pass on.
            return Flag::raised(carrier, round) ? 1u << origin : 1u << via;
        });
        if (near && !waiter.gave_up) {
            for (uint32_t to = 0; to < world; to++)
                if (routes.forwards[origin] >> to & 1)
                    Flag::raise_after_writes(flag(link, to, 0, kExit, origin), round);
        }
    }
    __syncthreads();
    injected_stall(link);
}

extern "C" __global__ void __launch_bounds__(32)
    p2p_mesh_pair(const __grid_constant__ p2p::Link link, p2p::MeshPairCounters* counters, uint32_t peer, uint32_t step,
                  uint32_t holder, uint32_t box) {
    using namespace p2p;
    if (threadIdx.x != 0) return;
    Waiter waiter;
    auto await = [&](MeshPairFlag kind, uint32_t number) {
        const uint32_t* word = flag(link, holder, box, kind, 0);
        waiter.until_arrived(link, number, [&] { return Flag::raised(word, number) ? 0u : 1u << peer; });
    };
    auto raise = [&](MeshPairFlag kind, uint32_t number) {
        if (*reinterpret_cast<volatile uint32_t*>(link.broken) != 0) return;
        Flag::raise_after_writes(flag(link, holder, box, kind, 0), number);
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
