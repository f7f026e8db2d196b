// All-reduce in a hybrid cube mesh: eight ranks, each with three neighbours in its quad and a relay in the other quad,
// and no access to the remaining three ranks' memory.
//
// Owns: the layout of the cube's slots, the schedules, and the argument why they are safe.
//
// # Routes
// What is for all goes to the neighbours, and the relay passes it on, unchanged, to its quad. What is for one rank of the
// other quad goes to the neighbour in the own quad whose relay that rank is, and from there to it. So every sum is made
// of all eight contributions, in rank order, and has the bits that the other algorithms give.
//
// What that costs, in packs on the wire a rank: in one hop 7, at most 2 on a link. If the quads exchanged partial sums in
// fp32 it would be 4 for f32 and 5 for 16-bit types, at most 1 and 2 on a link. In slices of an eighth it costs 17, at
// most 5 on a link (the relay's), where partial sums would take 14 and 15, at most 4. They would be sums in another order.
//
// # Slots
// `link.scratch` is an area of scratch_bytes(kCubeRows / kStages, slot_packs) bytes, initialised as a packet channel's.
// A buffer has kCubeRows rows: eight each of contributions, of sums, and of contributions in transit. Row s of a kind
// holds what comes from rank s, whoever stores it: s itself, or the neighbour that passes it on. Only one of them does.
//
// # Threads
// As in reduce.cuh: thread t talks to the threads t of the other ranks, through slot t of each row.
//
// # Why no wait is for itself
// Number the steps of one round: scatter, forward, reduce, pass on, gather. Each waits only for what other ranks' threads t
// stored in earlier steps of the round, and every thread takes a round's steps in this order. Scatter waits for nothing
// and comes before the thread's first wait of its round.
//
// # Why a slot is never overwritten before it was read
// Let A store into a slot of its neighbour B in round r. The slot's last content is of round r - 4 or before.
//
// Within a kernel, r at least the kernel's third: A takes any step of round r after it has gathered round r - 2. That
// brought a sum of B's, which B stored after it had gathered r - 3, so B has read everything of r - 4. All slices have
// packs in that round: only the last slice is shorter than the first, by fewer than 8 packs (the grid has at least 32
// threads, so that only a kernel's last two rounds can lack them).
//
// Within a kernel, the second round: A scatters it after it has gathered the first, so B has started this kernel, so all
// of B's earlier kernels have ended, and with them the round r - 4.
//
// The first round of a kernel, and between kernels: A's last kernel has ended, with at least one sum or (one hop) all
// contributions. A sum contains a contribution of every rank. So B had started that kernel and ended all before it; only
// that kernel's own rounds are in question, and only for threads that it had. There A gathered for thread t the sum of
// B's of the kernel's last round but two at least, so B has read everything up to the round before that one, which is r
// - 4; a kernel of fewer rounds than that begins later.
#pragma once
#include "numeric.cuh"
#include "wait.cuh"

namespace p2p {

constexpr int kCubeRanks = 8;
constexpr uint32_t kCubeRows = 24;

// This rank's part in the mesh. `far[k]`: the relay of `quad[k]`, whose data `quad[k]` passes on to this rank.
struct CubeRoles {
    uint32_t quad[3];
    uint32_t relay;
    uint32_t far[3];
    uint32_t reserved;
};

enum CubeRow : uint32_t { kContribution = 0, kSum = 1, kTransit = 2 };

template <class T>
struct Cube {
    using Wire = Packet;
    using Data = Words<Wire::kWords>;
    using Cut = Slices<Wire::kWords>;

    const Link& link;
    const CubeRoles& roles;
    const Cut cut;
    const char* send;
    uint32_t send_align;
    size_t thread, threads;
    Waiter waiter;

    __device__ __forceinline__ char* place(uint32_t owner, uint32_t round, CubeRow kind, uint32_t src,
                                           size_t at) const {
        const size_t row = size_t(round % kBuffers) * kCubeRows + kind * kCubeRanks + src;
        return link.scratch[owner] + kFlagBytes + (row * link.slot_packs + at) * kPackBytes;
    }

