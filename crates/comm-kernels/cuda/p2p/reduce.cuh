// All-reduce and reduce-scatter by packs that announce themselves: no barrier, no registered buffers, any alignment.
//
// Owns: the one-shot and two-shot schedules and the argument why no slot is overwritten early.
//
// # Threads
// Thread t = blockIdx.x * blockDim.x + threadIdx.x of a rank talks to the threads t of the other ranks and to nobody
// else, through slot t of each source's row. There is no barrier between threads; a grid of any size is right as long
// as it is the same on all ranks, is resident as a whole, and has at most `slot_packs` threads.
//
// # Why a slot is never overwritten before it was read and restored
// Let A push round r into a slot of B; the slot's last content was round r - 4 at the latest.
//
// Within a kernel (two-shot, rounds pipelined): A pushes its scatter pack of round r in iteration r - 1, when it has
// finished `reduce(r - 2)`. For that it received B's scatter pack of r - 2, which B pushed in iteration r - 3, when B
// had finished iteration r - 4 as far as `reduce(r - 4)`, which reads and restores the slot. A's gather pack of round r
// is pushed after A has B's scatter pack of r, which B pushed in its iteration r - 1, after `gather(r - 3)`.
//
// Between kernels: A starts a kernel whose first round is r when its last kernel has ended. In that one it received
// something from every rank, so B had started it, so all of B's kernels before it had ended. A thread may have no pack
// in that kernel's last round; what it received in the round before shows that B's thread had finished `reduce(r - 4)`.
// That covers the first push. The second, of round r + 1, is made only after `reduce(r)`: B's pack of r shows that all
// of B's earlier kernels have ended. A thread whose own slice is too short for `reduce(r)` waits for the others' sums of
// r instead: to whom it has a pack of r + 1 to send, that rank has sent it its sum of r.
//
// Restoring the mark (Lamport): the restoring store must not land after the next data. It precedes, in B's program
// order, the push by which A learns of it; the system fence at the head of each later iteration, or the end of B's
// kernel, lies between the two.
//
// # Same bits everywhere
// Element i is summed on one rank (two-shot) or on all from the same bits (one-shot), in fp32, in rank order, and
// rounded once.
#pragma once
#include "numeric.cuh"
#include "wait.cuh"

namespace p2p {

// What one thread needs for a reducing op over `kWorld` slices. `kAverage`: sums are divided by the number of ranks before
// they are rounded.
template <class T, int kWorld, class Wire, bool kAverage = false, class Slicing = Slices<Wire::kWords>>
struct Reducer {
    using Data = Words<Wire::kWords>;
    using Cut = Slicing;

    const Link& link;
    const Cut cut;
    const char* send;
    uint32_t send_align;
    size_t thread, threads;
    Waiter waiter;

    __device__ __forceinline__ static int wrapped(int rank) { return rank >= kWorld ? rank - kWorld : rank; }

    __device__ __forceinline__ Data read(int slice, size_t pack, uint32_t bytes) const {
        return read_pack<sizeof(T), Wire::kWords>(send + cut.offset(slice, pack), bytes, send_align);
    }

    // Whether pack `pack` is whole in every slice and can be read by the widest loads.
    __device__ __forceinline__ bool wide(size_t pack) const {
        return moves_wide<Wire::kWords>(send_align) && pack < cut.whole_packs(kWorld);
    }

    // Sends this thread's pack of each other rank's slice to that rank. In the common case all loads are issued before
    // the first store; the ends of the buffer and odd alignments go one by one.
    __device__ __forceinline__ void scatter(uint32_t round, size_t pack) {
        if (waiter.gave_up) return;
        if (wide(pack)) {
            Data v[kWorld - 1];
#pragma unroll
            for (int d = 1; d < kWorld; d++)
                v[d - 1] = read_wide<Wire::kWords>(send + cut.offset(wrapped(int(link.rank) + d), pack));
#pragma unroll
            for (int d = 1; d < kWorld; d++)
                Wire::send(slot<kWorld>(link, wrapped(int(link.rank) + d), round, kScatter, link.rank, thread),
                           v[d - 1], round);
        } else {
            for (int d = 1; d < kWorld; d++) {
                const int to = wrapped(int(link.rank) + d);
                const uint32_t bytes = cut.bytes(to, pack);
                if (bytes != 0)
                    Wire::send(slot<kWorld>(link, to, round, kScatter, link.rank, thread), read(to, pack, bytes),
                               round);
            }
        }
    }

