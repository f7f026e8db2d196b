// All-reduce and reduce-scatter for the largest buffers, in steps (steps.cuh).
//
// Owns: rounds and their buffers, the flags of tiles, the sums.
//
// # Warps
// Warp 0 of half the CTAs is a mover. The warps from 3 on sum tiles that have arrived. Warp 1 raises the flags of what
// the mover has sent, warp 2 those of what has been summed: a release beside a busy copy unit is slow, and neither the
// mover nor the reducers shall wait for one.
//
// # Rounds and passes
// The buffer is cut into one slice per rank, a slice into rounds of `tiles` tiles. In step s of pass k rank r stores to
// rank r + s: first the tiles of round k of slice r + s, for that rank to sum ("scatter"), then, in an all-reduce, the
// tiles of round k - 2 of its own slice, summed ("gather"). Two rounds later, so that no mover waits for a sum; one, if
// there is only one round.
//
// # Why nothing is overwritten early or read too soon
// All ranks meet at the start: whatever ran before, on this channel too, has ended everywhere, so all tile buffers and
// results may be written. They meet at the end: everything sent has been received and summed.
// - A scattered tile's flag is raised behind the wait for its stores. There is a flag per tile, source and parity of
//   the round, so a flag of round k + 2 cannot stand in for one of round k that a slower mover still holds.
// - Round k + 2 goes to the buffers of round k. It is sent to a rank after that rank's credit for round k: raised by
//   the CTA that counted the round's last tile as summed, and so ordered behind all reads of the round.
// - Rounds k and k + 2 share that count as well. It is back at zero before the credit, and only senders wait for
//   credits: so nobody counts a tile that nobody sends, one past the end of a shorter slice. Every round before a
//   slice's last is full, so a sender that has a tile for round k + 2 has the credit for round k to wait for.
// - A summed tile is gathered after its own flag, on this rank, behind proxy fences: the sum was written by ordinary
//   stores and is read by the bulk copy unit.
// - In place: a rank overwrites its own slice of a tile after reading it. Others' sums of a tile overwrite this rank's
//   input after this rank has sent it: they were made from it.
// - A reducer that gives up a wait ends its CTA's sums and a mover that does ends too: what depends on the wait is
//   never sent, and the meeting at the end is not reached.
// - Movers wait for reducers and reducers for other ranks' movers, each only for tiles that stand earlier in every
//   queue. A mover that waits has handed on all flags before: so somebody can always go on.
//
// # Same bits everywhere
// Each element is summed by one rank, in fp32, in rank order, and rounded once.
#pragma once
#include "steps.cuh"

namespace p2p {

constexpr uint32_t kTileBuffers = 2;
static_assert(kTileBuffers == kFirstStepWord, "a credit word per buffer, then the step words");

// What a rank has to move: `rounds` rounds of up to `tiles` tiles of `tile` bytes, of slices of up to `slice` bytes.
struct TileCut {
    size_t slice;
    uint32_t tile, tiles;

