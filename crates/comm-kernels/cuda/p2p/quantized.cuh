// The quantised all-reduce: two hops, pipelined over rounds, of fp8 elements and their scales.
//
// Owns: the layout of a row on the wire and the schedule. What is computed is comm-core's `quantize` module's
// definition, to the last bit; slots, marks and rounds are reduce.cuh's.
//
// # Rows
// The vector is cut into one slice per rank, a slice into rows of 512 elements: a warp's, 16 elements a lane, four
// groups of 128, eight lanes each. On the wire a row is 33 packs: each lane's 16 bytes, and one pack with the four
// scales. Warp w of a rank talks to the warps w of the others, through packs 33 w to 33 w + 32 of each source's row of
// slots.
//
// No data word is ever the Lamport mark, so nothing is replaced: a byte of it would be a negative NaN, and conversion
// to e4m3 makes positive ones only; a scale is positive or a NaN without sign, as it is made from a magnitude. A pack of
// scales is written as four words by four lanes; each word announces itself.
//
// # Why a slot is never overwritten before it was read and restored
// As argued in reduce.cuh, with warps for threads: there a thread learns from a peer's pack what that peer's thread has
// done; here a word of scales is written by another lane than the one that learns it, and restored by another lane than
// the one that tells. Warp barriers stand where a lane speaks or acts for the others: after each receipt, and on both
// sides of the fence at the head of an iteration. (Acquiring side: receipt, fence, warp barrier, another lane's store.
// Releasing side: restore, warp barrier, fence, another lane's store.)
//
// A slice may have fewer rows than another, by less than the number of ranks; where there are several rounds there are
// at least as many warps as ranks, so a warp may lack a row in its last round only, as reduce.cuh asks.
#pragma once
#include "../fp8.cuh"
#include "numeric.cuh"
#include "wait.cuh"

namespace p2p {

constexpr uint32_t kRowElems = 512;
constexpr uint32_t kRowPacks = 33;

__device__ __forceinline__ void store_word(char* to, uint32_t word) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}
__device__ __forceinline__ uint32_t load_word(const char* from) {
    uint32_t word;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
    return word;
}

template <class T, int kWorld>
struct QuantizedSum {
    static constexpr uint32_t kAll = 0xffffffffu;
    static constexpr int kElems = 16;
    static constexpr int kPieces = kElems * sizeof(T) / 16;
    static constexpr int kPerPiece = kElems / kPieces;
    // Peers whose elements are loaded before the first is converted, as far as registers go.
    static constexpr int kBatch = sizeof(T) == 2 ? kWorld - 1 : (kWorld - 1 < 3 ? kWorld - 1 : 3);

    struct Raw {
        Words<4> piece[kPieces];
    };

    const Link& link;
    const char* send;
    char* recv;
    size_t count;
    size_t slice;  // elements of a slice, whole rows
    uint32_t send_align, recv_align;
    uint32_t lane;
    size_t warp, warps;
    Waiter waiter;

    __device__ __forceinline__ static int wrapped(int rank) { return rank >= kWorld ? rank - kWorld : rank; }

    // The first element of a row.
    __device__ __forceinline__ size_t start(int s, size_t row) const { return s * slice + row * kRowElems; }
    __device__ __forceinline__ bool exists(int s, size_t row) const {
        return row * kRowElems < slice && start(s, row) < count;
    }
    // This lane's elements of a row.
    __device__ __forceinline__ size_t first_of_lane(int s, size_t row) const {
        return start(s, row) + lane * kElems;
    }
    __device__ __forceinline__ uint32_t bytes_from(size_t first) const {
        return first >= count ? 0 : uint32_t(min(count - first, size_t(kElems)) * sizeof(T));
    }