    __device__ __forceinline__ Data read(uint32_t slice, size_t pack, uint32_t bytes) const {
        return read_pack<sizeof(T), Wire::kWords>(send + cut.offset(slice, pack), bytes, send_align);
    }

    __device__ __forceinline__ uint32_t all_others() const { return 0xffu & ~(1u << link.rank); }

    // Stores `v` as this rank's own with all neighbours.
    __device__ __forceinline__ void tell_neighbours(uint32_t round, CubeRow kind, size_t at, const Data& v) const {
#pragma unroll
        for (int k = 0; k < 3; k++) Wire::send(place(roles.quad[k], round, kind, link.rank, at), v, round);
        Wire::send(place(roles.relay, round, kind, link.rank, at), v, round);
    }

    // Waits for what the relay has stored and passes it on to the quad. Nothing is passed on once a wait was given up:
    // it would look like data.
    __device__ __forceinline__ void pass_on(uint32_t round, CubeRow kind, size_t at) {
        Data v;
        waiter.until_arrived(link, round, [&] {
            const uint4 raw = load_pack(place(link.rank, round, kind, roles.relay, at));
            v = Wire::payload(raw);
            return Wire::arrived(raw, round) ? 0u : 1u << roles.relay;
        });
        if (waiter.gave_up) return;
#pragma unroll
        for (int k = 0; k < 3; k++) Wire::send(place(roles.quad[k], round, kind, roles.relay, at), v, round);
    }

    // Waits for the packs of `sources` in the rows of `kind` and returns them. All rows are loaded before one is looked
    // at, so that the loads overlap. `by_relay`: the relay passes on what comes from the three that are no neighbours;
    // else each comes by the neighbour whose relay it is.
    __device__ __forceinline__ void collect(uint32_t round, CubeRow kind, size_t at, uint32_t sources, bool by_relay,
                                            Data (&v)[kCubeRanks]) {
        uint4 raw[kCubeRanks];
        waiter.until_arrived(link, round, [&] {
#pragma unroll
            for (int s = 0; s < kCubeRanks; s++) raw[s] = load_pack(place(link.rank, round, kind, s, at));
            uint32_t missing = 0;
#pragma unroll
            for (int s = 0; s < kCubeRanks; s++) missing |= Wire::arrived(raw[s], round) ? 0u : 1u << s;
            missing &= sources;
            // What a missing rank was to pass on is not its origin's fault.
            uint32_t excused = 0;
#pragma unroll
            for (int k = 0; k < 3; k++)
                if (missing >> (by_relay ? roles.relay : roles.quad[k]) & 1) excused |= 1u << roles.far[k];
            return missing & ~excused;
        });
#pragma unroll
        for (int s = 0; s < kCubeRanks; s++) v[s] = Wire::payload(raw[s]);
    }

    // Adds up a pack in rank order, this rank's own from `own`, and rounds once.
    __device__ __forceinline__ Data add_up(const Data (&v)[kCubeRanks], const Data& own) const {
        Accumulator<T, Wire::kWords> acc;
#pragma unroll
        for (int s = 0; s < kCubeRanks; s++) {
            const Data x = s == int(link.rank) ? own : v[s];
            if (s == 0)
                acc.set(x);
            else
                acc.add(x);
        }
        return acc.rounded();
    }

    // Sends this thread's pack of each other rank's slice on its way.
    __device__ __forceinline__ void scatter(uint32_t round, size_t pack) const {
        auto give = [&](uint32_t slice, uint32_t to, CubeRow kind) {
            const uint32_t bytes = cut.bytes(slice, pack);
            if (bytes != 0) Wire::send(place(to, round, kind, link.rank, thread), read(slice, pack, bytes), round);
        };
#pragma unroll
        for (int k = 0; k < 3; k++) give(roles.quad[k], roles.quad[k], kContribution);
        give(roles.relay, roles.relay, kContribution);
#pragma unroll
        for (int k = 0; k < 3; k++) give(roles.far[k], roles.quad[k], kTransit);
    }

