// Copies by the multiprocessor's bulk copy unit: global to shared to (remote) global memory, without registers.
//
// Owns: the instructions of cp.async.bulk and the stages that a warp moves a tile through. Never waits for a peer.
//
// # Ordering
// What a bulk store has written is visible to the thread that waits for its group (`until_written`); from there the
// usual release and acquire carry it on. What ordinary stores wrote must pass a proxy fence, on the writer's side and
// on the reader's, before a bulk load may read it.
#pragma once
#include "numeric.cuh"

namespace p2p {

constexpr uint32_t kCopyStages = 4;

struct Bulk {
    __device__ __forceinline__ static uint32_t shared(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

    // Starts a load of `bytes` bytes, a multiple of 16; all addresses too. `full` completes its phase with the last.
    __device__ __forceinline__ static void load(char* to, const char* from, uint32_t bytes, uint64_t* full) {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared(full)), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared(to)),
                     "l"(from), "r"(bytes), "r"(shared(full))
                     : "memory");
    }
    // Waits for a load of this CTA, never for a peer.
    __device__ __forceinline__ static void await(uint64_t* full, uint32_t parity) {
        uint32_t done = 0;
        while (done == 0)
            asm volatile(
                "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
                : "=r"(done)
                : "r"(shared(full)), "r"(parity)
                : "memory");
    }
    __device__ __forceinline__ static void store(char* to, const char* from, uint32_t bytes) {
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared(from)),
                     "r"(bytes)
                     : "memory");
    }
    __device__ __forceinline__ static void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
    // Until all but the last `kLeft` groups have been read from shared memory, or written.
    template <int kLeft>
    __device__ __forceinline__ static void until_read() {
        asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
    }
    template <int kLeft>
    __device__ __forceinline__ static void until_written() {
        asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLeft) : "memory");
    }
    // The instruction takes constants only.
    __device__ __forceinline__ static void until_written(uint32_t left) {
        if (left == 0) until_written<0>();
        if (left == 1) until_written<1>();
        if (left == 2) until_written<2>();
        if (left == 3) until_written<3>();
        if (left >= 4) until_written<4>();
    }
};

// Orders ordinary accesses and those of the bulk copy unit.
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Copies `bytes` bytes with one warp; `align` divides all addresses.
__device__ __forceinline__ void copy_by_words(char* to, const char* from, uint32_t bytes, uint32_t align, char* too) {
    constexpr uint32_t kAtOnce = 8;
    const uint32_t lane = threadIdx.x % 32;
    for (uint32_t begin = 0; begin < bytes; begin += 32 * 4 * kAtOnce) {
        Words<1> v[kAtOnce];
#pragma unroll
        for (uint32_t u = 0; u < kAtOnce; u++) {
            const uint32_t at = begin + (u * 32 + lane) * 4;
            if (at < bytes) v[u] = read_pack<1, 1>(from + at, min(4u, bytes - at), align);
        }
#pragma unroll
        for (uint32_t u = 0; u < kAtOnce; u++) {
            const uint32_t at = begin + (u * 32 + lane) * 4;
            if (at >= bytes) continue;
            write_pack<1>(to + at, v[u], min(4u, bytes - at), align);
            if (too != nullptr) write_pack<1>(too + at, v[u], min(4u, bytes - at), align);
        }
    }
}

// One warp's way through shared memory. `memory`: kCopyStages * kStageBytes bytes, aligned to 128; `full`: kCopyStages
// words.
//
// Piece n of the warp's life goes through stage n mod 4, as a store group of its own. Its load overwrites piece n - 4:
// at the two places where a load starts, at most three younger pieces have been committed, of which two may be unread.
template <uint32_t kStageBytes>
struct Stages {
    static constexpr uint32_t kBytes = kCopyStages * kStageBytes;
    char* memory;
    uint64_t* full;
    uint32_t next;

