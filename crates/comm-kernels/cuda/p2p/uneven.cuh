// All-gather and reduce-scatter of parts that differ from rank to rank, none at all included.
//
// Owns: the cut into uneven parts, the schedules by packs, and why they are safe. The stores into registered results are
// gather.cuh's, the cells cells.cuh's.
//
// # By packs
// With even parts a rank's thread t that sends in a round receives in it too, from every rank, and what it received from
// B shows what B has read (reduce.cuh, gather.cuh). Here the rank with the longest part would receive nothing in its last
// rounds, and nothing would hold it back. So nobody leaves anything out: in every round in which thread t has a pack of
// the longest part, every rank sends one to every rank, an empty one where its part or theirs has ended, and receives and
// restores one from every rank. What a thread sends and receives is then what it would be if all parts were as long as
// the longest, and the arguments of reduce.cuh (of a reduce-scatter) and of gather.cuh hold word for word. Between
// kernels too: the longest part has a pack, so thread 0 of every rank has received something from every rank.
//
// Empty packs cost no time where every rank has a link of its own in each direction: the rank with the longest part sends
// it to everybody, or receives it from everybody, and nobody sends or receives more than that rank.
//
// # By cells
// Every CTA takes part in every round of the longest slice and raises its flags in it, with data or without: that is all
// that the argument of cells.cuh asks for.
//
// # By stores into the results
// All ranks meet before and after, whatever they store.
//
// # In place
// A rank's own part is read before it is written, by the same thread, and no other part of its operand is written.
#pragma once
#include "cells.cuh"
#include "gather.cuh"
#include "reduce.cuh"

namespace p2p {

// Rank r's part is bytes begin[r] to begin[r + 1] of the whole. Passed by value.
struct Parts {
    uint64_t begin[kMaxRanks + 1];

    __device__ __forceinline__ size_t length(int r) const { return begin[r + 1] - begin[r]; }
    // What divides the beginnings of all parts.
    template <int kWorld>
    __device__ __forceinline__ uint64_t bits() const {
        uint64_t bits = 0;
#pragma unroll
        for (int r = 0; r < kWorld; r++) bits |= begin[r];
        return bits;
    }
};

// The counterpart of `Slices`.
template <int kWorld, int kWords, int kUnit>
struct UnevenSlices {
    static constexpr uint32_t kBytes = 4 * kWords;
    static constexpr bool kUneven = true;
    const Parts& parts;
    size_t longest, shortest;

    __device__ __forceinline__ explicit UnevenSlices(const Parts& parts)
        : parts(parts), longest(0), shortest(~size_t(0)) {
#pragma unroll
        for (int r = 0; r < kWorld; r++) {
            longest = max(longest, parts.length(r));
            shortest = min(shortest, parts.length(r));
        }
    }
    __device__ __forceinline__ uint32_t bytes(int s, size_t j) const {
        const size_t at = j * kBytes, length = parts.length(s);
        return at >= length ? 0 : length - at < kBytes ? uint32_t(length - at) : kBytes;
    }
    __device__ __forceinline__ size_t offset(int s, size_t j) const { return parts.begin[s] + j * kBytes; }
    __device__ __forceinline__ size_t whole_packs(int) const { return shortest / kBytes; }
    __device__ __forceinline__ size_t whole_packs_of(int s) const { return parts.length(s) / kBytes; }
    __device__ __forceinline__ size_t packs() const { return (longest + kBytes - 1) / kBytes; }

    // Reads pack `j` of slice `s` of the buffer at `from` if there is one, and says whether there is.
    __device__ __forceinline__ bool read(Words<kWords>& v, const char* from, int s, size_t j, uint32_t align) const {
        const uint32_t n = bytes(s, j);
        if (n == 0) return false;
        v = read_pack<kUnit, kWords>(from + offset(s, j), n, align);
        return true;
    }
    // The same; an empty pack if there is none.
    __device__ __forceinline__ Words<kWords> read_or_empty(const char* from, int s, size_t j, uint32_t align) const {
        Words<kWords> v = {};
        read(v, from, s, j, align);
        return v;
    }
};

// One hop by packets. Rank r's part, at `send`, comes to its place in `recv` everywhere; in place is allowed.
template <int kWorld>
__device__ __forceinline__ void all_gather_packets_uneven(const Link& link, const char* send, char* recv,
                                                          const Parts& parts) {
    using Data = Words<Packet::kWords>;
    allow_successor();
    wait_for_predecessor();
    const UnevenSlices<kWorld, Packet::kWords, 1> cut(parts);
    const int rank = link.rank;
    const uint32_t align_in = common_alignment(address(send)),
                   align_out = common_alignment(address(recv) | parts.bits<kWorld>());
    const size_t thread = size_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = size_t(gridDim.x) * blockDim.x;
    const size_t packs = cut.packs();
    const uint32_t rounds = uint32_t((packs + threads - 1) / threads);
    Waiter waiter;
    const uint32_t first = claim_rounds_by_thread(link, rounds, waiter.gave_up);

    auto push = [&](uint32_t k) {
        const size_t pack = thread + k * threads;
        if (pack >= packs || waiter.gave_up) return;
        const uint32_t n = cut.bytes(rank, pack);
        const char* const from = send + pack * Packet::kWords * 4;
        Data v = {};
        if (n != 0) v = read_pack<1, 3>(from, n, align_in);
#pragma unroll
        for (int d = 1; d < kWorld; d++) {
            const int to = rank + d >= kWorld ? rank + d - kWorld : rank + d;
            Packet::send(slot<kWorld>(link, to, first + k, kGather, rank, thread), v, first + k);
        }
        char* const own = recv + cut.offset(rank, pack);
        if (n != 0 && own != from) write_pack<1>(own, v, n, align_out);
    };
    push(0);
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        if (k > 0 && k + 1 < rounds) push(k + 1);
        const size_t pack = thread + k * threads;
        if (pack < packs) {
            Data v[kWorld];
            receive_all<Packet, kWorld>(link, waiter, first + k, kGather, thread, ((1u << kWorld) - 1) & ~(1u << rank),
                                        v);
#pragma unroll
            for (int s = 0; s < kWorld; s++) {
                const uint32_t n = cut.bytes(s, pack);
                if (s != rank && n != 0) write_pack<1>(recv + cut.offset(s, pack), v[s], n, align_out);
            }
        }
        if (k == 0 && rounds > 1) push(1);
    }
}