    // Hands the quad's packs of the relay's slice to the relay, each as it comes: one that is missing must not make the
    // others look so.
    __device__ __forceinline__ void forward(uint32_t round, size_t pack) {
        if (cut.bytes(roles.relay, pack) == 0) return;
        uint32_t left = 7;
        waiter.until_arrived(link, round, [&] {
            uint4 raw[3];
#pragma unroll
            for (int k = 0; k < 3; k++) raw[k] = load_pack(place(link.rank, round, kTransit, roles.quad[k], thread));
            uint32_t missing = 0;
#pragma unroll
            for (int k = 0; k < 3; k++) {
                if ((left >> k & 1) == 0) continue;
                if (Wire::arrived(raw[k], round)) {
                    Wire::send(place(roles.relay, round, kContribution, roles.quad[k], thread), Wire::payload(raw[k]),
                               round);
                    left &= ~(1u << k);
                } else {
                    missing |= 1u << roles.quad[k];
                }
            }
            return missing;
        });
    }
};

// Every rank gets every contribution and adds up everything: two links of latency, one round. At most `slot_packs`
// packs. In place is allowed: a pack of `recv` is written by the thread that has sent the same pack of `send`.
template <class T>
__device__ __forceinline__ void cube_all_reduce_one_shot(const Link& link, const CubeRoles& roles, const T* send,
                                                         T* recv, size_t count) {
    using C = Cube<T>;
    allow_successor();
    wait_for_predecessor();
    const uint32_t align_out = common_alignment(address(recv));
    const size_t total = count * sizeof(T);
    C c{link,
        roles,
        typename C::Cut{total, total},
        reinterpret_cast<const char*>(send),
        common_alignment(address(send)),
        size_t(blockIdx.x) * blockDim.x + threadIdx.x,
        size_t(gridDim.x) * blockDim.x,
        {}};
    const size_t packs = c.cut.packs();
    const uint32_t round = claim_rounds(link, 1, c.waiter.gave_up);
    if (c.waiter.gave_up) return;
    for (size_t p = c.thread; p < packs; p += c.threads)
        c.tell_neighbours(round, kContribution, p, c.read(0, p, c.cut.bytes(0, p)));
    injected_stall(link);
    for (size_t p = c.thread; p < packs; p += c.threads) c.pass_on(round, kContribution, p);
    for (size_t p = c.thread; p < packs; p += c.threads) {
        const uint32_t bytes = c.cut.bytes(0, p);
        const auto own = c.read(0, p, bytes);
        typename C::Data v[kCubeRanks];
        c.collect(round, kContribution, p, c.all_others(), false, v);
        write_pack<sizeof(T)>(reinterpret_cast<char*>(recv) + p * C::Cut::kBytes, c.add_up(v, own), bytes, align_out);
    }
}

// Every rank adds up its slice and the sums are gathered; any count, in rounds. In place is allowed, as above.
template <class T>
__device__ __forceinline__ void cube_all_reduce_two_shot(const Link& link, const CubeRoles& roles, const T* send,
                                                         T* recv, size_t count) {
    using C = Cube<T>;
    allow_successor();
    wait_for_predecessor();
    const uint32_t align_out = common_alignment(address(recv));
    char* const out = reinterpret_cast<char*>(recv);
    C c{link,
        roles,
        C::Cut::cut(count * sizeof(T), kCubeRanks),
        reinterpret_cast<const char*>(send),
        common_alignment(address(send)),
        size_t(blockIdx.x) * blockDim.x + threadIdx.x,
        size_t(gridDim.x) * blockDim.x,
        {}};
    const uint32_t rank = link.rank;
    const uint32_t rounds = uint32_t((c.cut.packs() + c.threads - 1) / c.threads);
    const uint32_t first = claim_rounds(link, rounds, c.waiter.gave_up);
    if (c.waiter.gave_up) return;

    c.scatter(first, c.thread);
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        const uint32_t round = first + k;
        const size_t pack = c.thread + k * c.threads;
        if (k > 0 && k + 1 < rounds) c.scatter(round + 1, pack + c.threads);
        c.forward(round, pack);
        if (c.waiter.gave_up) return;
        const uint32_t bytes = c.cut.bytes(rank, pack);
        if (bytes != 0) {
            const auto own = c.read(rank, pack, bytes);
            typename C::Data v[kCubeRanks];
            c.collect(round, kContribution, c.thread, c.all_others(), true, v);
            const auto sum = c.add_up(v, own);
            // A sum of what has not arrived must not be taken for one.
            if (c.waiter.gave_up) return;
            c.tell_neighbours(round, kSum, c.thread, sum);
            write_pack<sizeof(T)>(out + c.cut.offset(rank, pack), sum, bytes, align_out);
        }
        if (c.cut.bytes(roles.relay, pack) != 0) c.pass_on(round, kSum, c.thread);
        uint32_t sources = 0;
        for (int s = 0; s < kCubeRanks; s++)
            if (s != int(rank) && c.cut.bytes(s, pack) != 0) sources |= 1u << s;
        typename C::Data v[kCubeRanks];
        c.collect(round, kSum, c.thread, sources, false, v);
        if (c.waiter.gave_up) return;
        for (int s = 0; s < kCubeRanks; s++)
            if (sources >> s & 1)
                write_pack<sizeof(T)>(out + c.cut.offset(s, pack), v[s], c.cut.bytes(s, pack), align_out);
        if (k == 0 && rounds > 1) c.scatter(round + 1, pack + c.threads);
    }
}

