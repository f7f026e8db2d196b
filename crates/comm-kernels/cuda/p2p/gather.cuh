// All-gather and broadcast of any bytes: by packets through scratch (small sizes), and by direct stores into the peers' result
// buffers (large sizes, registered buffers). By lines: lines.cuh.
//
// Owns: the schedules and why they are safe. Thread mapping and launch rules of the packet forms are reduce.cuh's.
#pragma once
#include "meet.cuh"
#include "numeric.cuh"

namespace p2p {

// One hop by packets. Rank r's `bytes` bytes at `send` come to `recv + r * bytes` everywhere; in place is allowed.
//
// A pushes round r in iteration r - 1, after it has B's packets of r - 2, which B pushed in iteration r - 3, after it
// had read those of r - 4. Between kernels, and why the second push waits for the first receipt: reduce.cuh.
template <int kWorld>
__device__ __forceinline__ void all_gather_packets(const Link& link, const char* send, char* recv, size_t bytes) {
    using Data = Words<Packet::kWords>;
    allow_successor();
    wait_for_predecessor();
    const Slices<Packet::kWords> cut{bytes, bytes * kWorld};
    const uint32_t align_in = common_alignment(address(send)), align_out = common_alignment(address(recv) | bytes);
    const size_t thread = size_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = size_t(gridDim.x) * blockDim.x;
    const uint32_t rounds = uint32_t((cut.packs() + threads - 1) / threads);
    Waiter waiter;
    const uint32_t first = claim_rounds_by_thread(link, rounds, waiter.gave_up);
    const int rank = link.rank;

    auto push = [&](uint32_t k) {
        const size_t pack = thread + k * threads;
        const uint32_t n = cut.bytes(0, pack);
        if (n == 0 || waiter.gave_up) return;
        const Data v = read_pack<1, 3>(send + cut.offset(0, pack), n, align_in);
#pragma unroll
        for (int d = 1; d < kWorld; d++) {
            const int to = rank + d >= kWorld ? rank + d - kWorld : rank + d;
            Packet::send(slot<kWorld>(link, to, first + k, kGather, rank, thread), v, first + k);
        }
        char* own = recv + cut.offset(rank, pack);
        if (own != send + cut.offset(0, pack)) write_pack<1>(own, v, n, align_out);
    };
    push(0);
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        if (k > 0 && k + 1 < rounds) push(k + 1);
        const size_t pack = thread + k * threads;
        const uint32_t n = cut.bytes(0, pack);
        if (n != 0) {
            Data v[kWorld];
            receive_all<Packet, kWorld>(link, waiter, first + k, kGather, thread, ((1u << kWorld) - 1) & ~(1u << rank),
                                        v);
#pragma unroll
            for (int s = 0; s < kWorld; s++)
                if (s != rank) write_pack<1>(recv + cut.offset(s, pack), v[s], n, align_out);
        }
        if (k == 0 && rounds > 1) push(1);
    }
}

