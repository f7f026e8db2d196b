// All-reduce and reduce-scatter for large buffers: chunks staged in cells, announced by one flag per CTA and chunk.
//
// Owns: the cell layout and the schedule. Against self-announcing packs (reduce.cuh) a chunk costs two CTA barriers and
// a release, and in return nothing polls, nothing is restored, and the all-reduce's second hop goes straight into the
// peers' result buffers, which therefore must be mapped here.
//
// # Cells
// `link.scratch` of the cells' channel: the flags, then cells of kCellBytes: [cta][4 buffers][source]. CTA b of a rank
// exchanges with the CTAs b of the others only.
//
// # Why a cell is never overwritten before it was read
// Chunk r (numbered by rounds, across kernels) goes to buffer r mod 4. A's CTA b stores chunk r in iteration r - 1,
// when it has finished `reduce(r - 2)`. For that it saw B's flag of r - 2, which B's CTA b raised in iteration r - 3,
// after a CTA barrier behind its `reduce(r - 4)`, which read the cells. Every CTA takes part in every round of its
// kernel, with data or without, so the argument runs on across kernels: A's last kernel ended with B's flag of its last
// round K - 1, raised after `reduce(K - 3)`, and the next kernel's first two chunks, K and K + 1, replace K - 4 and K
// - 3. A CTA that the kernel in between did not have is covered too: that kernel, of whatever kind, received something
// from B, so B had started it and ended all before.
//
// # Why the result buffers may be written
// A writes into B's result after B's first flag: B's kernel has started, so what ran before on B's stream has ended.
// A ends after B's exit flag, a release behind a CTA barrier behind B's last store: A's result is complete then.
// In place: a slice of a result is written by its owner after that rank's CTA has sent the chunk and raised its flag.
#pragma once
#include "meet.cuh"
#include "numeric.cuh"