    // This lane's elements of a row; zeros past the end, which change neither scale nor sum.
    __device__ __forceinline__ Raw load(int s, size_t row) const {
        const size_t first = first_of_lane(s, row);
        const uint32_t bytes = bytes_from(first);
        const char* from = send + first * sizeof(T);
        Raw raw;
        if (bytes == kElems * sizeof(T) && send_align >= 16) {
#pragma unroll
            for (int i = 0; i < kPieces; i++) raw.piece[i] = read_wide<4>(from + 16 * i);
        } else {
#pragma unroll
            for (int i = 0; i < kPieces; i++)
                raw.piece[i] = bytes <= 16 * i ? Words<4>{}
                                               : read_pack<sizeof(T), 4>(from + 16 * i, min(bytes - 16 * i, 16u),
                                                                         send_align);
        }
        return raw;
    }
    __device__ __forceinline__ static void widen(const Raw& raw, float (&v)[kElems]) {
#pragma unroll
        for (int i = 0; i < kPieces; i++)
#pragma unroll
            for (int w = 0; w < 4; w++)
                Numeric<T>::unpack(raw.piece[i].w[w], v + i * kPerPiece + w * Numeric<T>::kPerWord);
    }
    // Rounds to the operands' type and writes this lane's elements of a row.
    __device__ __forceinline__ void write(int s, size_t row, const float (&v)[kElems]) const {
        const size_t first = first_of_lane(s, row);
        const uint32_t bytes = bytes_from(first);
        char* const to = recv + first * sizeof(T);
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            Words<4> out;
#pragma unroll
            for (int w = 0; w < 4; w++) out.w[w] = Numeric<T>::pack(v + i * kPerPiece + w * Numeric<T>::kPerWord);
            if (bytes > 16 * i)
                write_pack<sizeof(T)>(to + 16 * i, out, min(bytes - 16 * i, 16u), recv_align);
        }
    }

    // Quantises the warp's row: this lane's elements, and the scale of its group, the same in eight lanes.
    __device__ __forceinline__ Words<4> encode(const float (&v)[kElems], float& scale) const {
        uint32_t amax = 0;
#pragma unroll
        for (int i = 0; i < kElems; i++) amax = max(amax, fp8::magnitude(v[i]));
#pragma unroll
        for (int d = 1; d < 8; d *= 2) amax = max(amax, __shfl_xor_sync(kAll, amax, d));
        const fp8::Scale s = fp8::scale_of(amax);
        scale = s.scale;
        Words<4> q;
#pragma unroll
        for (int i = 0; i < 4; i++) q.w[i] = fp8::pack4(v + 4 * i, s.inverse);
        return q;
    }
    __device__ __forceinline__ static void decode(const Words<4>& q, float scale, float (&v)[kElems]) {
#pragma unroll
        for (int i = 0; i < 4; i++) fp8::unpack4(q.w[i], scale, v + 4 * i);
    }

    __device__ __forceinline__ char* pack_slot(int owner, uint32_t round, Stage stage, int src) const {
        return slot<kWorld>(link, owner, round, stage, src, warp * kRowPacks + lane);
    }
    // The word of this lane's group in the pack of scales.
    __device__ __forceinline__ char* scale_slot(int owner, uint32_t round, Stage stage, int src) const {
        return slot<kWorld>(link, owner, round, stage, src, warp * kRowPacks + 32) + lane / 8 * 4;
    }
    // The rank whose scales this lane handles, in every group of eight lanes another.
    __device__ __forceinline__ int scale_peer() const { return int(lane % 8); }

    __device__ __forceinline__ static void send_pack(char* to, const Words<4>& q) {
        store_pack(to, q.w[0], q.w[1], q.w[2], q.w[3]);
    }

    // Quantises the row of every other rank's slice and sends it there.
    __device__ __forceinline__ void scatter(uint32_t round, size_t row) {
        if (waiter.gave_up) return;
        float for_peer = 0.0f;
#pragma unroll
        for (int begin = 1; begin < kWorld; begin += kBatch) {
            Raw raw[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; i++)
                if (begin + i < kWorld) raw[i] = load(wrapped(int(link.rank) + begin + i), row);
#pragma unroll
            for (int i = 0; i < kBatch; i++) {
                if (begin + i >= kWorld) continue;
                const int to = wrapped(int(link.rank) + begin + i);
                if (!exists(to, row)) continue;
                float v[kElems], scale;
                widen(raw[i], v);
                send_pack(pack_slot(to, round, kScatter, link.rank), encode(v, scale));
                if (scale_peer() == to) for_peer = scale;
            }
        }
        const int to = scale_peer();
        if (to < kWorld && to != int(link.rank) && exists(to, row))
            store_word(scale_slot(to, round, kScatter, link.rank), __float_as_uint(for_peer));
    }

    // Waits for a row from each rank in `sources` (bit s: rank s) and restores the slots.
    __device__ __forceinline__ void collect(uint32_t round, Stage stage, uint32_t sources, Words<4> (&q)[kWorld],
                                            float (&scale)[kWorld]) {
        const char* const first = pack_slot(link.rank, round, stage, 0);
        const size_t pitch = size_t(link.slot_packs) * kPackBytes;
        const int peer = scale_peer();
        const bool fetches = sources >> peer & 1;
        char* const mine = scale_slot(link.rank, round, stage, fetches ? peer : 0);
        uint4 raw[kWorld];
        uint32_t word = 0;
        waiter.until_arrived(link, round, [&] {
#pragma unroll
            for (int s = 0; s < kWorld; s++) raw[s] = load_pack(first + s * pitch);
            if (fetches) word = load_word(mine);
            uint32_t missing = 0;
#pragma unroll
            for (int s = 0; s < kWorld; s++) missing |= Lamport::arrived(raw[s], round) ? 0u : 1u << s;
            if (word == Lamport::kMark) missing |= 1u << peer;
            return missing & sources;
        });
#pragma unroll
        for (int s = 0; s < kWorld; s++)
            if (sources >> s & 1) Lamport::restore(pack_slot(link.rank, round, stage, s));
        if (fetches) store_word(mine, Lamport::kMark);
        __syncwarp();
        // What one lane lacks is part of what all of them compute and send.
        waiter.gave_up = __any_sync(kAll, waiter.gave_up);
#pragma unroll
        for (int s = 0; s < kWorld; s++) {
            q[s] = Lamport::payload(raw[s]);
            scale[s] = __uint_as_float(__shfl_sync(kAll, word, (lane & 24) + s));
        }
    }

    // Sends this rank's row, quantised, to every other rank's gather slots.
    __device__ __forceinline__ void publish(uint32_t round, const Words<4>& q, float scale) const {
#pragma unroll
        for (int d = 1; d < kWorld; d++)
            send_pack(pack_slot(wrapped(int(link.rank) + d), round, kGather, link.rank), q);
        const int to = scale_peer();
        if (to < kWorld && to != int(link.rank))
            store_word(scale_slot(to, round, kGather, link.rank), __float_as_uint(scale));
    }

    // Adds up the row of this rank's slice, and sends the sum to every other rank. The own contribution is quantised
    // like the others, or the sum would depend on who adds it up.
    __device__ __forceinline__ void reduce(uint32_t round, size_t row) {
        float own[kElems], own_scale;
        widen(load(link.rank, row), own);
        const Words<4> own_q = encode(own, own_scale);
        Words<4> q[kWorld];
        float scale[kWorld];
        collect(round, kScatter, ((1u << kWorld) - 1) & ~(1u << link.rank), q, scale);
        float sum[kElems];
#pragma unroll
        for (int s = 0; s < kWorld; s++) {
            const bool is_own = s == int(link.rank);
            Words<4> packed;
#pragma unroll
            for (int w = 0; w < 4; w++) packed.w[w] = is_own ? own_q.w[w] : q[s].w[w];
            float v[kElems];
            decode(packed, is_own ? own_scale : scale[s], v);
#pragma unroll
            for (int i = 0; i < kElems; i++) sum[i] = s == 0 ? v[i] : __fadd_rn(sum[i], v[i]);
        }
        float sum_scale;
        const Words<4> sum_q = encode(sum, sum_scale);
        if (!waiter.gave_up) publish(round, sum_q, sum_scale);
        decode(sum_q, sum_scale, sum);
        write(link.rank, row, sum);
    }

    // Receives the row's sums of the other slices.
    __device__ __forceinline__ void gather(uint32_t round, size_t row) {
        uint32_t sources = 0;
#pragma unroll
        for (int s = 0; s < kWorld; s++)
            if (s != int(link.rank) && exists(s, row)) sources |= 1u << s;
        if (sources == 0) return;
        Words<4> q[kWorld];
        float scale[kWorld];
        collect(round, kGather, sources, q, scale);
#pragma unroll
        for (int s = 0; s < kWorld; s++) {
            if (!(sources >> s & 1)) continue;
            float v[kElems];
            decode(q[s], scale[s], v);
            write(s, row, v);
        }
    }
};

