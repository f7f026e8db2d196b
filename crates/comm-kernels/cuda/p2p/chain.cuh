// The broadcast of the largest buffers: from rank to rank, each storing to the next alone.
//
// Owns: the chain and its copies. A GPU that is stored to by one other takes 370 GB/s, by seven 348 (8 H200, NVLink
// through a switch), so a chain beats relays (gather.cuh) where the time to get through all ranks is small against the
// rest. To keep that time short little is under way at once: a chunk for each CTA and rank, and CTAs enough for some to
// copy while others wait for a flag or for their stores.
//
// # Why the results may be written and read
// All ranks meet at the start: a peer's buffer may be written once that peer has entered. They meet at the end, behind
// everybody's stores: a rank leaves once what was stored to it is visible.
// - CTA b of every rank handles the same chunks in the same order, so one flag word for each CTA will do. A rank raises
//   its successor's behind a CTA barrier behind the chunk's stores, and the successor reads the chunk behind an acquiring
//   load and a CTA barrier.
// - Nobody writes to what a rank passes on: each byte comes from its predecessor, once.
// - A rank that gives up the wait for a chunk ends: what depends on it is not sent, and the meeting at the end is not
//   reached.
// - Ranks wait for those before them alone, the root for nobody: so somebody can always go on. Nothing holds a rank back
//   that is ahead of the next, by however many chunks.
#pragma once
#include "gather.cuh"

namespace p2p {

// Copies `bytes` bytes with a whole CTA, to `too` as well unless it is null; `align` divides all addresses.
__device__ __forceinline__ void block_copy(char* to, const char* from, size_t bytes, uint32_t align, char* too) {
    constexpr uint32_t kAtOnce = 4;
    const size_t wide = align < 16 ? 0 : bytes / kPackBytes;
    size_t i = threadIdx.x;
    for (; i + (kAtOnce - 1) * blockDim.x < wide; i += kAtOnce * blockDim.x) {
        Words<4> v[kAtOnce];
#pragma unroll
        for (uint32_t u = 0; u < kAtOnce; u++) v[u] = read_wide<4>(from + (i + u * blockDim.x) * kPackBytes);
#pragma unroll
        for (uint32_t u = 0; u < kAtOnce; u++)
            store_pack(to + (i + u * blockDim.x) * kPackBytes, v[u].w[0], v[u].w[1], v[u].w[2], v[u].w[3]);
        if (too == nullptr) continue;
#pragma unroll
        for (uint32_t u = 0; u < kAtOnce; u++) write_wide(too + (i + u * blockDim.x) * kPackBytes, v[u]);
    }
    for (; i < wide; i += blockDim.x) {
        const Words<4> v = read_wide<4>(from + i * kPackBytes);
        write_wide(to + i * kPackBytes, v);
        if (too != nullptr) write_wide(too + i * kPackBytes, v);
    }
    for (size_t at = wide * kPackBytes + threadIdx.x * 4; at < bytes; at += blockDim.x * 4) {
        const uint32_t n = bytes - at < 4 ? uint32_t(bytes - at) : 4;
        const Words<1> v = read_pack<1, 1>(from + at, n, align);
        write_pack<1>(to + at, v, n, align);
        if (too != nullptr) write_pack<1>(too + at, v, n, align);
    }
}

// `bytes` bytes at the root's `send` come to `recv.at[r]` on every rank r. `chunk`: bytes of one CTA between two flags, a
// multiple of 4096.
template <int kWorld>
__device__ __forceinline__ void broadcast_chain(const Link& link, const char* send, const Peers& recv, size_t bytes,
                                                int root, uint32_t chunk) {
    allow_successor();
    wait_for_predecessor();
    const size_t per_pass = size_t(gridDim.x) * chunk;
    const uint32_t passes = uint32_t((bytes + per_pass - 1) / per_pass);
    Waiter waiter;
    const uint32_t first = claim_rounds_by_thread(link, passes + 1, waiter.gave_up);
    if (!meet<kWorld>(link, waiter, kEnter, first, false)) return;
    injected_stall(link);
    const int rank = link.rank, next = rank + 1 == kWorld ? 0 : rank + 1, last = rank == 0 ? kWorld - 1 : rank - 1;
    uint64_t bits = address(send);
#pragma unroll
    for (int r = 0; r < kWorld; r++) bits |= address(recv.at[r]);
    const uint32_t align = common_alignment(bits);
    const char* const from = rank == root ? send : recv.at[rank];
    char* const kept = rank == root && recv.at[rank] != send ? recv.at[rank] : nullptr;
    for (uint32_t k = 0; k < passes; k++) {
        const size_t at = k * per_pass + size_t(blockIdx.x) * chunk;
        if (at >= bytes) break;
        if (rank != root) {
            if (threadIdx.x == 0) {
                const uint32_t* ours = flag(link, rank, blockIdx.x, kChunk, last);
                waiter.until_arrived(link, first + k, [&] {
                    return Flag::raised(ours, first + k, kAhead + passes) ? 0u : 1u << last;
                });
            }
            if (__syncthreads_or(waiter.gave_up)) return;
        }
        if (next == root) continue;
        block_copy(recv.at[next] + at, from + at, min(size_t(chunk), bytes - at), align,
                   kept == nullptr ? nullptr : kept + at);
        __syncthreads();
        if (threadIdx.x == 0) Flag::raise_after_writes(flag(link, next, blockIdx.x, kChunk, rank), first + k);
    }
    meet<kWorld>(link, waiter, kExit, first + passes, true);
}

}  // namespace p2p