// Broadcast by packets: the root sends everything to everyone (kRelay = false, smallest sizes), or a slice to each
// other rank, which passes it on to the rest (kRelay = true). At most 2 rounds a call.
//
// The root receives no data, so nothing holds it back by itself. Every rank therefore sends every other a token when it
// starts, and ends only with all tokens. When A starts a call, B has started the one before, so B's calls up to the
// last but one have ended; that one and this one together use at most 4 rounds, so no slot is written twice.
template <int kWorld, bool kRelay>
__device__ __forceinline__ void broadcast_packets(const Link& link, const char* send, char* recv, size_t bytes,
                                                  int root) {
    using Data = Words<Packet::kWords>;
    allow_successor();
    wait_for_predecessor();
    constexpr int kParts = kRelay && kWorld > 2 ? kWorld - 1 : 1;
    const auto cut = Slices<Packet::kWords>::cut(bytes, kParts);
    const uint32_t align_in = common_alignment(address(send)), align_out = common_alignment(address(recv));
    const size_t thread = size_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = size_t(gridDim.x) * blockDim.x;
    const uint32_t rounds = uint32_t((cut.packs() + threads - 1) / threads);
    Waiter waiter;
    const uint32_t first = claim_rounds_by_thread(link, rounds, waiter.gave_up);
    if (waiter.gave_up) return;
    const int rank = link.rank;
    auto relay = [&](int i) { return root + 1 + i >= kWorld ? root + 1 + i - kWorld : root + 1 + i; };
    const bool token = blockIdx.x == 0 && threadIdx.x < kWorld && int(threadIdx.x) != rank;
    if (token) Flag::raise(flag(link, threadIdx.x, 0, kToken, rank), first);

    if (rank == root) {
        for (uint32_t k = 0; k < rounds; k++) {
            const size_t pack = thread + k * threads;
            if (moves_wide<3>(align_in & align_out) && pack < cut.whole_packs(kParts)) {
                Data v[kParts];
#pragma unroll
                for (int i = 0; i < kParts; i++) v[i] = read_wide<3>(send + cut.offset(i, pack));
#pragma unroll
                for (int i = 0; i < kWorld - 1; i++)
                    Packet::send(slot<kWorld>(link, relay(i), first + k, kScatter, rank, thread),
                                 v[kParts == 1 ? 0 : i], first + k);
                if (recv != send) {
#pragma unroll
                    for (int i = 0; i < kParts; i++) write_wide(recv + cut.offset(i, pack), v[i]);
                }
                continue;
            }
            for (int i = 0; i < kWorld - 1; i++) {
                const int slice = kParts == 1 ? 0 : i;
                const uint32_t n = cut.bytes(slice, pack);
                if (n == 0) continue;
                const Data v = read_pack<1, 3>(send + cut.offset(slice, pack), n, align_in);
                Packet::send(slot<kWorld>(link, relay(i), first + k, kScatter, rank, thread), v, first + k);
                if (recv != send && (kParts > 1 || i == 0))
                    write_pack<1>(recv + cut.offset(slice, pack), v, n, align_out);
            }
        }
    } else {
        const int mine = rank - root - 1 < 0 ? rank - root - 1 + kWorld : rank - root - 1;
        injected_stall(link);
        for (uint32_t k = 0; k < rounds; k++) {
            const size_t pack = thread + k * threads;
            const int slice = kParts == 1 ? 0 : mine;
            const uint32_t n = cut.bytes(slice, pack);
            if (n != 0) {
                Data v;
                waiter.until_arrived(link, first + k, [&] {
                    const uint4 raw = load_pack(slot<kWorld>(link, rank, first + k, kScatter, root, thread));
                    v = Packet::payload(raw);
                    return Packet::arrived(raw, first + k) ? 0u : 1u << root;
                });
                if (kParts > 1 && !waiter.gave_up) {
#pragma unroll
                    for (int d = 1; d < kWorld; d++) {
                        const int to = rank + d >= kWorld ? rank + d - kWorld : rank + d;
                        if (to != root)
                            Packet::send(slot<kWorld>(link, to, first + k, kGather, rank, thread), v, first + k);
                    }
                }
                write_pack<1>(recv + cut.offset(slice, pack), v, n, align_out);
            }
            if (kParts == 1) continue;
            uint32_t sources = 0;
#pragma unroll
            for (int i = 0; i < kWorld - 1; i++)
                if (i != mine && cut.bytes(i, pack) != 0) sources |= 1u << relay(i);
            Data v[kWorld];
            receive_all<Packet, kWorld>(link, waiter, first + k, kGather, thread, sources, v);
#pragma unroll
            for (int s = 0; s < kWorld; s++) {
                if (!(sources >> s & 1)) continue;
                const int i = s - root - 1 < 0 ? s - root - 1 + kWorld : s - root - 1;
                write_pack<1>(recv + cut.offset(i, pack), v[s], cut.bytes(i, pack), align_out);
            }
        }
    }
    if (token) {
        const uint32_t* ours = flag(link, rank, 0, kToken, threadIdx.x);
        waiter.until_arrived(link, first, [&] { return Flag::raised(ours, first) ? 0u : 1u << threadIdx.x; });
    }
}

