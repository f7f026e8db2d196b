// Collectives for the largest buffers: all ranks store to one peer at a time, in step, tile by tile.
//
// Owns: the queue of tiles, the steps, and the all-gathers. Sums in steps are step_sums.cuh's. Against warps dealt out
// over all peers (cells.cuh, gather.cuh) steps keep the senders out of each other's way: a GPU that receives from one
// GPU at a time is stored to at 365 GB/s, from all at once at 348 (8 H200, NVLink through a switch).
//
// # Queue and steps
// In step s (1 <= s < world) rank r stores to rank r + s only. Warp 0 of a CTA is a mover: it takes the next tile of
// the rank's queue, a counter in device memory, and copies it by the bulk copy unit. The queue makes a step end
// everywhere on a GPU at once; tiles dealt out in advance do not, because multiprocessors are not equally fast, and
// ranks whose steps blur are worse off than ranks without steps.
//
// The mover that takes a step's last tile tells the rank that has this rank's target next. Movers wait for that word
// before a step's first tile, but only for as long as it is worth it: the steps are for speed, nothing rests on them.
//
// # Why the results may be written and read
// All ranks meet at the start: a peer's buffer may be written once that peer has entered. They meet at the end, behind
// the movers' waits for their stores: a rank leaves once everybody's stores to it are visible.
#pragma once
#include "bulk.cuh"
#include "meet.cuh"

namespace p2p {

// A tile is at most as long as a mover's stages together.
using TileStages = Stages<8192>;
// A mover's patience with a step that does not open, in polls of about 0.7 us: where it only moves, and where others
// wait for what it has sent.
constexpr uint32_t kGatherPatience = 64;
constexpr uint32_t kSumPatience = 16;
// Step words in use at a time. They lie behind the two that step_sums.cuh uses for credits.
constexpr uint32_t kStepWords = 32;
constexpr uint32_t kFirstStepWord = 2;

__device__ __forceinline__ uint32_t* step_flag(const Link& link, int owner, uint32_t step, int src) {
    return flag(link, owner, kFirstStepWord + step % kStepWords, kToken, src);
}

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
    __syncwarp();
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
    __syncwarp();
    meet<kWorld>(link, waiter, kExit, first, true);
}

}  // namespace p2p