    // By one thread; a CTA barrier before first use.
    __device__ __forceinline__ static void init(uint64_t* full) {
        for (uint32_t i = 0; i < kCopyStages; i++)
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(Bulk::shared(full + i)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }

    // Store groups of an aligned `move` of `bytes` bytes.
    __device__ __forceinline__ static uint32_t groups(uint32_t bytes) {
        return (bytes / 16 * 16 + kStageBytes - 1) / kStageBytes;
    }

    __device__ __forceinline__ void load(uint32_t piece, const char* from, uint32_t bytes) {
        Bulk::load(memory + piece % kCopyStages * kStageBytes, from, bytes, full + piece % kCopyStages);
    }

    // Starts copying `bytes` bytes, by a whole warp, to `too` as well unless it is null; `align` divides all addresses.
    // The last pieces' stores are still under way on return. Bytes past the last whole 16, and everything of lesser
    // alignment, go by ordinary accesses.
    __device__ __forceinline__ void move(char* to, const char* from, uint32_t bytes, uint32_t align,
                                         char* too = nullptr) {
        if (align < 16) {
            copy_by_words(to, from, bytes, align, too);
            return;
        }
        if (threadIdx.x % 32 != 0) return;
        const uint32_t whole = bytes / 16 * 16, pieces = groups(bytes);
        auto length = [&](uint32_t i) { return min(kStageBytes, whole - i * kStageBytes); };
        Bulk::until_read<2>();
        if (pieces > 0) load(next, from, length(0));
        if (pieces > 1) load(next + 1, from + kStageBytes, length(1));
        for (uint32_t i = 0; i < pieces; i++, next++) {
            const char* const stage = memory + next % kCopyStages * kStageBytes;
            Bulk::await(full + next % kCopyStages, next / kCopyStages & 1);
            Bulk::store(to + i * kStageBytes, stage, length(i));
            if (too != nullptr) Bulk::store(too + i * kStageBytes, stage, length(i));
            Bulk::commit();
            if (i + 2 < pieces) {
                Bulk::until_read<2>();
                load(next + 2, from + (i + 2) * kStageBytes, length(i + 2));
            }
        }
        if (whole == bytes) return;
        const Words<4> v = read_pack<1, 4>(from + whole, bytes - whole, 16);
        write_pack<1>(to + whole, v, bytes - whole, 16);
        if (too != nullptr) write_pack<1>(too + whole, v, bytes - whole, 16);
    }

    // Copies the pieces `stream`, `stream + streams`, ... of the `bytes` bytes at `from` to `to(0)` to `to(kWorld - 1)`
    // unless null, by a whole warp: each piece is read once. Successive pieces start with different destinations.
    template <int kWorld, class To>
    __device__ __forceinline__ void spread(size_t bytes, size_t stream, size_t streams, uint32_t align,
                                           const char* from, To to) {
        const size_t pieces = (bytes + kStageBytes - 1) / kStageBytes;
        auto length = [&](size_t piece) { return uint32_t(min(size_t(kStageBytes), bytes - piece * kStageBytes)); };
        auto to_all = [&](size_t piece, auto store) {
            int d = int(piece % kWorld);
            for (int i = 0; i < kWorld; i++, d = d + 1 == kWorld ? 0 : d + 1)
                if (char* const at = to(d); at != nullptr) store(at + piece * kStageBytes);
        };
        // The last piece's odd end, and everything of lesser alignment.
        const size_t whole = align < 16 ? 0 : bytes / 16 * 16 / kStageBytes;
        for (size_t piece = stream; piece < pieces; piece += streams)
            if (piece >= whole)
                to_all(piece, [&](char* at) {
                    copy_by_words(at, from + piece * kStageBytes, length(piece), align, nullptr);
                });
        if (threadIdx.x % 32 != 0 || stream >= whole) return;
        const uint32_t count = uint32_t((whole - stream + streams - 1) / streams);
        auto fetch = [&](uint32_t i) { load(i, from + (stream + i * streams) * kStageBytes, kStageBytes); };
        fetch(0);
        if (count > 1) fetch(1);
        for (uint32_t i = 0; i < count; i++) {
            if (i + 2 < count) {
                Bulk::until_read<1>();
                fetch(i + 2);
            }
            Bulk::await(full + i % kCopyStages, i / kCopyStages & 1);
            to_all(stream + i * streams,
                   [&](char* at) { Bulk::store(at, memory + i % kCopyStages * kStageBytes, kStageBytes); });
            Bulk::commit();
        }
    }
};

}  // namespace p2p
