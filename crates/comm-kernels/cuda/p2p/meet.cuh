// The barrier between the CTAs b of all ranks, and what the kernels with flags share.
//
// Owns: the flag kinds and the meeting protocol. Never moves payload.
#pragma once
#include "wait.cuh"

namespace p2p {

// What a flag word announces. Kinds are told apart by place, so that kernels may use several at once.
enum FlagKind : uint32_t { kEnter = 0, kExit = 1, kChunk = 2, kToken = 3 };

// `rank`, at most one round too far.
template <int kWorld>
__device__ __forceinline__ int wrapped(int rank) {
    return rank >= kWorld ? rank - kWorld : rank;
}

// The same for one that is at most a round too low.
template <int kWorld>
__device__ __forceinline__ int wrapped_below(int rank) {
    return rank < 0 ? rank + kWorld : rank;
}

// The result buffer of every rank, as mapped on this device.
struct Peers {
    char* at[kMaxRanks];
};

// All ranks meet here, CTA by CTA: CTA b of a rank leaves when CTA b of every rank has entered. With `publish`, what a
// rank's CTA b wrote before is visible to the peers' CTAs b afterwards.
//
// Between the CTA's writes and its flags stand a CTA barrier and a release store, between a peer's acquiring load and
// that CTA's reads another CTA barrier: causality order carries every thread's writes along.
//
// False, in all threads, if one of them has given up a wait, here or before: the CTA must not send any more.
template <int kWorld>
__device__ __forceinline__ bool meet(const Link& link, Waiter& waiter, uint32_t kind, uint32_t round, bool publish) {
    if (__syncthreads_or(waiter.gave_up)) return false;
    const int peer = threadIdx.x;
    if (peer < kWorld && peer != int(link.rank)) {
        uint32_t* theirs = flag(link, peer, blockIdx.x, kind, link.rank);
        if (publish)
            Flag::raise_after_writes(theirs, round);
        else
            Flag::raise(theirs, round);
        const uint32_t* ours = flag(link, link.rank, blockIdx.x, kind, peer);
        waiter.until_arrived(link, round, [&] { return Flag::raised(ours, round) ? 0u : 1u << peer; });
    }
    return !__syncthreads_or(waiter.gave_up);
}

}  // namespace p2p
