// Collectives for the largest buffers: all ranks store to one peer at a time, in step, tile by tile.
//
// Owns: the queue of tiles, the steps, and the three schedules on them. Against warps dealt out over all peers
// (cells.cuh, gather.cuh) this keeps the senders out of each other's way: a GPU that receives from one GPU at a time is
// stored to at 365 GB/s, from all at once at 348 (8 H200, NVLink through a switch).
//
// # Movers and reducers
// Warp 0 of every CTA is a mover: it takes the next tile of the rank's queue (a counter in device memory) and copies it
// by the bulk copy unit. In a reducing kernel, the warps from 3 on sum tiles that have arrived. Warp 1 raises the flags of
// what the mover has sent, warp 2 those of what has been summed: a release beside a busy copy unit is slow, and neither
// the mover nor the reducers shall wait for one.
//
// # Queue and steps
// The buffer is cut into one slice per rank, a slice into rounds of `tiles` tiles. In step s of a pass (1 <= s < world)
// rank r stores to rank r + s only: first the tiles of round k of slice r + s, for that rank to sum ("scatter"), then
// the tiles of round k - 1 of its own slice, summed ("gather"). The mover that takes a step's last tile tells the rank
// that has this rank's target next. Movers wait for that word before a step's first tile, but only for as long as it
// is worth it: the steps are for speed, nothing rests on them.
//
// # Why nothing is overwritten early or read too soon
// All ranks meet at the start: whatever ran before, on this channel too, has ended everywhere, so all tile buffers and
// results may be written. They meet at the end: everything sent has been received and summed.
// - A scattered tile's flag is raised behind the wait for its stores. There is a flag per tile, source and parity of
//   the round, so a flag of round k + 2 cannot stand in for one of round k that a slower mover still holds.
// - Round k + 2 goes to the buffers of round k. It is sent to a rank after that rank's credit for round k: raised by the
//   CTA that counted the round's last tile as summed, and so ordered behind all reads of the round.
// - A summed tile is gathered after its own flag, on this rank, behind proxy fences: the sum was written by ordinary
//   stores and is read by the bulk copy unit.
// - In place: a rank overwrites its own slice of a tile after reading it. Others' sums of a tile overwrite this rank's
//   input after this rank has sent it: they were made from it.
// - A reducer that gives up a wait ends its CTA's sums and a mover that does ends too: what depends on the wait is never
//   sent, and the meeting at the end is not reached.
// - Movers wait for reducers and reducers for other ranks' movers, each only for tiles that stand earlier in every
//   queue; so somebody can always go on.
//
// # Same bits everywhere
// Each element is summed by one rank, in fp32, in rank order, and rounded once.
#pragma once
#include "bulk.cuh"
#include "meet.cuh"

namespace p2p {

constexpr uint32_t kTileBuffers = 2;
// A tile is at most as long as a mover's stages together.
using TileStages = Stages<8192>;
// A mover's patience with a step that does not open, in polls of about 0.7 us: where it only moves, and where others
// wait for what it has sent.
constexpr uint32_t kGatherPatience = 64;
constexpr uint32_t kReducePatience = 16;
// Step words in use at a time.
constexpr uint32_t kStepWords = 32;

// What a rank has to move: `rounds` rounds of up to `tiles` tiles of `tile` bytes, of slices of up to `slice` bytes.
struct TileCut {
    size_t slice;
    uint32_t tile, tiles;