// By stores into the peers' `recv`, which are mapped here.
template <int kWorld>
__device__ __forceinline__ void all_gather_direct_uneven(const Link& link, const char* send, const Peers& recv,
                                                         const Parts& parts, uint32_t chunk) {
    const size_t at = parts.begin[link.rank];
    gather_direct<kWorld>(link, send, recv, [&] { return at; }, parts.length(link.rank), at, chunk);
}

// By Lamport packs. Rank r receives the sum of its part. In place (`recv == send + begin[rank]`) is allowed.
template <class T, int kWorld, bool kAverage = false>
__device__ __forceinline__ void reduce_scatter_uneven(const Link& link, const T* send, T* recv, const Parts& parts) {
    using Wire = Lamport;
    using Cut = UnevenSlices<kWorld, Wire::kWords, sizeof(T)>;
    using R = Reducer<T, kWorld, Wire, kAverage, Cut>;
    allow_successor();
    wait_for_predecessor();
    const uint32_t align_out = common_alignment(address(recv));
    R r{link,
        Cut(parts),
        reinterpret_cast<const char*>(send),
        common_alignment(address(send) | parts.bits<kWorld>()),
        size_t(blockIdx.x) * blockDim.x + threadIdx.x,
        size_t(gridDim.x) * blockDim.x,
        {}};
    const size_t packs = r.cut.packs();
    const uint32_t rounds = uint32_t((packs + r.threads - 1) / r.threads);
    const uint32_t first = claim_rounds_by_thread(link, rounds, r.waiter.gave_up);

    auto scatter = [&](uint32_t k) {
        const size_t pack = r.thread + k * r.threads;
        if (pack >= packs || r.waiter.gave_up) return;
        typename R::Data v[kWorld - 1];
#pragma unroll
        for (int d = 1; d < kWorld; d++)
            v[d - 1] = r.cut.read_or_empty(r.send, R::wrapped(int(link.rank) + d), pack, r.send_align);
#pragma unroll
        for (int d = 1; d < kWorld; d++)
            Wire::send(
                slot<kWorld>(link, R::wrapped(int(link.rank) + d), first + k, kScatter, link.rank, r.thread),
                v[d - 1], first + k);
    };
    scatter(0);
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        if (k > 0) fence_system();
        if (k > 0 && k + 1 < rounds) scatter(k + 1);
        const size_t pack = r.thread + k * r.threads;
        if (pack < packs) {
            const uint32_t bytes = r.cut.bytes(link.rank, pack);
            const auto own = r.cut.read_or_empty(r.send, link.rank, pack, r.send_align);
            typename R::Data v[kWorld];
            r.collect(first + k, kScatter, r.thread, r.others(), v);
            if (bytes != 0)
                write_pack<sizeof(T)>(reinterpret_cast<char*>(recv) + pack * kPackBytes, r.add_up(v, own).rounded(),
                                      bytes, align_out);
        }
        if (k == 0 && rounds > 1) scatter(1);
    }
}

// By cells. In place as above.
template <class T, int kWorld, int kUnits>
__device__ __forceinline__ void reduce_scatter_cells_uneven(const Link& link, const T* send, T* recv,
                                                            const Parts& parts) {
    allow_successor();
    wait_for_predecessor();
    reduce_by_cells<T, kWorld, false, kUnits>(
        link, reinterpret_cast<const char*>(send), UnevenSlices<kWorld, 4, sizeof(T)>(parts),
        [&](int) { return reinterpret_cast<char*>(recv); },
        common_alignment(address(send) | address(recv) | parts.bits<kWorld>()));
}

}  // namespace p2p