    __device__ __forceinline__ size_t round_bytes() const { return size_t(tiles) * tile; }
    __device__ __forceinline__ uint32_t rounds() const { return uint32_t((slice + round_bytes() - 1) / round_bytes()); }
    // Tiles of round k of the longest slice.
    __device__ __forceinline__ uint32_t tiles_of(uint32_t k) const { return tiles_of(k, slice); }
    // Those of them that are not empty in a slice of `length` bytes.
    __device__ __forceinline__ uint32_t tiles_of(uint32_t k, size_t length) const {
        const size_t at = k * round_bytes();
        if (at >= length) return 0;
        return length - at >= round_bytes() ? tiles : uint32_t((length - at + tile - 1) / tile);
    }
    __device__ __forceinline__ size_t begin(uint32_t k, uint32_t t) const {
        return k * round_bytes() + size_t(t) * tile;
    }
    // Bytes of tile t of round k in a slice of `length` bytes.
    __device__ __forceinline__ uint32_t bytes(uint32_t k, uint32_t t, size_t length) const {
        const size_t at = begin(k, t);
        return at >= length ? 0 : uint32_t(min(size_t(tile), length - at));
    }
};

// The flag of (tile, parity of the round): of arrivals in the columns of the sources, of the finished sum in the rank's
// own.
__device__ __forceinline__ uint32_t* tile_flag(const Link& link, int owner, uint32_t k, uint32_t t, int src) {
    return flag(link, owner, t * kTileBuffers + k % kTileBuffers, kChunk, src);
}
__device__ __forceinline__ uint32_t* credit_flag(const Link& link, int owner, uint32_t k, int src) {
    return flag(link, owner, k % kTileBuffers, kToken, src);
}
template <int kWorld>
__device__ __forceinline__ char* tile_buffer(const Link& link, int owner, uint32_t k, uint32_t t, int src,
                                             const TileCut& cut) {
    return link.scratch[owner] + kFlagBytes + (size_t(k % kTileBuffers) * kWorld + src) * cut.round_bytes() +
           size_t(t) * cut.tile;
}

// What one thread of a CTA hands on to another in shared memory, so that it need not wait for a fence itself: beside a
// busy copy unit a fence takes about 4 us, and holds the unit up. So fences are few: one for all that was published.
struct Handoff {
    static constexpr uint32_t kRoom = 32;
    uint2 entries[kRoom];
    uint32_t added;  // the poster's own
    uint32_t published, taken, closed;

    __device__ __forceinline__ static uint32_t read(const uint32_t* word) {
        uint32_t v;
        asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(Bulk::shared(word)) : "memory");
        return v;
    }
    __device__ __forceinline__ static void write(uint32_t* word, uint32_t v) {
        asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(Bulk::shared(word)), "r"(v) : "memory");
    }
    __device__ __forceinline__ void init() { added = published = taken = closed = 0; }
    __device__ __forceinline__ void add(uint32_t x, uint32_t y) {
        if (added - read(&taken) == kRoom) {
            publish();
            while (added - read(&taken) == kRoom) __nanosleep(100);
        }
        entries[added % kRoom] = make_uint2(x, y);
        added++;
    }
    __device__ __forceinline__ void publish() { write(&published, added); }
    __device__ __forceinline__ void close() {
        publish();
        write(&closed, 1);
    }
    // Until the queue has been closed and is empty, which it will be because the poster ends: `before` once for all
    // that has come together, then `each`.
    template <class Before, class Each>
    __device__ __forceinline__ void serve(Before before, Each each) {
        for (uint32_t n = 0;;) {
            const bool last = read(&closed) != 0;
            const uint32_t end = read(&published);
            if (n != end) {
                before();
                for (; n != end; n++) each(entries[n % kRoom].x, entries[n % kRoom].y);
                write(&taken, n);
            } else if (last) {
                return;
            } else {
                __nanosleep(50);
            }
        }
    }
};