// Copies `bytes` bytes with one warp, to `too` as well unless it is null; `align` divides all addresses.
__device__ __forceinline__ void warp_copy(char* to, const char* from, size_t bytes, uint32_t align,
                                          char* too = nullptr) {
    const uint32_t lane = threadIdx.x & 31;
    if (align < 16) {
        for (size_t i = lane; i * 4 < bytes; i += 32) {
            const uint32_t n = bytes - i * 4 < 4 ? uint32_t(bytes - i * 4) : 4;
            const Words<1> v = read_pack<1, 1>(from + i * 4, n, align);
            write_pack<1>(to + i * 4, v, n, align);
            if (too != nullptr) write_pack<1>(too + i * 4, v, n, align);
        }
        return;
    }
    size_t i = lane;
    const size_t packs = bytes / 16;
    for (; i + 224 < packs; i += 256) {
        Words<4> v[8];
#pragma unroll
        for (int u = 0; u < 8; u++) v[u] = read_wide<4>(from + (i + 32 * u) * 16);
#pragma unroll
        for (int u = 0; u < 8; u++) store_pack(to + (i + 32 * u) * 16, v[u].w[0], v[u].w[1], v[u].w[2], v[u].w[3]);
        if (too != nullptr) {
#pragma unroll
            for (int u = 0; u < 8; u++) write_wide(too + (i + 32 * u) * 16, v[u]);
        }
    }
    for (; i < packs; i += 32) {
        const Words<4> v = read_wide<4>(from + i * 16);
        write_wide(to + i * 16, v);
        if (too != nullptr) write_wide(too + i * 16, v);
    }
    const uint32_t tail = bytes % 16;
    if (lane == 0 && tail != 0) {
        const Words<4> v = read_pack<1, 4>(from + packs * 16, tail, 16);
        write_pack<1>(to + packs * 16, v, tail, 16);
        if (too != nullptr) write_pack<1>(too + packs * 16, v, tail, 16);
    }
}

// What one warp copies to one peer on end: fine enough that every peer is written to all the time.
constexpr size_t kDirectChunk = 4096;

// One hop by stores into the peers' `recv`: this rank's `bytes` bytes come to `at()` of each; `strides` divides as `at()`
// does. The warps are dealt out over
// the peers, `chunk` bytes (a multiple of 4096) at a time. Entry: a peer's buffer may be written once that peer has
// entered. Exit: a rank leaves once everybody's stores to it are visible. Neither depends on how much anybody stores.
template <int kWorld, class At>
__device__ __forceinline__ void gather_direct(const Link& link, const char* send, const Peers& recv, At at,
                                              size_t bytes, uint64_t strides, uint32_t chunk) {
    allow_successor();
    wait_for_predecessor();
    Waiter waiter;
    const uint32_t round = claim_rounds_by_thread(link, 1, waiter.gave_up);
    if (!meet<kWorld>(link, waiter, kEnter, round, false)) return;
    injected_stall(link);
    uint64_t bits = address(send) | strides;
#pragma unroll
    for (int r = 0; r < kWorld; r++) bits |= address(recv.at[r]);
    const uint32_t align = common_alignment(bits);
    const size_t warp = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32,
                 warps = size_t(gridDim.x) * blockDim.x / 32;
    const size_t chunks = (bytes + chunk - 1) / chunk;
    for (size_t i = warp; i < chunks * (kWorld - 1); i += warps) {
        const int d = 1 + int(i % (kWorld - 1));
        const size_t begin = i / (kWorld - 1) * chunk;
        const int to = int(link.rank) + d >= kWorld ? int(link.rank) + d - kWorld : int(link.rank) + d;
        warp_copy(recv.at[to] + at() + begin, send + begin, min(size_t(chunk), bytes - begin), align);
    }
    char* const own = recv.at[link.rank] + at();
    if (own != send) {
        for (size_t i = warp; i < chunks; i += warps)
            warp_copy(own + i * chunk, send + i * chunk, min(size_t(chunk), bytes - i * chunk), align);
    }
    meet<kWorld>(link, waiter, kExit, round, true);
}

template <int kWorld>
__device__ __forceinline__ void all_gather_direct(const Link& link, const char* send, const Peers& recv, size_t bytes,
                                                  uint32_t chunk) {
    gather_direct<kWorld>(link, send, recv, [&] { return link.rank * bytes; }, bytes, bytes, chunk);
}

