// All-reduce by reading: every rank reads every rank's input and adds them up itself. The plainest way there is, kept as
// an independent check of the kernels that push.
//
// p2p_pull_<dtype>(link, send, recv, count, staging, world): `staging.at[r]` is at least `count` elements of rank r's
//     memory, aligned to 16 bytes, as mapped here, and free for this kernel.
//
// `link` is the packet channel's; its flags are used. Launch: one-dimensional, equal on all ranks, resident as a whole,
// at most kFlagCtas CTAs of 32 to 512 threads. `send` and `recv` are element-aligned, equal or disjoint; `count` is at
// least 1. May be launched with programmatic stream serialization.
//
// # Why it is safe
// CTA b of every rank has the same packs: b * blockDim + thread, and so on, a grid apart. It copies its packs of `send`
// to its rank's staging memory; a CTA barrier and a release store of its flag follow, and at the other ranks' CTAs b an
// acquiring load and a CTA barrier precede their reads: the copies are visible. It ends after the exit flags of all
// ranks' CTAs b, each raised behind a CTA barrier behind that CTA's reads, so that whoever writes the staging memory next
// overwrites nothing that is still to be read. In place: a thread reads its own packs from the staging memory as well.
#include "meet.cuh"
#include "numeric.cuh"

namespace p2p {

// `meet` for a number of ranks that is known at run time.
__device__ __forceinline__ bool meet_all(const Link& link, Waiter& waiter, uint32_t kind, uint32_t round,
                                         uint32_t world) {
    if (__syncthreads_or(waiter.gave_up)) return false;
    const uint32_t peer = threadIdx.x;
    if (peer < world && peer != link.rank) {
        Flag::raise_after_writes(flag(link, peer, blockIdx.x, kind, link.rank), round);
        const uint32_t* ours = flag(link, link.rank, blockIdx.x, kind, peer);
        waiter.until_arrived(link, round, [&] { return Flag::raised(ours, round) ? 0u : 1u << peer; });
    }
    return !__syncthreads_or(waiter.gave_up);
}

template <class T>
__device__ __forceinline__ void pull_all_reduce(const Link& link, const T* send, T* recv, size_t count,
                                                const Peers& staging, uint32_t world) {
    allow_successor();
    wait_for_predecessor();
    const char* const in = reinterpret_cast<const char*>(send);
    char* const out = reinterpret_cast<char*>(recv);
    const uint32_t align_in = common_alignment(address(in)), align_out = common_alignment(address(out));
    const Slices<4> cut{count * sizeof(T), count * sizeof(T)};
    const size_t packs = cut.packs();
    const size_t thread = size_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = size_t(gridDim.x) * blockDim.x;
    Waiter waiter;
    const uint32_t round = claim_rounds(link, 1, waiter.gave_up);
    if (waiter.gave_up) return;  // peers may still be reading the staging memory: silence covers it too
    for (size_t p = thread; p < packs; p += threads) {
        const uint32_t bytes = cut.bytes(0, p);
        write_pack<sizeof(T)>(staging.at[link.rank] + p * kPackBytes,
                              read_pack<sizeof(T), 4>(in + p * kPackBytes, bytes, align_in), bytes, 16);
    }
    injected_stall(link);
    if (!meet_all(link, waiter, kEnter, round, world)) return;
    for (size_t p = thread; p < packs; p += threads) {
        Accumulator<T, 4> acc;
        for (uint32_t s = 0; s < world; s++) {
            const Words<4> v = Lamport::payload(load_pack(staging.at[s] + p * kPackBytes));
            if (s == 0)
                acc.set(v);
            else
                acc.add(v);
        }
        write_pack<sizeof(T)>(out + p * kPackBytes, acc.rounded(), cut.bytes(0, p), align_out);
    }
    meet_all(link, waiter, kExit, round, world);
}

}  // namespace p2p

#define P2P_PULL(T, DTYPE)                                                                                   \
    extern "C" __global__ void __launch_bounds__(512)                                                        \
        p2p_pull_##DTYPE(const __grid_constant__ p2p::Link link, const T* send, T* recv, size_t count,       \
                         const __grid_constant__ p2p::Peers staging, uint32_t world) {                       \
        p2p::pull_all_reduce<T>(link, send, recv, count, staging, world);                                    \
    }

P2P_PULL(__nv_bfloat16, bf16)
P2P_PULL(__half, f16)
P2P_PULL(float, f32)
