// All-gather and broadcast of any bytes by lines: 128 bytes that announce themselves, of which 124 are payload.
//
// Owns: the line format, the two schedules and why they are safe.
//
// # Lines
// Eight lanes of a warp store a line in one instruction, 16 bytes each; the last word of the eighth lane is the round
// number. PTX promises the atomicity of each lane's 16 bytes. That the whole line is there once its last word is, is a
// property of the hardware: an aligned line that one warp instruction stores crosses NVLink as one write, and reaches
// the L2 cache no later than its last word does. NCCL's LL128 protocol stands on the same property, and takes it for
// granted on NVLink since Volta. The receiver asks no more of it than NCCL does: it looks at the last words alone, and
// reads the lines when all of them have come. The test gpu_acceptance/lines.rs looks for torn lines.
//
// So packets, which stand on PTX alone, lose a quarter of the wire, and lines a thirty-second. A warp handles a burst
// of 16 lines: 4 stores of 4 lines each, 1984 bytes of payload in 2048. The eighth lanes' 4 x 12 bytes of a group of
// lanes are three packs of the payload, so nothing is read or written out of its alignment.
//
// # Slots
// The channel's scratch (link.cuh), of one stage: row `source` of buffer `round mod 4`, and there burst w of warp w.
// Lines and packets cannot share a channel: a line's payload may look like a packet's round.
#pragma once
#include "meet.cuh"
#include "numeric.cuh"

namespace p2p {

constexpr uint32_t kBurstPacks = 128;
constexpr uint32_t kBurstBytes = kBurstPacks / 32 * 31 * kPackBytes;

template <int kWorld>
__device__ __forceinline__ char* burst_slot(const Link& link, int owner, uint32_t round, int src, size_t warp) {
    const size_t row = size_t(round % kBuffers) * kWorld + src;
    return link.scratch[owner] + kFlagBytes + (row * link.slot_packs + warp * kBurstPacks) * kPackBytes;
}

// One lane's part of a burst: four packs of payload, or three in an eighth lane, and in their sealed form what crosses
// the wire.
struct Burst {
    static constexpr int kPacks = 4;
    Words<4> w[kPacks];

    __device__ __forceinline__ static uint32_t lane() { return threadIdx.x % 32; }
    __device__ __forceinline__ static bool seals() { return lane() % 8 == 7; }
    // Which pack of the burst's payload is this lane's pack `u`. The other lanes' lie before the eighth lanes', so that
    // an instruction reads 448 bytes on end.
    __device__ __forceinline__ static uint32_t pack(uint32_t u) {
        const uint32_t group = lane() / 8;
        return seals() ? 28 * kPacks + group * 3 + u : u * 28 + group * 7 + lane() % 8;
    }
    __device__ __forceinline__ static bool has(uint32_t u) { return u < 3 || !seals(); }
    // Bytes of this lane's pack `u` in a burst of `bytes` bytes.
    __device__ __forceinline__ static uint32_t length(uint32_t u, uint32_t bytes) {
        const uint32_t begin = pack(u) * kPackBytes;
        return !has(u) || begin >= bytes ? 0 : min(kPackBytes, bytes - begin);
    }

    // The `bytes` bytes (1 to kBurstBytes), whole elements of `kUnit` bytes, at `from`, which `align` divides.
    template <int kUnit = 1>
    __device__ __forceinline__ void read(const char* from, uint32_t bytes, uint32_t align) {
        if (bytes == kBurstBytes && moves_wide<4>(align)) {
#pragma unroll
            for (uint32_t u = 0; u < kPacks; u++)
                if (has(u)) w[u] = read_wide<4>(from + pack(u) * kPackBytes);
        } else {
#pragma unroll
            for (uint32_t u = 0; u < kPacks; u++)
                if (const uint32_t n = length(u, bytes); n != 0)
                    w[u] = read_pack<kUnit, 4>(from + pack(u) * kPackBytes, n, align);
        }
    }
    template <int kUnit = 1>
    __device__ __forceinline__ void write(char* to, uint32_t bytes, uint32_t align) const {
        if (bytes == kBurstBytes && moves_wide<4>(align)) {
#pragma unroll
            for (uint32_t u = 0; u < kPacks; u++)
                if (has(u)) write_wide(to + pack(u) * kPackBytes, w[u]);
        } else {
#pragma unroll
            for (uint32_t u = 0; u < kPacks; u++)
                if (const uint32_t n = length(u, bytes); n != 0)
                    write_pack<kUnit>(to + pack(u) * kPackBytes, w[u], n, align);
        }
    }