// Two hops by stores: the root writes slice i into relay i's `recv`, chunk by chunk, and raises a flag; the relay
// passes each chunk on. CTA b of every rank handles the same chunks, so a flag per CTA is enough. `chunk`: bytes of one
// CTA and slice between two flags, a multiple of kDirectChunk.
//
// The relay reads what the root wrote: the root's CTA barrier and release store, and the relay's acquiring load and CTA
// barrier, order the two.
template <int kWorld>
__device__ __forceinline__ void broadcast_direct(const Link& link, const char* send, const Peers& recv, size_t bytes,
                                                 int root, uint32_t chunk) {
    allow_successor();
    wait_for_predecessor();
    const auto cut = Slices<4>::cut(bytes, kWorld - 1);
    const size_t per_pass = size_t(gridDim.x) * chunk;
    const uint32_t passes = uint32_t((cut.stride + per_pass - 1) / per_pass);
    Waiter waiter;
    const uint32_t first = claim_rounds_by_thread(link, passes + 1, waiter.gave_up);
    const int rank = link.rank, mine = rank - root - 1 < 0 ? rank - root - 1 + kWorld : rank - root - 1;
    auto relay = [&](int i) { return root + 1 + i >= kWorld ? root + 1 + i - kWorld : root + 1 + i; };
    const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32;
    uint64_t bits = address(send);
#pragma unroll
    for (int r = 0; r < kWorld; r++) bits |= address(recv.at[r]);
    const uint32_t align = common_alignment(bits);
    auto span = [&](int slice, size_t begin, size_t& n) {
        const size_t at = slice * cut.stride + begin;
        n = begin >= cut.stride || at >= bytes ? 0 : min(kDirectChunk, min(cut.stride - begin, bytes - at));
        return at;
    };
    if (!meet<kWorld>(link, waiter, kEnter, first, false)) return;
    injected_stall(link);
    const uint32_t pieces = chunk / kDirectChunk;
    for (uint32_t k = 0; k < passes; k++) {
        const size_t begin = (size_t(k) * gridDim.x + blockIdx.x) * chunk;
        if (rank == root) {
            for (uint32_t i = warp; i < pieces * (kWorld - 1); i += warps) {
                size_t n;
                const size_t at = span(i % (kWorld - 1), begin + i / (kWorld - 1) * kDirectChunk, n);
                if (n == 0) continue;
                warp_copy(recv.at[relay(i % (kWorld - 1))] + at, send + at, n, align,
                          recv.at[root] != send ? recv.at[root] + at : nullptr);
            }
            __syncthreads();
            if (threadIdx.x < kWorld && int(threadIdx.x) != root)
                Flag::raise_after_writes(flag(link, threadIdx.x, blockIdx.x, kChunk, root), first + k);
        } else {
            if (threadIdx.x == 0) {
                const uint32_t* ours = flag(link, rank, blockIdx.x, kChunk, root);
                // Nothing holds a root back that is ahead, by however many chunks.
                waiter.until_arrived(link, first + k, [&] {
                    return Flag::raised(ours, first + k, kAhead + passes) ? 0u : 1u << root;
                });
            }
            if (__syncthreads_or(waiter.gave_up)) return;
            // Other relays to pass the chunk on to. With two ranks there are none and the loop is empty.
            constexpr uint32_t kOthers = kWorld > 2 ? kWorld - 2 : 1;
            for (uint32_t i = warp; kWorld > 2 && i < pieces * kOthers; i += warps) {
                int to = rank + 1 + i % kOthers;
                size_t n;
                const size_t at = span(mine, begin + i / kOthers * kDirectChunk, n);
                // The ranks after this one in ring order, leaving out the root.
                to = to >= kWorld ? to - kWorld : to;
                const int before_root = root - rank - 1 < 0 ? root - rank - 1 + kWorld : root - rank - 1;
                if (int(i % kOthers) >= before_root) to = to + 1 >= kWorld ? to + 1 - kWorld : to + 1;
                if (n != 0) warp_copy(recv.at[to] + at, recv.at[rank] + at, n, align);
            }
        }
    }
    meet<kWorld>(link, waiter, kExit, first + passes, true);
}

}  // namespace p2p
