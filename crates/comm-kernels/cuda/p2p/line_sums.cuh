// Reduce-scatter by lines: what rank r sends for the others arrives as in an all-gather, and is added up on the way to
// the result.
//
// Owns: the schedule. Lines, slots and why none is overwritten early are lines.cuh's, of `all_gather_lines`: here too
// every rank has a burst from every other in each round, and sends its own one ahead.
//
// Against Lamport packs (reduce.cuh) there are no marks to put back and four packs of a source are under way for each
// thread; against cells (cells.cuh) there are no flags and no barriers. That is worth a thirty-second of the wire.
#pragma once
#include "lines.cuh"

namespace p2p {

// `count`: elements that each rank receives; `send` holds `kWorld * count`. In place (`recv == send + rank * count`) is
// allowed: a pack of `recv` is written by the lane that has read the same pack of `send`. Sums are in fp32, in rank
// order, rounded once.
template <class T, int kWorld>
__device__ __forceinline__ void reduce_scatter_lines(const Link& link, const T* send, T* recv, size_t count) {
    using Acc = Accumulator<T, 4>;
    allow_successor();
    wait_for_predecessor();
    const char* const in = reinterpret_cast<const char*>(send);
    const size_t bytes = count * sizeof(T);
    const uint32_t align_in = common_alignment(address(send) | bytes), align_out = common_alignment(address(recv));
    const Deal deal(bytes);
    const uint32_t rounds = deal.rounds;
    const size_t warp = deal.warp;
    Waiter waiter;
    const uint32_t first = claim_rounds_by_warp(link, rounds, waiter);
    const int rank = link.rank;

    auto push = [&](uint32_t k) {
        const size_t burst = deal.burst(k);
        const uint32_t n = burst_length(burst, bytes);
        if (n == 0 || waiter.gave_up) return;
#pragma unroll 2
        for (int d = 1; d < kWorld; d++) {
            const int to = wrapped<kWorld>(rank + d);
            Burst b;
            b.read<sizeof(T)>(in + to * bytes + burst * kBurstBytes, n, align_in);
            b.seal(first + k);
            b.send(burst_slot<kWorld>(link, to, first + k, rank, warp));
        }
    };
    push(0);
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        if (k > 0 && k + 1 < rounds) push(k + 1);
        const size_t burst = deal.burst(k);
        const uint32_t n = burst_length(burst, bytes);
        if (n != 0) {
            Burst own;
            own.read<sizeof(T)>(in + rank * bytes + burst * kBurstBytes, n, align_in);
            Acc sum[Burst::kPacks];
            auto add = [&](const Burst& b, bool is_first) {
#pragma unroll
                for (int u = 0; u < Burst::kPacks; u++) {
                    if (is_first)
                        sum[u].set(b.w[u]);
                    else
                        sum[u].add(b.w[u]);
                }
            };
            if (rank == 0) add(own, true);
            // The others in rank order: other j is rank j, or the next one from this rank on.
#pragma unroll 1
            for (int j = 0; j < kWorld - 1; j += kBurstsAtOnce<kWorld>) {
                auto source = [&](int i) { return j + i < rank ? j + i : j + i + 1 < kWorld ? j + i + 1 : rank; };
                Burst b[kBurstsAtOnce<kWorld>];
                receive_bursts<kWorld>(link, waiter, first + k, warp, (1u << (kWorld - 1 - j)) - 1, source, b);
#pragma unroll
                for (int i = 0; i < kBurstsAtOnce<kWorld>; i++) {
                    if (j + i >= kWorld - 1) continue;
                    if (j + i == rank && rank != 0) add(own, false);
                    b[i].unseal();
                    add(b[i], j + i == 0 && rank != 0);
                }
            }
            if (rank == kWorld - 1) add(own, false);
            Burst result;
#pragma unroll
            for (int u = 0; u < Burst::kPacks; u++) result.w[u] = sum[u].rounded();
            result.write<sizeof(T)>(reinterpret_cast<char*>(recv) + burst * kBurstBytes, n, align_out);
        }
        if (k == 0 && rounds > 1) push(1);
    }
}

}  // namespace p2p
