// Large operations captured into a graph before the ranks knew each other's result buffers.
//
// Owns: the table entry through which a replay learns where those lie, and the choice between the two ways. Never moves
// payload itself: the schedules are those of the uncaptured kernels.
//
// # Why an entry may be read without synchronisation
// The host writes an entry when no replay that reads it runs: before the first one it is allowed (the call that fills
// it precedes the launch), and after the last one (the graph, and with it every launch under way, is gone). A replay
// that comes too early finds the entry unset, or being filled, and leaves an error record. All ranks fill an entry
// with the same way, so their kernels exchange by the same schedule.
#pragma once
#include "cells.cuh"
#include "gather.cuh"
#include "reduce.cuh"

namespace p2p {

// How the ranks' result buffers are reached. Zero memory is unset.
enum CapturedWay : uint32_t { kUnset = 0, kMapped = 1, kScratch = 2 };

// Beside GaveUp: a graph was replayed before its operands were registered.
constexpr uint32_t kUnregistered = 3;

// Device memory of one rank, a line of the L2 cache each.
struct CapturedEntry {
    Peers recv;  // every rank's result buffer as mapped here, if `way` is kMapped
    uint32_t way;
    uint32_t reserved[15];
};
static_assert(sizeof(CapturedEntry) == 128, "what the host writes");

// Copies the entry's addresses to `recv`, in shared memory, and returns its way: the same for all threads of the block. A
// replay that comes too early may meet the host's copy halfway: an entry with addresses missing counts as unset.
template <int kWorld>
__device__ __forceinline__ uint32_t look_up(const Link& link, const CapturedEntry* entry, Peers& recv) {
    __shared__ uint32_t found;
    if (threadIdx.x < kMaxRanks) recv.at[threadIdx.x] = entry->recv.at[threadIdx.x];
    if (threadIdx.x == 0) found = entry->way;
    __syncthreads();
    uint32_t way = found;
    for (int r = 0; r < kWorld; r++)
        if (way == kMapped && recv.at[r] == nullptr) way = kUnset;
    if (way != kMapped && way != kScratch) {
        // The successor must not overtake what runs before this kernel.
        allow_successor();
        wait_for_predecessor();
        if (blockIdx.x == 0 && threadIdx.x == 0 && atomicExch(link.broken, uint32_t(kBroken)) == kWhole) {
            volatile ErrorRecord* error = link.error;
            error->op = link.op;
            error->round = 0;
            error->missing = 0;
            error->waited_ns = 0;
            __threadfence_system();
            error->cause = kUnregistered;
        }
    }
    return way;
}

// `recv` is this rank's own result, which an entry with kScratch does not name.
template <class T, int kWorld, int kUnits>
__device__ __forceinline__ void all_reduce_captured(const Link& cells, const Link& lamport, const T* send, T* recv,
                                                    size_t count, const CapturedEntry* entry) {
    __shared__ Peers peers;
    const uint32_t way = look_up<kWorld>(cells, entry, peers);
    if (way == kMapped) all_reduce_cells<T, kWorld, kUnits>(cells, send, peers, count);
    if (way == kScratch) all_reduce_two_shot<T, kWorld, Lamport>(lamport, send, recv, count);
}

template <int kWorld>
__device__ __forceinline__ void all_gather_captured(const Link& link, const char* send, char* recv, size_t bytes,
                                                    uint32_t chunk, const CapturedEntry* entry) {
    __shared__ Peers peers;
    const uint32_t way = look_up<kWorld>(link, entry, peers);
    if (way == kMapped) all_gather_direct<kWorld>(link, send, peers, bytes, chunk);
    if (way == kScratch) all_gather_packets<kWorld>(link, send, recv, bytes);
}

}  // namespace p2p