// In place is allowed: each element of `recv` is written by the lane that has sent or summed the same element of `send`.
template <class T, int kWorld>
__device__ __forceinline__ void all_reduce_quantized(const Link& link, const T* send, T* recv, size_t count) {
    allow_successor();
    wait_for_predecessor();
    const size_t all_rows = (count + kRowElems - 1) / kRowElems, rows = (all_rows + kWorld - 1) / kWorld;
    const size_t warps_per_cta = blockDim.x / 32;
    QuantizedSum<T, kWorld> sum{link,
                                reinterpret_cast<const char*>(send),
                                reinterpret_cast<char*>(recv),
                                count,
                                rows * kRowElems,
                                common_alignment(address(send)),
                                common_alignment(address(recv)),
                                threadIdx.x % 32,
                                blockIdx.x * warps_per_cta + threadIdx.x / 32,
                                gridDim.x * warps_per_cta,
                                {}};
    const uint32_t rounds = uint32_t((rows + sum.warps - 1) / sum.warps);
    const uint32_t first = claim_rounds(link, rounds, sum.waiter.gave_up);
    auto row = [&](uint32_t k) { return sum.warp + k * sum.warps; };

    sum.scatter(first, row(0));
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        if (k > 0) {
            __syncwarp();
            fence_system();
            __syncwarp();
            if (k + 1 < rounds) sum.scatter(first + k + 1, row(k + 1));
        }
        if (sum.exists(link.rank, row(k))) sum.reduce(first + k, row(k));
        // Before the second push something must have been received: see reduce.cuh.
        if (k == 0 && rounds > 1) {
            if (!sum.exists(link.rank, row(0))) sum.gather(first, row(0));
            sum.scatter(first + 1, row(1));
        }
        if (k > 1 || (k == 1 && sum.exists(link.rank, row(0)))) sum.gather(first + k - 1, row(k - 1));
    }
    sum.gather(first + rounds - 1, row(rounds - 1));
}

}  // namespace p2p