namespace p2p {

// A chunk is kUnits packs per thread and slice; a warp's packs of a slice lie together.
constexpr uint32_t kMaxUnits = 4;
constexpr uint32_t kCellBytes = 512 * kMaxUnits * kPackBytes;

__host__ __device__ constexpr size_t cells_bytes(uint32_t world, uint32_t ctas) {
    return kFlagBytes + size_t(ctas) * kBuffers * world * kCellBytes;
}

template <int kWorld>
__device__ __forceinline__ char* cell(const Link& link, int owner, uint32_t round, int src, uint32_t pack) {
    return link.scratch[owner] + kFlagBytes +
           ((size_t(blockIdx.x) * kBuffers + round % kBuffers) * kWorld + src) * kCellBytes + pack * kPackBytes;
}

// `kGatherToo`: an all-reduce, else a reduce-scatter. `cut` describes `send`; `to(r)` is where slice `link.rank`
// lies in rank r's result; `align` divides all addresses and strides. Uneven slices (uneven.cuh) are for reduce-scatter.
template <class T, int kWorld, bool kGatherToo, int kUnits, class Cut, class To>
__device__ __forceinline__ void reduce_by_cells(const Link& link, const char* send, const Cut& cut, To to,
                                                uint32_t align) {
    using Data = Words<4>;
    const int rank = link.rank;
    // The packs of CTA b in round k: `per_cta` from (k * grid + b) * per_cta on.
    const uint32_t per_cta = blockDim.x * kUnits, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const size_t per_round = size_t(gridDim.x) * per_cta;
    const uint32_t rounds = uint32_t((cut.packs() + per_round - 1) / per_round);
    // The exit of an all-reduce has a number of its own. A reduce-scatter's rounds must follow on one another without
    // gap.
    Waiter waiter;
    const uint32_t first = claim_rounds(link, kGatherToo ? rounds + 1 : rounds, waiter.gave_up);
    if (waiter.gave_up) return;
    const size_t whole = moves_wide<4>(align) ? cut.whole_packs(kWorld) : 0;
    size_t own_whole = whole;
    if constexpr (Cut::kUneven) own_whole = moves_wide<4>(align) ? cut.whole_packs_of(rank) : 0;
    auto peer = [&](int d) { return rank + d >= kWorld ? rank + d - kWorld : rank + d; };

    auto chunk = [&](uint32_t k) { return k * per_round + size_t(blockIdx.x) * per_cta; };

    // In the common case the warps are dealt out over the peers, each with kUnits * (kWorld - 1) * 512 bytes on end:
    // all links busy, in bursts. Which thread sends a pack does not matter, the flag speaks for the CTA.
    auto push = [&](uint32_t k) {
        const size_t begin = chunk(k);
        if (begin + per_cta <= whole) {
            const uint32_t rows = per_cta / 32;
#pragma unroll
            for (int u = 0; u < kUnits; u++) {
                Data v[kWorld - 1];
#pragma unroll
                for (int i = 0; i < kWorld - 1; i++) {
                    const uint32_t g = (warp * kUnits + u) * (kWorld - 1) + i;
                    v[i] = read_wide<4>(send + cut.offset(peer(1 + g / rows), begin + g % rows * 32 + lane));
                }
#pragma unroll
                for (int i = 0; i < kWorld - 1; i++) {
                    const uint32_t g = (warp * kUnits + u) * (kWorld - 1) + i;
                    store_pack(cell<kWorld>(link, peer(1 + g / rows), first + k, rank, g % rows * 32 + lane), v[i].w[0],
                               v[i].w[1], v[i].w[2], v[i].w[3]);
                }
            }
        } else if constexpr (Cut::kUneven) {
            // Where slices end at different places, this is the common case: dealt out alike, each pack if it is there.
            const uint32_t rows = per_cta / 32;
#pragma unroll
            for (int u = 0; u < kUnits; u++) {
                Data v[kWorld - 1];
                uint32_t there = 0;
#pragma unroll
                for (int i = 0; i < kWorld - 1; i++) {
                    const uint32_t g = (warp * kUnits + u) * (kWorld - 1) + i;
                    if (cut.read(v[i], send, peer(1 + g / rows), begin + g % rows * 32 + lane, align)) there |= 1u << i;
                }
#pragma unroll
                for (int i = 0; i < kWorld - 1; i++) {
                    const uint32_t g = (warp * kUnits + u) * (kWorld - 1) + i;
                    if (there >> i & 1)
                        store_pack(cell<kWorld>(link, peer(1 + g / rows), first + k, rank, g % rows * 32 + lane),
                                   v[i].w[0], v[i].w[1], v[i].w[2], v[i].w[3]);
                }
            }
        } else {
            for (uint32_t p = threadIdx.x; p < per_cta; p += blockDim.x) {
                for (int d = 1; d < kWorld; d++) {
                    const uint32_t bytes = cut.bytes(peer(d), begin + p);
                    if (bytes == 0) continue;
                    const Data v = read_pack<sizeof(T), 4>(send + cut.offset(peer(d), begin + p), bytes, align);
                    store_pack(cell<kWorld>(link, peer(d), first + k, rank, p), v.w[0], v.w[1], v.w[2], v.w[3]);
                }
            }
        }
    };
    // Both stand between CTA barriers: the first tells the peers' CTAs that this one's chunk of round k is there, the
    // second waits for theirs.
    const int other = threadIdx.x;
    const bool signals = other < kWorld && other != rank;
    auto raise = [&](uint32_t k) {
        if (signals) Flag::raise_after_writes(flag(link, other, blockIdx.x, kChunk, rank), first + k);
    };
    auto await = [&](uint32_t k) {
        if (signals) {
            const uint32_t* ours = flag(link, rank, blockIdx.x, kChunk, other);
            waiter.until_arrived(link, first + k, [&] { return Flag::raised(ours, first + k) ? 0u : 1u << other; });
        }
    };
    // The sum of the chunk's pack `p`.
    auto sum = [&](uint32_t k, uint32_t p, const Data& own) {
        uint4 raw[kWorld];
#pragma unroll
        for (int s = 0; s < kWorld; s++) raw[s] = load_pack(cell<kWorld>(link, rank, first + k, s, p));
        Accumulator<T, 4> acc;
#pragma unroll
        for (int s = 0; s < kWorld; s++) {
            const Data x = s == rank ? own : Lamport::payload(raw[s]);
            if (s == 0)
                acc.set(x);
            else
                acc.add(x);
        }
        return acc.rounded();
    };
    auto reduce = [&](uint32_t k) {
        const size_t begin = chunk(k);
        if (begin + per_cta <= own_whole) {
            Data v[kUnits];
#pragma unroll
            for (int u = 0; u < kUnits; u++) {
                const uint32_t p = (warp * kUnits + u) * 32 + lane;
                v[u] = sum(k, p, read_wide<4>(send + cut.offset(rank, begin + p)));
            }
            const size_t at = (begin + warp * kUnits * 32 + lane) * kPackBytes;
#pragma unroll
            for (int d = 1; d < kWorld; d++)
#pragma unroll
                for (int u = 0; u < kUnits; u++)
                    if (kGatherToo) store_pack(to(peer(d)) + at + u * 512, v[u].w[0], v[u].w[1], v[u].w[2], v[u].w[3]);
#pragma unroll
            for (int u = 0; u < kUnits; u++) write_wide(to(rank) + at + u * 512, v[u]);
        } else {
            for (uint32_t p = threadIdx.x; p < per_cta; p += blockDim.x) {
                const uint32_t bytes = cut.bytes(rank, begin + p);
                if (bytes == 0) continue;
                const Data v = sum(k, p, read_pack<sizeof(T), 4>(send + cut.offset(rank, begin + p), bytes, align));
                for (int d = 0; d < (kGatherToo ? kWorld : 1); d++)
                    write_pack<sizeof(T)>(to(peer(d)) + (begin + p) * kPackBytes, v, bytes, align);
            }
        }
    };

    push(0);
    __syncthreads();
    raise(0);
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        if (k + 1 < rounds) {
            push(k + 1);
            __syncthreads();
            raise(k + 1);
        }
        await(k);
        // A sum of what has not arrived must not reach anybody.
        if (__syncthreads_or(waiter.gave_up)) return;
        reduce(k);
    }
    if (kGatherToo) meet<kWorld>(link, waiter, kExit, first + rounds, true);
}