    // An eighth lane's three packs become four times three words, each with the round.
    __device__ __forceinline__ void seal(uint32_t round) {
        if (!seals()) return;
        const Words<4> a = w[0], b = w[1], c = w[2];
        w[0] = {{a.w[0], a.w[1], a.w[2], round}};
        w[1] = {{a.w[3], b.w[0], b.w[1], round}};
        w[2] = {{b.w[2], b.w[3], c.w[0], round}};
        w[3] = {{c.w[1], c.w[2], c.w[3], round}};
    }
    __device__ __forceinline__ void unseal() {
        if (!seals()) return;
        const Words<4> a = w[0], b = w[1], c = w[2], d = w[3];
        w[0] = {{a.w[0], a.w[1], a.w[2], b.w[0]}};
        w[1] = {{b.w[1], b.w[2], c.w[0], c.w[1]}};
        w[2] = {{c.w[2], d.w[0], d.w[1], d.w[2]}};
    }

    // Both by a whole warp, together: a line is one only if its eight lanes store it in one instruction.
    __device__ __forceinline__ void send(char* slot) const {
        __syncwarp();
#pragma unroll
        for (uint32_t u = 0; u < kPacks; u++)
            store_pack(slot + (u * 32 + lane()) * kPackBytes, w[u].w[0], w[u].w[1], w[u].w[2], w[u].w[3]);
    }
    // Once `arrived`.
    __device__ __forceinline__ void load(const char* slot) {
        __syncwarp();
#pragma unroll
        for (uint32_t u = 0; u < kPacks; u++) {
            const uint4 p = load_pack(slot + (u * 32 + lane()) * kPackBytes);
            w[u] = {{p.x, p.y, p.z, p.w}};
        }
    }
};

// The words of a slot that say whether its lines have come: an eighth lane looks at its own four.
struct Seals {
    uint32_t w[Burst::kPacks];

    __device__ __forceinline__ void load(const char* slot) {
        if (!Burst::seals()) return;
#pragma unroll
        for (uint32_t u = 0; u < Burst::kPacks; u++)
            asm volatile("ld.relaxed.sys.global.u32 %0, [%1];"
                         : "=r"(w[u])
                         : "l"(slot + (u * 32 + Burst::lane()) * kPackBytes + 12)
                         : "memory");
    }
    // Whether all lines of what the warp has loaded carry the round.
    __device__ __forceinline__ bool arrived(uint32_t round) const {
        bool mine = true;
#pragma unroll
        for (uint32_t u = 0; u < Burst::kPacks; u++) mine = mine && w[u] == round;
        return __all_sync(0xffffffffu, mine || !Burst::seals());
    }
};

// How many bursts a warp waits for at a time, so that their loads overlap.
template <int kWorld>
constexpr int kBurstsAtOnce = kWorld - 1 <= 4 ? kWorld - 1 : kWorld / 2;

// Waits, by a whole warp, for its bursts of `round` from the ranks `source(0)`, `source(1)`, ... of which bit `i` of
// `wanted` is set. They stay sealed.
template <int kWorld, int kCount, class Source>
__device__ __forceinline__ void receive_bursts(const Link& link, Waiter& waiter, uint32_t round, size_t warp,
                                               uint32_t wanted, Source source, Burst (&b)[kCount]) {
    auto slot = [&](int i) { return burst_slot<kWorld>(link, link.rank, round, source(i), warp); };
    waiter.until_arrived_by_warp(link, round, [&] {
        Seals seals[kCount];
#pragma unroll
        for (int i = 0; i < kCount; i++) seals[i].load(slot(i));
        uint32_t late = 0;
#pragma unroll
        for (int i = 0; i < kCount; i++)
            if (!seals[i].arrived(round) && wanted >> i & 1) late |= 1u << source(i);
        return late;
    });
#pragma unroll
    for (int i = 0; i < kCount; i++) b[i].load(slot(i));
}

// Bytes of burst `burst` of `bytes` bytes.
__device__ __forceinline__ uint32_t burst_length(size_t burst, size_t bytes) {
    const size_t begin = burst * kBurstBytes;
    return begin >= bytes ? 0 : uint32_t(min(size_t(kBurstBytes), bytes - begin));
}

// How `bytes` bytes are dealt out: burst `warp + k * warps` is this warp's in the kernel's round `k`.
struct Deal {
    size_t warp, warps;
    uint32_t rounds;

