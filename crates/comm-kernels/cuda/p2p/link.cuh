// What every peer-to-peer kernel knows about its communicator, and the layout of the memory the ranks share.
//
// Owns: the parameter block, the scratch layout, the claim of round numbers. Never waits for a peer (wait.cuh does) and
// never touches payload (wire.cuh does).
//
// # Scratch
// Every rank owns one scratch allocation that all ranks have mapped, of `scratch_bytes(world, slot_packs)` bytes:
//
//     [ flags:   kFlagCtas x kFlagKinds x kMaxRanks 32-bit words, one line per (CTA, kind)            ]
//     [ packs:   4 buffers x 2 stages x world sources x slot_packs x 16 bytes                        ]
//
// A channel is one scratch area with its `Channel` block. For data a communicator has four: for Lamport packs, for packets
// (whose flags the direct gathers use too), for lines, which have one stage (lines.cuh), and for cells, which has cells in
// place of packs (cells.cuh). They are kept apart because each tells "not arrived" from "arrived" by its own mark, which
// the others' data could forge. All ranks run the same ops on a channel in the same order. Before first use, each rank
// sets its own areas: flags to `first_round - 1`, Lamport packs to 0xff bytes, packets and lines of buffer b to the 32-bit
// pattern ~b, and then all ranks meet on the host.
//
// # Rounds
// A round is one use of a buffer; round r uses buffer r mod 4. The number lives in device memory, so that a replayed
// graph goes on counting, and is only ever compared for equality or by signed difference: it may start anywhere and
// wraps at 2^32, where the buffer order stays intact because 4 divides 2^32, and no flag is ever 2^31 rounds old
// (lift_flag). Slots lie at a fixed stride, whatever the
// message's size, so that ops of different sizes never reinterpret each other's packs.
#pragma once
#include <cstddef>
#include <cstdint>