// Rank r's `bytes` bytes at `send` come to `recv + r * bytes` everywhere. The sums' half of the two-shot all-reduce; a
// round's packs are pushed once the round before has been gathered. In place is allowed.
__device__ __forceinline__ void cube_all_gather(const Link& link, const CubeRoles& roles, const char* send, char* recv,
                                                size_t bytes) {
    using C = Cube<float>;
    allow_successor();
    wait_for_predecessor();
    const uint32_t align_in = common_alignment(address(send)), align_out = common_alignment(address(recv) | bytes);
    C c{link,
        roles,
        C::Cut{bytes, bytes * kCubeRanks},
        send,
        align_in,
        size_t(blockIdx.x) * blockDim.x + threadIdx.x,
        size_t(gridDim.x) * blockDim.x,
        {}};
    const uint32_t rank = link.rank;
    const uint32_t rounds = uint32_t((c.cut.packs() + c.threads - 1) / c.threads);
    const uint32_t first = claim_rounds(link, rounds, c.waiter.gave_up);
    if (c.waiter.gave_up) return;
    for (uint32_t k = 0; k < rounds; k++) {
        const uint32_t round = first + k;
        const size_t pack = c.thread + k * c.threads;
        const uint32_t n = c.cut.bytes(0, pack);
        if (n == 0) break;
        const auto own = read_pack<1, C::Wire::kWords>(send + c.cut.offset(0, pack), n, align_in);
        c.tell_neighbours(round, kSum, c.thread, own);
        if (k == 0) injected_stall(link);
        char* const place = recv + c.cut.offset(rank, pack);
        if (place != send + c.cut.offset(0, pack)) write_pack<1>(place, own, n, align_out);
        c.pass_on(round, kSum, c.thread);
        C::Data v[kCubeRanks];
        c.collect(round, kSum, c.thread, c.all_others(), false, v);
        if (c.waiter.gave_up) return;
#pragma unroll
        for (int s = 0; s < kCubeRanks; s++)
            if (s != int(rank)) write_pack<1>(recv + c.cut.offset(s, pack), v[s], n, align_out);
    }
}

}  // namespace p2p