    __device__ __forceinline__ explicit Deal(size_t bytes) {
        warp = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
        warps = size_t(gridDim.x) * blockDim.x / 32;
        const size_t bursts = (bytes + kBurstBytes - 1) / kBurstBytes;
        rounds = uint32_t((bursts + warps - 1) / warps);
    }
    __device__ __forceinline__ size_t burst(uint32_t k) const { return warp + k * warps; }
};

// Claims rounds with one `gave_up` for each warp.
__device__ __forceinline__ uint32_t claim_rounds_by_warp(const Link& link, uint32_t rounds, Waiter& waiter) {
    bool silent;
    const uint32_t round = claim_rounds_by_thread(link, rounds, silent);
    waiter.gave_up = __any_sync(0xffffffffu, silent);
    return round;
}

// One hop. Rank r's `bytes` bytes at `send` come to `recv + r * bytes` everywhere; in place is allowed. Warp w of a
// rank exchanges with the warps w of the others only, without a barrier.
//
// Why no slot is overwritten early: A pushes round r in iteration r - 1, after it has B's burst of r - 2, which B
// pushed in iteration r - 3, after it had read that of r - 4. Between kernels: every kernel on this channel ends
// knowing that all ranks have started it, so that their earlier kernels have ended, and that all are through with its
// last round but three. So a kernel may push its first round at once. This one knows of both by what it has received:
// in the last round, or where a warp has nothing there, in the one before. The second push waits for the first receipt,
// which shows that B has started this kernel.
template <int kWorld>
__device__ __forceinline__ void all_gather_lines(const Link& link, const char* send, char* recv, size_t bytes) {
    allow_successor();
    wait_for_predecessor();
    const uint32_t align_in = common_alignment(address(send)), align_out = common_alignment(address(recv) | bytes);
    const Deal deal(bytes);
    const uint32_t rounds = deal.rounds;
    const size_t warp = deal.warp;
    Waiter waiter;
    const uint32_t first = claim_rounds_by_warp(link, rounds, waiter);
    const int rank = link.rank;

    auto push = [&](uint32_t k) {
        const size_t burst = deal.burst(k), at = burst * kBurstBytes;
        const uint32_t n = burst_length(burst, bytes);
        if (n == 0 || waiter.gave_up) return;
        Burst b;
        b.read(send + at, n, align_in);
        char* const own = recv + rank * bytes + at;
        if (own != send + at) b.write(own, n, align_out);
        b.seal(first + k);
#pragma unroll
        for (int d = 1; d < kWorld; d++) {
            const int to = wrapped<kWorld>(rank + d);
            b.send(burst_slot<kWorld>(link, to, first + k, rank, warp));
        }
    };
    push(0);
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        if (k > 0 && k + 1 < rounds) push(k + 1);
        const size_t burst = deal.burst(k);
        const uint32_t n = burst_length(burst, bytes);
        // In the order in which they are sent to this rank.
#pragma unroll 1
        for (int d = 1; d < kWorld && n != 0; d += kBurstsAtOnce<kWorld>) {
            auto source = [&](int i) { return wrapped_below<kWorld>(rank - d - i); };
            Burst b[kBurstsAtOnce<kWorld>];
            receive_bursts<kWorld>(link, waiter, first + k, warp, (1u << (kWorld - d)) - 1, source, b);
#pragma unroll
            for (int i = 0; i < kBurstsAtOnce<kWorld>; i++) {
                if (d + i >= kWorld) continue;
                b[i].unseal();
                b[i].write(recv + source(i) * bytes + burst * kBurstBytes, n, align_out);
            }
        }
        if (k == 0 && rounds > 1) push(1);
    }
}