    // Waits for all ranks' copies of one pack in stage `stage` at slot `at` and restores the slots.
    // `sources`: bit s set if rank s sends one.
    __device__ __forceinline__ void collect(uint32_t round, Stage stage, size_t at, uint32_t sources,
                                            Data (&v)[kWorld]) {
        receive_all<Wire, kWorld>(link, waiter, round, stage, at, sources, v);
        if (Wire::kRestores) {
#pragma unroll
            for (int s = 0; s < kWorld; s++)
                if (sources >> s & 1) Wire::restore(slot<kWorld>(link, link.rank, round, stage, s, at));
        }
    }

    // Adds up a pack in rank order, this rank's own from `own`, and divides if it is to be an average.
    __device__ __forceinline__ Accumulator<T, Wire::kWords> add_up(const Data (&v)[kWorld], const Data& own) const {
        Accumulator<T, Wire::kWords> acc;
#pragma unroll
        for (int s = 0; s < kWorld; s++) {
            const Data x = s == int(link.rank) ? own : v[s];
            if (s == 0)
                acc.set(x);
            else
                acc.add(x);
        }
        if constexpr (kAverage) acc.template divide<kWorld>();
        return acc;
    }

    __device__ __forceinline__ uint32_t others() const { return ((1u << kWorld) - 1) & ~(1u << link.rank); }

    // The sum of pack `pack` of slice `link.rank`, from the scatter slots at `thread` and this rank's own buffer.
    __device__ __forceinline__ Accumulator<T, Wire::kWords> sum(uint32_t round, size_t pack, uint32_t bytes) {
        const Data own = read(link.rank, pack, bytes);
        Data v[kWorld];
        collect(round, kScatter, thread, others(), v);
        return add_up(v, own);
    }