// `kGatherToo`: an all-reduce, else a reduce-scatter. `data` cuts `send` into slices; `to(r)` is where slice
// `link.rank` lies in rank r's result; `align` divides all addresses and strides. CTAs of at least four warps.
template <class T, int kWorld, bool kGatherToo, class To>
__device__ __forceinline__ void reduce_in_steps(const Link& link, const char* send, const Slices<4>& data, To to,
                                                uint32_t align, uint32_t tile, uint32_t tiles) {
    using Data = Words<4>;
    __shared__ __align__(128) char memory[TileStages::kBytes];
    __shared__ uint64_t full[kCopyStages];
    __shared__ Handoff sent, summed;
    if (threadIdx.x == 0) {
        TileStages::init(full);
        sent.init();
        summed.init();
    }
    const int rank = link.rank;
    auto length = [&](int s) {
        const size_t at = s * data.stride;
        return at >= data.total ? size_t(0) : min(data.stride, data.total - at);
    };
    const TileCut cut{min(data.stride, data.total), tile, tiles};
    const uint32_t rounds = cut.rounds();
    Waiter waiter;
    // Neither the rounds' numbers nor the steps' run past what the kernel claims.
    const uint32_t first = claim_rounds(link, (rounds + 2) * (kWorld - 1) + 1, waiter.gave_up);
    if (!meet<kWorld>(link, waiter, kEnter, first, false)) return;
    injected_stall(link);

    const uint32_t warp = threadIdx.x / 32;
    const bool leader = threadIdx.x % 32 == 0;
    // Every other CTA's mover is idle: with less under way a step ends more sharply.
    if (warp == 0 && blockIdx.x < (gridDim.x + 1) / 2) {
        // A mover's waits end after the reducers', which wait for the rank that is missing itself.
        Link patient = link;
        patient.timeout_ns = link.timeout_ns * 2;
        Mover<kWorld> mover{link, {memory, full, 0}, align, first, kSumPatience};
        // The last scattered tile, as long as its stores are not known to be written: its round, then its peer and
        // number. Its flag is raised with those of the step's other tiles, once the step is over: of the tiles of one
        // place in the slices, one arrives in each step, and only the last step's complete a sum.
        bool pending = false;
        uint2 tile_sent = make_uint2(0, 0);
        // Lane 0, when all but the last `groups` store groups may be waited for.
        auto settle = [&](uint32_t groups, bool publish) {
            if (pending) {
                Bulk::until_written(groups);
                sent.add(tile_sent.x, tile_sent.y);
                pending = false;
            }
            if (publish) sent.publish();
        };
        auto flush = [&] {
            if (leader) settle(0, true);
        };
        // False in all lanes when the wait was given up: the mover ends then.
        auto until = [&](const uint32_t* word, uint32_t round, int whose) {
            if (leader && !Flag::raised(word, round)) {
                flush();
                waiter.until_arrived(patient, round, [&] { return Flag::raised(word, round) ? 0u : 1u << whose; });
            }
            return __shfl_sync(0xffffffffu, int(waiter.gave_up), 0) == 0;
        };
        // A step of pass k has the tiles of round k to scatter, then those of round k - lag to gather.
        const uint32_t lag = min(rounds, 2u);
        auto scattered = [&](uint32_t k) { return k < rounds ? cut.tiles_of(k) : 0; };
        auto gathered = [&](uint32_t k) { return kGatherToo && k >= lag ? cut.tiles_of(k - lag) : 0; };
        const uint32_t passes = kGatherToo ? rounds + lag : rounds;
        uint32_t pass = 0, passed = 0;
        uint32_t credited = 0;  // bit r: rank r's credit for this pass has been seen
        uint32_t in_step = 0;
        bool step_over = false;
        for (uint32_t n = mover.to_all_lanes(mover.take()), next;; n = mover.to_all_lanes(next)) {
            uint32_t per_step = scattered(pass) + gathered(pass);
            while (pass < passes && n - passed >= per_step * (kWorld - 1)) {
                passed += per_step * (kWorld - 1);
                pass++;
                credited = 0;
                per_step = pass < passes ? scattered(pass) + gathered(pass) : 0;
            }
            if (pass >= passes) break;
            next = mover.take();
            const uint32_t s = (n - passed) / per_step, i = (n - passed) % per_step, step = pass * (kWorld - 1) + s;
            const int peer = wrapped<kWorld>(rank + 1 + int(s));
            if (leader) {
                mover.await_step(step);
                if (i == per_step - 1) mover.pass_on(step);
            }
            // The sums of the last round are waited for at once.
            step_over |= step != in_step || (pass + 1 == rounds && s == kWorld - 2);
            in_step = step;
            if (i < scattered(pass)) {
                const uint32_t bytes = cut.bytes(pass, i, length(peer));
                if (bytes == 0) continue;
                if (pass >= kTileBuffers && !(credited >> peer & 1)) {
                    if (!until(credit_flag(link, rank, pass, peer), first + pass - kTileBuffers, peer)) break;
                    credited |= 1u << peer;
                }
                mover.stages.move(tile_buffer<kWorld>(link, peer, pass, i, rank, cut),
                                  send + peer * data.stride + cut.begin(pass, i), bytes, align);
                __syncwarp();
                if (leader) {
                    settle(align < 16 ? 0 : mover.stages.groups(bytes), step_over);
                    pending = true;
                    tile_sent = make_uint2(pass, uint32_t(peer) << 16 | i);
                }
                step_over = false;
            } else {
                const uint32_t k = pass - lag, t = i - scattered(pass), bytes = cut.bytes(k, t, length(rank));
                if (bytes == 0) continue;
                if (!until(tile_flag(link, rank, k, t, rank), first + k, rank)) break;
                if (leader) fence_proxy();
                __syncwarp();  // all lanes read the sum, if it lies unaligned, and lane 0 alone has seen the flag
                const size_t at = cut.begin(k, t);
                mover.stages.move(to(peer) + at, to(rank) + at, bytes, align);
                __syncwarp();
                if (leader) settle(align < 16 ? 0 : mover.stages.groups(bytes), step_over);
                step_over = false;
            }
        }
        flush();
        Bulk::until_written<0>();
        if (leader) sent.close();
    } else if (warp == 0) {
        if (leader) sent.close();
    } else if (warp == 1) {
        if (leader)
            sent.serve([] { fence_system(); },
                       [&](uint32_t k, uint32_t tile_of) {
                           const int peer = tile_of >> 16;
                           Flag::raise(tile_flag(link, peer, k, tile_of & 0xffff, rank), first + k);
                       });
    } else if (warp == 2) {
        if (leader)
            summed.serve([] { __threadfence(); },
                         [&](uint32_t k, uint32_t t) {
                             if (kGatherToo) Flag::raise(tile_flag(link, rank, k, t, rank), first + k);
                             uint32_t* const count = &link.channel->reduced[k % kTileBuffers];
                             if (atomicAdd(count, 1u) != cut.tiles_of(k, length(rank)) - 1) return;
                             *count = 0;
                             fence_system();
                             for (int d = 1; d < kWorld; d++)
                                 Flag::raise(credit_flag(link, wrapped<kWorld>(rank + d), k, rank), first + k);
                         });
    } else {
        const uint32_t threads = blockDim.x - 96, thread = threadIdx.x - 96;
        // Whether a reducer has given up a wait: what it waited for must not be summed.
        auto any_gave_up = [&] {
            uint32_t any;
            __syncwarp();
            asm volatile(
                "{\n\t.reg .pred p, q;\n\tsetp.ne.u32 p, %1, 0;\n\tbar.red.or.pred q, 1, %2, p;\n\t"
                "selp.u32 %0, 1, 0, q;\n\t}"
                : "=r"(any)
                : "r"(uint32_t(waiter.gave_up)), "r"(threads)
                : "memory");
            return any != 0;
        };
        const size_t whole = moves_wide<4>(align) ? length(rank) / kPackBytes * kPackBytes : 0;
        bool stopped = false;
        for (uint32_t k = 0; k < rounds && !stopped; k++) {
            for (uint32_t t = blockIdx.x; t < cut.tiles_of(k); t += gridDim.x) {
                const uint32_t bytes = cut.bytes(k, t, length(rank));
                if (bytes == 0) continue;
                const size_t begin = cut.begin(k, t);
                if (thread < kWorld && int(thread) != rank) {
                    const uint32_t* word = tile_flag(link, rank, k, t, thread);
                    waiter.until_arrived(link, first + k,
                                         [&] { return Flag::raised(word, first + k) ? 0u : 1u << thread; });
                }
                stopped = any_gave_up();
                if (stopped) break;
                const char* const buffer = tile_buffer<kWorld>(link, rank, k, t, 0, cut);
                auto fetch = [&](uint32_t p, uint4 (&raw)[kWorld]) {
#pragma unroll
                    for (int s = 0; s < kWorld; s++)
                        raw[s] = load_pack(buffer + s * cut.round_bytes() + p * kPackBytes);
                };
                auto sum = [&](const uint4 (&raw)[kWorld], const Data& own) {
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
                const char* const mine = send + rank * data.stride + begin;
                char* const out = to(rank) + begin;
                const uint32_t packs = (bytes + kPackBytes - 1) / kPackBytes;
                const uint32_t wide = begin < whole ? uint32_t(min(size_t(packs), (whole - begin) / kPackBytes)) : 0;
                uint4 raw[2][kWorld];
                // Two packs at a time: all loads before the first use.
                for (uint32_t p = thread; p < wide; p += 2 * threads) {
                    const uint32_t q = p + threads;
                    const Data own = read_wide<4>(mine + p * kPackBytes);
                    fetch(p, raw[0]);
                    if (q < wide) {
                        const Data other = read_wide<4>(mine + q * kPackBytes);
                        fetch(q, raw[1]);
                        write_wide(out + p * kPackBytes, sum(raw[0], own));
                        write_wide(out + q * kPackBytes, sum(raw[1], other));
                    } else {
                        write_wide(out + p * kPackBytes, sum(raw[0], own));
                    }
                }
                for (uint32_t p = wide + thread; p < packs; p += threads) {
                    const uint32_t n = min(kPackBytes, bytes - p * kPackBytes);
                    const Data own = read_pack<sizeof(T), 4>(mine + p * kPackBytes, n, align);
                    fetch(p, raw[0]);
                    write_pack<sizeof(T)>(out + p * kPackBytes, sum(raw[0], own), n, align);
                }
                if (kGatherToo) fence_proxy();
                any_gave_up();  // for the barrier in it
                if (thread == 0) {
                    summed.add(k, t);
                    if (kGatherToo) summed.publish();
                }
            }
            if (thread == 0) summed.publish();
        }
        if (thread == 0) summed.close();
    }
    __syncwarp();
    meet<kWorld>(link, waiter, kExit, first + rounds, true);
    leave_queue(link);
}

// `recv.at[r]`: rank r's result, as mapped here.
template <class T, int kWorld>
__device__ __forceinline__ void all_reduce_steps(const Link& link, const T* send, const Peers& recv, size_t count,
                                                 uint32_t tile, uint32_t tiles) {
    allow_successor();
    wait_for_predecessor();
    const auto cut = Slices<4>::cut(count * sizeof(T), kWorld);
    uint64_t bits = address(send);
#pragma unroll
    for (int r = 0; r < kWorld; r++) bits |= address(recv.at[r]);
    reduce_in_steps<T, kWorld, true>(
        link, reinterpret_cast<const char*>(send), cut, [&](int r) { return recv.at[r] + link.rank * cut.stride; },
        common_alignment(bits), tile, tiles);
}

// `count`: elements each rank receives. In place (`recv == send + rank * count`) is allowed.
template <class T, int kWorld>
__device__ __forceinline__ void reduce_scatter_steps(const Link& link, const T* send, T* recv, size_t count,
                                                     uint32_t tile, uint32_t tiles) {
    allow_successor();
    wait_for_predecessor();
    const size_t stride = count * sizeof(T);
    reduce_in_steps<T, kWorld, false>(
        link, reinterpret_cast<const char*>(send), Slices<4>{stride, stride * kWorld},
        [&](int) { return reinterpret_cast<char*>(recv); }, common_alignment(address(send) | address(recv) | stride),
        tile, tiles);
}

}  // namespace p2p