// Two hops: the root sends each other rank a slice; that rank, its relay, passes it on to the rest. A relay's word that
// it is through with a round, a token of each CTA, is what lets the root go on.
//
// Why no slot is overwritten early: before the root pushes round r it has every relay's token of r - 4. A relay passes
// round r on when it has the root's, and so after all tokens of r - 4, too. Between kernels as above: the first round
// is pushed at once; before the second the root waits until all ranks have started this kernel, which they say with a
// flag. At the end each rank waits for these flags of all, and for all relays' tokens of the last round but three:
// whoever is the next root must know.
//
// Tokens are stores without a release: what they follow are reads that have returned, which no later store can change.
template <int kWorld>
__device__ __forceinline__ void broadcast_lines(const Link& link, const char* send, char* recv, size_t bytes,
                                                int root) {
    allow_successor();
    wait_for_predecessor();
    constexpr int kParts = kWorld - 1;
    const auto cut = Slices<4>::cut(bytes, kParts);
    const uint32_t align_in = common_alignment(address(send)), align_out = common_alignment(address(recv));
    const Deal deal(min(cut.stride, bytes));
    const uint32_t rounds = deal.rounds;
    const size_t warp = deal.warp;
    Waiter waiter;
    const uint32_t first = claim_rounds_by_warp(link, rounds, waiter);
    // With one verdict for the CTA, which has barriers.
    waiter.gave_up = __syncthreads_or(waiter.gave_up);
    if (waiter.gave_up) return;
    const int rank = link.rank;
    auto relay = [&](int i) { return wrapped<kWorld>(root + 1 + i); };
    // Bytes of burst `burst` of slice `i`.
    auto length = [&](int i, size_t burst) {
        const size_t begin = i * cut.stride;
        return begin >= bytes ? 0u : burst_length(burst, min(cut.stride, bytes - begin));
    };
    const int peer = threadIdx.x;
    const bool meets = peer < kWorld && peer != rank, heeds = meets && peer != root;
    if (meets) Flag::raise(flag(link, peer, blockIdx.x, kEnter, rank), first);
    auto all_started = [&] {
        if (!meets) return;
        const uint32_t* ours = flag(link, rank, blockIdx.x, kEnter, peer);
        // A rank that has this one's flag may be in the next kernel already, as many rounds ahead as this one has.
        waiter.until_arrived(link, first, [&] { return Flag::raised(ours, first, kAhead + rounds) ? 0u : 1u << peer; });
    };
    auto all_through = [&](uint32_t round) {
        if (!heeds) return;
        const uint32_t* ours = flag(link, rank, blockIdx.x, kToken, peer);
        waiter.until_arrived(link, round, [&] { return Flag::raised(ours, round) ? 0u : 1u << peer; });
    };

    if (rank == root) {
        for (uint32_t k = 0; k < rounds; k++) {
            if (k == 1) all_started();
            if (k >= kBuffers) all_through(first + k - kBuffers);
            if ((k == 1 || k >= kBuffers) && __syncthreads_or(waiter.gave_up)) return;
            const size_t burst = deal.burst(k);
#pragma unroll 1
            for (int turn = 0; turn < kParts; turn++) {
                // Warps begin with different relays.
                const int i = (turn + warp + k) % kParts;
                const uint32_t n = length(i, burst);
                if (n == 0) continue;
                const size_t at = i * cut.stride + burst * kBurstBytes;
                Burst b;
                b.read(send + at, n, align_in);
                if (recv != send) b.write(recv + at, n, align_out);
                b.seal(first + k);
                b.send(burst_slot<kWorld>(link, relay(i), first + k, rank, warp));
            }
        }
        injected_stall(link);
    } else {
        injected_stall(link);
        const int mine = wrapped_below<kWorld>(rank - root - 1);
        for (uint32_t k = 0; k < rounds; k++) {
            const size_t burst = deal.burst(k);
            if (const uint32_t n = length(mine, burst); n != 0) {
                Burst from_root[1];
                receive_bursts<kWorld>(link, waiter, first + k, warp, 1, [&](int) { return root; }, from_root);
                Burst& b = from_root[0];
                if (!waiter.gave_up) {
#pragma unroll
                    for (int d = 1; d < kWorld; d++) {
                        const int to = wrapped<kWorld>(rank + d);
                        if (to != root) b.send(burst_slot<kWorld>(link, to, first + k, rank, warp));
                    }
                }
                b.unseal();
                b.write(recv + mine * cut.stride + burst * kBurstBytes, n, align_out);
            }
#pragma unroll 1
            for (int d = 1; d < kWorld; d += kBurstsAtOnce<kWorld>) {
                auto source = [&](int i) { return wrapped_below<kWorld>(rank - d - i); };
                auto slice = [&](int s) { return wrapped_below<kWorld>(s - root - 1); };
                uint32_t wanted = 0;
#pragma unroll
                for (int i = 0; i < kBurstsAtOnce<kWorld>; i++)
                    if (d + i < kWorld && source(i) != root && length(slice(source(i)), burst) != 0) wanted |= 1u << i;
                if (wanted == 0) continue;
                Burst b[kBurstsAtOnce<kWorld>];
                receive_bursts<kWorld>(link, waiter, first + k, warp, wanted, source, b);
#pragma unroll
                for (int i = 0; i < kBurstsAtOnce<kWorld>; i++) {
                    if (!(wanted >> i & 1)) continue;
                    const int from = slice(source(i));
                    b[i].unseal();
                    b[i].write(recv + from * cut.stride + burst * kBurstBytes, length(from, burst), align_out);
                }
            }
            if (__syncthreads_or(waiter.gave_up)) return;
            if (meets) Flag::raise(flag(link, peer, blockIdx.x, kToken, rank), first + k);
        }
    }
    all_started();
    if (rounds >= kBuffers) all_through(first + rounds - kBuffers);
}

}  // namespace p2p