    // Sends a pack of this rank's slice to every other rank's gather slots.
    __device__ __forceinline__ void publish(uint32_t round, const Data& v) {
        if (waiter.gave_up) return;
#pragma unroll
        for (int d = 1; d < kWorld; d++)
            Wire::send(slot<kWorld>(link, wrapped(int(link.rank) + d), round, kGather, link.rank, thread), v, round);
    }
};

// One hop: every rank sends everything to every rank and sums everything itself. At most `slot_packs` packs.
template <class T, int kWorld, class Wire, bool kAverage = false>
__device__ __forceinline__ void all_reduce_one_shot(const Link& link, const T* send, T* recv, size_t count) {
    using R = Reducer<T, kWorld, Wire, kAverage>;
    allow_successor();
    wait_for_predecessor();
    const uint32_t align_out = common_alignment(address(recv));
    const size_t total = count * sizeof(T);
    R r{link,
        typename R::Cut{total, total},
        reinterpret_cast<const char*>(send),
        common_alignment(address(send)),
        size_t(blockIdx.x) * blockDim.x + threadIdx.x,
        size_t(gridDim.x) * blockDim.x,
        {}};
    const size_t packs = r.cut.packs();
    const uint32_t round = claim_rounds_by_thread(link, 1, r.waiter.gave_up);
    for (size_t p = r.thread; p < packs && !r.waiter.gave_up; p += r.threads) {
        const auto own = r.read(0, p, r.cut.bytes(0, p));
#pragma unroll
        for (int d = 1; d < kWorld; d++)
            Wire::send(slot<kWorld>(link, R::wrapped(int(link.rank) + d), round, kScatter, link.rank, p), own, round);
    }
    injected_stall(link);
    for (size_t p = r.thread; p < packs; p += r.threads) {
        const uint32_t bytes = r.cut.bytes(0, p);
        const auto own = r.read(0, p, bytes);
        typename R::Data v[kWorld];
        r.collect(round, kScatter, p, r.others(), v);
        write_pack<sizeof(T)>(reinterpret_cast<char*>(recv) + p * R::Cut::kBytes, r.add_up(v, own).rounded(), bytes,
                              align_out);
    }
}

// Two hops, pipelined over rounds: while round k is summed, round k + 1 is on its way in and round k - 1 on its way
// back. In place is allowed: each pack of `recv` is written by the thread that has sent or summed the same pack of
// `send`.
template <class T, int kWorld, class Wire, bool kAverage = false>
__device__ __forceinline__ void all_reduce_two_shot(const Link& link, const T* send, T* recv, size_t count) {
    using R = Reducer<T, kWorld, Wire, kAverage>;
    allow_successor();
    wait_for_predecessor();
    const uint32_t align_out = common_alignment(address(recv));
    char* const out = reinterpret_cast<char*>(recv);
    R r{link,
        R::Cut::cut(count * sizeof(T), kWorld),
        reinterpret_cast<const char*>(send),
        common_alignment(address(send)),
        size_t(blockIdx.x) * blockDim.x + threadIdx.x,
        size_t(gridDim.x) * blockDim.x,
        {}};
    const uint32_t rounds = uint32_t((r.cut.packs() + r.threads - 1) / r.threads);
    const uint32_t first = claim_rounds_by_thread(link, rounds, r.waiter.gave_up);
    const size_t whole = moves_wide<Wire::kWords>(align_out) ? r.cut.whole_packs(kWorld) : 0;

    auto gather = [&](uint32_t k) {
        const size_t pack = r.thread + k * r.threads;
        typename R::Data v[kWorld];
        if (pack < whole) {
            r.collect(first + k, kGather, r.thread, r.others(), v);
#pragma unroll
            for (int s = 0; s < kWorld; s++)
                if (s != int(link.rank)) write_wide(out + r.cut.offset(s, pack), v[s]);
            return;
        }
        uint32_t sources = 0;
        for (int s = 0; s < kWorld; s++)
            if (s != int(link.rank) && r.cut.bytes(s, pack) != 0) sources |= 1u << s;
        r.collect(first + k, kGather, r.thread, sources, v);
#pragma unroll
        for (int s = 0; s < kWorld; s++)
            if (sources >> s & 1)
                write_pack<sizeof(T)>(out + r.cut.offset(s, pack), v[s], r.cut.bytes(s, pack), align_out);
    };

    r.scatter(first, r.thread);
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        if (Wire::kRestores && k > 0) fence_system();
        const size_t pack = r.thread + k * r.threads;
        if (k > 0 && k + 1 < rounds) r.scatter(first + k + 1, pack + r.threads);
        const uint32_t bytes = r.cut.bytes(link.rank, pack);
        if (bytes != 0) {
            const auto v = r.sum(first + k, pack, bytes).rounded();
            r.publish(first + k, v);
            write_pack<sizeof(T)>(out + r.cut.offset(link.rank, pack), v, bytes, align_out);
        }
        if (k == 0 && rounds > 1) {
            if (bytes == 0) gather(0);
            r.scatter(first + 1, pack + r.threads);
        }
        if (k > 1 || (k == 1 && r.cut.bytes(link.rank, r.thread) != 0)) gather(k - 1);
    }
    gather(rounds - 1);
}

// The first hop alone. `count`: elements that each rank receives; `send` holds `kWorld * count`. In place
// (`recv == send + rank * count`) is allowed.
template <class T, int kWorld, class Wire, bool kAverage = false>
__device__ __forceinline__ void reduce_scatter(const Link& link, const T* send, T* recv, size_t count) {
    using R = Reducer<T, kWorld, Wire, kAverage>;
    allow_successor();
    wait_for_predecessor();
    const uint32_t align_out = common_alignment(address(recv));
    const size_t stride = count * sizeof(T);
    R r{link,
        typename R::Cut{stride, stride * kWorld},
        reinterpret_cast<const char*>(send),
        common_alignment(address(send) | stride),
        size_t(blockIdx.x) * blockDim.x + threadIdx.x,
        size_t(gridDim.x) * blockDim.x,
        {}};
    const uint32_t rounds = uint32_t((r.cut.packs() + r.threads - 1) / r.threads);
    const uint32_t first = claim_rounds_by_thread(link, rounds, r.waiter.gave_up);
    r.scatter(first, r.thread);
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        if (Wire::kRestores && k > 0) fence_system();
        const size_t pack = r.thread + k * r.threads;
        if (k > 0 && k + 1 < rounds) r.scatter(first + k + 1, pack + r.threads);
        const uint32_t bytes = r.cut.bytes(link.rank, pack);
        if (bytes != 0) {
            const auto v = r.sum(first + k, pack, bytes).rounded();
            write_pack<sizeof(T)>(reinterpret_cast<char*>(recv) + pack * R::Cut::kBytes, v, bytes, align_out);
        }
        if (k == 0 && rounds > 1) r.scatter(first + 1, pack + r.threads);
    }
}

}  // namespace p2p