// `recv.at[r]`: rank r's result, as mapped here.
template <class T, int kWorld, int kUnits>
__device__ __forceinline__ void all_reduce_cells(const Link& link, const T* send, const Peers& recv, size_t count) {
    allow_successor();
    wait_for_predecessor();
    const auto cut = Slices<4>::cut(count * sizeof(T), kWorld);
    uint64_t bits = address(send);
#pragma unroll
    for (int r = 0; r < kWorld; r++) bits |= address(recv.at[r]);
    reduce_by_cells<T, kWorld, true, kUnits>(
        link, reinterpret_cast<const char*>(send), cut, [&](int r) { return recv.at[r] + link.rank * cut.stride; },
        common_alignment(bits));
}

// `count`: elements each rank receives. In place (`recv == send + rank * count`) is allowed.
template <class T, int kWorld, int kUnits>
__device__ __forceinline__ void reduce_scatter_cells(const Link& link, const T* send, T* recv, size_t count) {
    allow_successor();
    wait_for_predecessor();
    const size_t stride = count * sizeof(T);
    reduce_by_cells<T, kWorld, false, kUnits>(
        link, reinterpret_cast<const char*>(send), Slices<4>{stride, stride * kWorld},
        [&](int) { return reinterpret_cast<char*>(recv); }, common_alignment(address(send) | address(recv) | stride));
}

}  // namespace p2p