    __device__ __forceinline__ size_t round_bytes() const { return size_t(tiles) * tile; }
    __device__ __forceinline__ uint32_t rounds() const { return uint32_t((slice + round_bytes() - 1) / round_bytes()); }
    // Tiles of round k of the longest slice.
    __device__ __forceinline__ uint32_t tiles_of(uint32_t k) const {
        const size_t left = slice - k * round_bytes();
        return left >= round_bytes() ? tiles : uint32_t((left + tile - 1) / tile);
    }
    __device__ __forceinline__ size_t begin(uint32_t k, uint32_t t) const { return k * round_bytes() + size_t(t) * tile; }
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
__device__ __forceinline__ uint32_t* step_flag(const Link& link, int owner, uint32_t step, int src) {
    return flag(link, owner, kTileBuffers + step % kStepWords, kToken, src);
}

template <int kWorld>
__device__ __forceinline__ char* tile_buffer(const Link& link, int owner, uint32_t k, uint32_t t, int src,
                                             const TileCut& cut) {
    return link.scratch[owner] + kFlagBytes + (size_t(k % kTileBuffers) * kWorld + src) * cut.round_bytes() +
           size_t(t) * cut.tile;
}

// Takes the place of a number that comes round: wraps `rank` once.
template <int kWorld>
__device__ __forceinline__ int wrapped(int rank) {
    return rank >= kWorld ? rank - kWorld : rank;
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

// Where the mover of a rank's queue stands, and its waits.
template <int kWorld>
struct Mover {
    const Link& link;
    TileStages stages;
    uint32_t align;
    uint32_t first;
    uint32_t patience;
    uint32_t step = 0;  // the last step that this mover has waited for

    // Lane 0's next place in the queue; the other lanes' values say nothing. Asked for a tile ahead, because it takes
    // as long as a poll.
    __device__ __forceinline__ uint32_t take() const {
        return threadIdx.x % 32 == 0 ? atomicAdd(&link.channel->ticket, 1u) : 0;
    }
    __device__ __forceinline__ static uint32_t to_all_lanes(uint32_t n) { return __shfl_sync(0xffffffffu, n, 0); }

    // Lane 0: before a tile of step `n`, counted from the kernel's start. The rank that had the target before is the
    // next one, or, at a pass's first step, the one after that.
    __device__ __forceinline__ void await_step(uint32_t n) {
        if (n == step || kWorld == 2) return;
        step = n;
        const int before = wrapped<kWorld>(int(link.rank) + (n % (kWorld - 1) == 0 ? 2 : 1));
        const uint32_t* word = step_flag(link, link.rank, n, before);
        for (uint32_t poll = 0; poll < patience && !Flag::raised(word, first + n); poll++) {
        }
    }
    // Lane 0, at the last tile of step `n`.
    __device__ __forceinline__ void pass_on(uint32_t n) const {
        if (kWorld == 2) return;
        const int after = int(link.rank) - ((n + 1) % (kWorld - 1) == 0 ? 2 : 1);
        Flag::raise(step_flag(link, after < 0 ? after + kWorld : after, n + 1, link.rank), first + n + 1);
    }
};

// The next kernel finds an empty queue. At the kernel's end, after a CTA barrier behind the last `take`.
__device__ __forceinline__ void leave_queue(const Link& link) {
    if (threadIdx.x != 0) return;
    if (atomicAdd(&link.channel->left, 1u) == gridDim.x - 1) {
        link.channel->left = 0;
        link.channel->ticket = 0;
    }
}

// Rank r's `bytes` bytes at `send` come to `recv.at[q] + r * bytes` on every rank q; in place is allowed. CTAs of one
// warp. `link`: any channel with flags.
template <int kWorld>
__device__ __forceinline__ void all_gather_steps(const Link& link, const char* send, const Peers& recv, size_t bytes,
                                                 uint32_t tile) {
    __shared__ __align__(128) char memory[TileStages::kBytes];
    __shared__ uint64_t full[kCopyStages];
    allow_successor();
    if (threadIdx.x == 0) TileStages::init(full);
    wait_for_predecessor();
    Waiter waiter;
    const uint32_t first = claim_rounds(link, kWorld, waiter.gave_up);
    if (!meet<kWorld>(link, waiter, kEnter, first, false)) return;
    injected_stall(link);
    uint64_t bits = address(send) | bytes;
#pragma unroll
    for (int r = 0; r < kWorld; r++) bits |= address(recv.at[r]);
    Mover<kWorld> mover{link, {memory, full, 0}, common_alignment(bits), first, kGatherPatience};
    const uint32_t tiles = uint32_t((bytes + tile - 1) / tile);
    char* const own = recv.at[link.rank] + link.rank * bytes;
    for (uint32_t n = mover.to_all_lanes(mover.take()), next; n < tiles * (kWorld - 1); n = mover.to_all_lanes(next)) {
        next = mover.take();
        const uint32_t step = n / tiles, t = n % tiles;
        if (threadIdx.x == 0) {
            mover.await_step(step);
            if (t == tiles - 1) mover.pass_on(step);
        }
        __syncwarp();
        const size_t at = size_t(t) * tile;
        mover.stages.move(recv.at[wrapped<kWorld>(int(link.rank) + 1 + step)] + link.rank * bytes + at, send + at,
                          uint32_t(min(size_t(tile), bytes - at)), mover.align,
                          step == 0 && own != send ? own + at : nullptr);
    }
    Bulk::until_written<0>();
    meet<kWorld>(link, waiter, kExit, first, true);
    leave_queue(link);
}

// The same for shorter buffers: not in steps, but every piece is read once and stored to all. CTAs of two warps.
template <int kWorld>
__device__ __forceinline__ void all_gather_spread(const Link& link, const char* send, const Peers& recv, size_t bytes) {
    using Pieces = Stages<4096>;
    __shared__ __align__(128) char memory[2][Pieces::kBytes];
    __shared__ uint64_t full[2][kCopyStages];
    allow_successor();
    const uint32_t warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) Pieces::init(full[warp]);
    wait_for_predecessor();
    Waiter waiter;
    const uint32_t first = claim_rounds(link, 1, waiter.gave_up);
    if (!meet<kWorld>(link, waiter, kEnter, first, false)) return;
    injected_stall(link);
    uint64_t bits = address(send) | bytes;
#pragma unroll
    for (int r = 0; r < kWorld; r++) bits |= address(recv.at[r]);
    const uint32_t align = common_alignment(bits);
    Pieces stages{memory[warp], full[warp], 0};
    char* const own = recv.at[link.rank] + link.rank * bytes;
    const size_t stream = size_t(warp) * gridDim.x + blockIdx.x, streams = size_t(gridDim.x) * 2;
    stages.spread<kWorld>(bytes, stream, streams, align, send, [&](int d) {
        const int to = wrapped<kWorld>(int(link.rank) + d);
        char* const at = recv.at[to] + link.rank * bytes;
        return d == 0 && own == send ? nullptr : at;
    });
    Bulk::until_written<0>();
    meet<kWorld>(link, waiter, kExit, first, true);
}

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
    // The steps' numbers must not run past what the kernel claims, nor the rounds'.
    Waiter waiter;
    const uint32_t first = claim_rounds(link, (rounds + 1) * (kWorld - 1) + 1, waiter.gave_up);
    if (!meet<kWorld>(link, waiter, kEnter, first, false)) return;
    injected_stall(link);