namespace p2p {

constexpr int kMaxRanks = 8;
constexpr uint32_t kBuffers = 4;
constexpr uint32_t kStages = 2;
constexpr uint32_t kPackBytes = 16;
constexpr uint32_t kFlagCtas = 512;
constexpr uint32_t kFlagKinds = 4;
constexpr size_t kFlagBytes = size_t(kFlagCtas) * kFlagKinds * kMaxRanks * sizeof(uint32_t);

// The two hops of a two-shot op. A one-shot op uses the first only.
enum Stage : uint32_t { kScatter = 0, kGather = 1 };

// Device memory of one rank, touched by that rank alone. Zero at creation, except `round`.
struct Channel {
    uint32_t round;    // the next round to use
    uint32_t arrived;  // CTAs of the running kernel that have read `round`
    uint32_t unused;
    uint32_t looked;   // when the abort word was last read, in units of 1024 ns
    // Of kernels in steps (steps.cuh), zero between kernels.
    uint32_t ticket;      // the next tile of the queue
    uint32_t left;        // CTAs of the running kernel that are through
    uint32_t reduced[2];  // tiles of an even and of an odd round that have been summed
};

// Whether kernels still wait and send. The host hushes a rank that has failed for another reason than a wait of its own:
// kernels that start later send nothing, while copies behind waits that ended well still deliver what had come.
enum Broken : uint32_t { kWhole = 0, kBroken = 1, kHushed = 2 };

enum GaveUp : uint32_t { kTimedOut = 1, kAborted = 2 };

// Host-mapped memory. Written once, by the first wait that is given up; `cause` is written last.
struct ErrorRecord {
    uint32_t cause;    // 0 while all is well, else a GaveUp
    uint32_t op;       // Link::op
    uint32_t round;    // the round that did not complete
    uint32_t missing;  // bit r: data of rank r had not arrived
    uint64_t waited_ns;
};

// Passed to every kernel by value, as a __grid_constant__ parameter.
struct Link {
    char* scratch[kMaxRanks];  // every rank's area as mapped on this device; entries from `world` on are unused
    Channel* channel;
    uint32_t* broken;       // device memory, one for all channels of a communicator: a Broken
    const uint32_t* abort;  // host-mapped word; nonzero ends all waits
    ErrorRecord* error;
    uint64_t timeout_ns;  // longest single wait
    uint64_t stall_ns;    // tests only: how long each CTA is late (injected_stall)
    uint32_t rank;
    uint32_t slot_packs;  // packs that one source may have in one (buffer, stage)
    uint32_t op;          // the host's sequence number for this kernel; goes into the error record only
    uint32_t reserved;
};

__host__ __device__ constexpr size_t scratch_bytes(uint32_t world, uint32_t slot_packs) {
    return kFlagBytes + size_t(kBuffers) * kStages * world * slot_packs * kPackBytes;
}

// Where pack `pack` from rank `src` lies in the area of rank `owner`.
template <int kWorld>
__device__ __forceinline__ char* slot(const Link& link, int owner, uint32_t round, Stage stage, int src, size_t pack) {
    const size_t row = (size_t(round % kBuffers) * kStages + stage) * kWorld + src;
    return link.scratch[owner] + kFlagBytes + (row * link.slot_packs + pack) * kPackBytes;
}

// The flag that rank `src` sets in the area of rank `owner` for CTA `cta`.
__device__ __forceinline__ uint32_t* flag(const Link& link, int owner, uint32_t cta, uint32_t kind, int src) {
    return reinterpret_cast<uint32_t*>(link.scratch[owner]) + (cta * kFlagKinds + kind) * kMaxRanks + src;
}

// Lets the next kernel of the stream be made resident while this one still runs. It does not touch memory before its
// own `wait_for_predecessor`, so this is safe at any point.
__device__ __forceinline__ void allow_successor() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Returns once the stream's earlier kernels have completed and their writes are visible. All synchronisation arguments
// in these files that say "the kernel has ended" rest on it.
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// How far a flag may be ahead of a wait for it. Ranks are never further apart than a few rounds, unless a kernel says
// otherwise; a flag that was last raised long ago, because other kernels or larger grids used the channel since, must not
// count as raised when the distance wraps.
constexpr uint32_t kAhead = 1024;
// Flags that were last raised more than so many rounds ago are lifted to that distance, often enough that none ever is 2^31
// rounds old: it would come to stand ahead of the rounds, and count as raised, when those have gone once round 2^32. More
// than any kernel takes rounds, so that a lifted flag is no round's that a running kernel may wait for.
constexpr uint32_t kLiftedBehind = 1u << 20;

// Lifts flag `i` of this rank's. Beside running kernels: a peer that raises the flag meanwhile is not undone.
__device__ __forceinline__ void lift_flag(const Link& link, uint32_t i) {
    uint32_t* const at = reinterpret_cast<uint32_t*>(link.scratch[link.rank]) + i;
    const uint32_t past = *reinterpret_cast<volatile uint32_t*>(&link.channel->round) - kLiftedBehind;
    const uint32_t seen = *reinterpret_cast<volatile uint32_t*>(at);
    if (int32_t(seen - past) < 0) atomicCAS_system(at, seen, past);
}

// Claims `rounds` rounds for this kernel and returns the first. Called once by all threads of all CTAs. `silent` becomes
// true if this rank has given up a wait before (see wait.cuh): for each thread by what it saw, as a barrier that had to
// know it would keep the kernel's first loads waiting.
//
// Every CTA reads the counter and then counts itself; the last to count advances it. Nobody can read the new value in
// this kernel, as all have read by then, and the next kernel starts reading after this one has ended. One counter for
// all CTAs keeps kernels of different grid sizes in step.
__device__ __forceinline__ uint32_t claim_rounds_by_thread(const Link& link, uint32_t rounds, bool& silent) {
    const uint32_t round = *reinterpret_cast<volatile uint32_t*>(&link.channel->round);
    silent = *reinterpret_cast<volatile uint32_t*>(link.broken) != kWhole;
    __syncthreads();
    if (threadIdx.x == 0) {
        const bool last = gridDim.x == 1 || atomicAdd(&link.channel->arrived, 1u) == gridDim.x - 1;
        if (last) {
            link.channel->arrived = 0;
            link.channel->round = round + rounds;
        }
        // What is not waited for must not be copied either (kHushed). Behind the count, which must not wait for the load.
        if (silent) *reinterpret_cast<volatile uint32_t*>(link.broken) = kBroken;
    }
    return round;
}

// The same with one `silent` for the whole CTA.
__device__ __forceinline__ uint32_t claim_rounds(const Link& link, uint32_t rounds, bool& silent) {
    const uint32_t round = claim_rounds_by_thread(link, rounds, silent);
    silent = __syncthreads_or(silent);
    return round;
}

}  // namespace p2p