    const uint32_t warp = threadIdx.x / 32;
    const bool leader = threadIdx.x % 32 == 0;
    // Every other CTA's mover is idle: with less under way a step ends more sharply.
    if (warp == 0 && blockIdx.x < (gridDim.x + 1) / 2) {
        // A mover's waits end after the reducers', which wait for the rank that is missing itself.
        Link patient = link;
        patient.timeout_ns = link.timeout_ns * 2;
        Mover<kWorld> mover{link, {memory, full, 0}, align, first, kReducePatience};
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
        // A step of pass k has the tiles of round k to scatter, then those of round k - 1 to gather.
        auto scattered = [&](uint32_t k) { return k < rounds ? cut.tiles_of(k) : 0; };
        auto gathered = [&](uint32_t k) { return kGatherToo && k > 0 ? cut.tiles_of(k - 1) : 0; };
        const uint32_t passes = kGatherToo ? rounds + 1 : rounds;
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
                const uint32_t t = i - scattered(pass), bytes = cut.bytes(pass - 1, t, length(rank));
                if (bytes == 0) continue;
                if (!until(tile_flag(link, rank, pass - 1, t, rank), first + pass - 1, rank)) break;
                if (leader) fence_proxy();
                const size_t at = cut.begin(pass - 1, t);
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
                             if (atomicAdd(count, 1u) != cut.tiles_of(k) - 1) return;
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
                const size_t begin = cut.begin(k, t);
                if (thread < kWorld && int(thread) != rank && bytes != 0) {
                    const uint32_t* word = tile_flag(link, rank, k, t, thread);
                    waiter.until_arrived(link, first + k,
                                         [&] { return Flag::raised(word, first + k) ? 0u : 1u << thread; });
                }
                stopped = any_gave_up();
                if (stopped) break;
                const char* const buffer = tile_buffer<kWorld>(link, rank, k, t, 0, cut);
                auto fetch = [&](uint32_t p, uint4 (&raw)[kWorld]) {
#pragma unroll
                    for (int s = 0; s < kWorld; s++) raw[s] = load_pack(buffer + s * cut.round_bytes() + p * kPackBytes);
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
