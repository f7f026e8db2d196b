// All-reduce + residual + bias + RMSNorm in one kernel, row by row.
//
// Owns: the two schedules and the row's sum of squares. Exchange, and why its slots are safe, is reduce.cuh's: here a
// thread's packs are chosen by row and column instead of by position in the buffer, nothing else differs.
//
//     r      = round(sum over ranks + residual + bias)      -> residual_out
//     output = round(r * rsqrt(mean(r^2) + eps) * (weight + weight_offset))
//
// Two-shot: a rank sums its eighth (1/world) of the columns, adds residual and bias there, and sends r, rounded, to the
// others. So the wire carries what a plain all-reduce carries, the residual is read once, and every rank norms equal
// bits. The sum of squares is added up in the same order on every rank: equal bits again.
#pragma once
#include "reduce.cuh"

namespace p2p {

template <class T>
struct NormArgs {
    const T* input;
    const T* residual;
    T* residual_out;
    const T* bias;  // may be null
    const T* weight;
    T* output;
    uint64_t tokens;
    uint32_t hidden;
    float eps;
    float weight_offset;
};

// The sum of `x` over the CTA, in every thread. Equal launch shapes give equal bits. `shared`: 32 floats.
__device__ __forceinline__ float cta_sum(float x, float* shared) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    if (blockDim.x == 32) return x;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    const uint32_t lane = threadIdx.x & 31;
    x = lane < blockDim.x / 32 ? shared[lane] : 0.0f;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t r;
    asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ uint32_t cluster_ctas() {
    uint32_t n;
    asm volatile("mov.u32 %0, %cluster_nctarank;" : "=r"(n));
    return n;
}

// Shared memory of another CTA may be written once that CTA has started: every kernel that calls `cluster_sum`
// announces itself with this first. Does not wait.
__device__ __forceinline__ void cluster_enter() {
    if (cluster_ctas() > 1) asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

// The sum of `x` over the cluster, in every thread; added up in CTA order. `shared`: 40 floats, used once per kernel.
__device__ __forceinline__ float cluster_sum(float x, float* shared) {
    x = cta_sum(x, shared);
    const uint32_t ctas = cluster_ctas(), me = cluster_rank();
    if (ctas == 1) return x;
    // All CTAs of the cluster have started: their `cluster_enter`.
    asm volatile("barrier.cluster.wait;" ::: "memory");
    float* all = shared + 32;
    if (threadIdx.x < ctas) {
        const uint32_t here = uint32_t(__cvta_generic_to_shared(all + me));
        uint32_t there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(threadIdx.x));
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(x) : "memory");
    }
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
    float sum = 0.0f;
    for (uint32_t c = 0; c < ctas; c++) sum += all[c];
    return sum;
}

// Rows of one fused op as packs of a slice cut.
template <class T, class Wire>
struct NormRow {
    using Data = Words<Wire::kWords>;
    using Acc = Accumulator<T, Wire::kWords>;
    const NormArgs<T>& a;
    uint32_t align;  // of all operands and of the row pitch

    __device__ __forceinline__ explicit NormRow(const NormArgs<T>& args) : a(args) {
        align = common_alignment(address(a.input) | address(a.residual) | address(a.residual_out) | address(a.bias) |
                                 address(a.weight) | address(a.output) | a.hidden * sizeof(T));
    }
    __device__ __forceinline__ size_t pitch() const { return size_t(a.hidden) * sizeof(T); }
    __device__ __forceinline__ Data load(const T* base, size_t at, uint32_t bytes) const {
        return read_pack<sizeof(T), Wire::kWords>(reinterpret_cast<const char*>(base) + at, bytes, align);
    }
    __device__ __forceinline__ void store(T* base, size_t at, const Data& v, uint32_t bytes) const {
        write_pack<sizeof(T)>(reinterpret_cast<char*>(base) + at, v, bytes, align);
    }
    // acc + residual + bias, rounded.
    __device__ __forceinline__ Data with_residual(Acc acc, const Data& residual, const Data& bias) const {
        acc.add(residual);
        if (a.bias != nullptr) acc.add(bias);
        return acc.rounded();
    }
    __device__ __forceinline__ Data load_bias(size_t column, uint32_t bytes) const {
        return a.bias != nullptr ? load(a.bias, column, bytes) : Data{};
    }
    __device__ __forceinline__ static float square(const Data& r) {
        Acc x;
        x.set(r);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < Acc::kElems; i++) sum += x.v[i] * x.v[i];
        return sum;
    }
    __device__ __forceinline__ void normed(const Data& r, const Data& weight, float scale, size_t row, size_t column,
                                           uint32_t bytes) const {
        Acc x, w;
        x.set(r);
        w.set(weight);
#pragma unroll
        for (int i = 0; i < Acc::kElems; i++) x.v[i] = x.v[i] * scale * (w.v[i] + a.weight_offset);
        store(a.output, row + column, x.rounded(), bytes);
    }
    __device__ __forceinline__ float scale(float squares) const { return rsqrtf(squares / float(a.hidden) + a.eps); }
};

// One hop. A cluster handles one row, a thread one pack of it. Grid = tokens * cluster size.
template <class T, int kWorld, class Wire>
__device__ __forceinline__ void norm_one_shot(const Link& link, const NormArgs<T>& args) {
    using R = Reducer<T, kWorld, Wire>;
    __shared__ float shared[40];
    cluster_enter();
    allow_successor();
    wait_for_predecessor();
    const NormRow<T, Wire> rows(args);
    R r{link,       typename R::Cut{rows.pitch(), rows.pitch()},   reinterpret_cast<const char*>(args.input),
        rows.align, size_t(blockIdx.x) * blockDim.x + threadIdx.x, size_t(gridDim.x) * blockDim.x,
        {}};
    const uint32_t ctas = cluster_ctas();
    const size_t row = blockIdx.x / ctas * rows.pitch();
    const size_t pack = size_t(cluster_rank()) * blockDim.x + threadIdx.x, column = pack * R::Cut::kBytes;
    const uint32_t bytes = r.cut.bytes(0, pack);
    typename R::Data own;
    if (bytes != 0) own = rows.load(args.input, row + column, bytes);
    const uint32_t round = claim_rounds(link, 1, r.waiter.gave_up);
    if (bytes != 0 && !r.waiter.gave_up) {
#pragma unroll
        for (int d = 1; d < kWorld; d++)
            Wire::send(slot<kWorld>(link, R::wrapped(int(link.rank) + d), round, kScatter, link.rank, r.thread), own,
                       round);
    }
    injected_stall(link);
    // Fetched while the packs are under way.
    typename R::Data sum, residual, bias, weight;
    if (bytes != 0) {
        residual = rows.load(args.residual, row + column, bytes);
        bias = rows.load_bias(column, bytes);
        weight = rows.load(args.weight, column, bytes);
    }
    float squares = 0.0f;
    if (bytes != 0) {
        typename R::Data v[kWorld];
        r.collect(round, kScatter, r.thread, r.others(), v);
        sum = rows.with_residual(r.add_up(v, own), residual, bias);
        rows.store(args.residual_out, row + column, sum, bytes);
        squares = rows.square(sum);
    }
    const float scale = rows.scale(cluster_sum(squares, shared));
    if (bytes != 0) rows.normed(sum, weight, scale, row, column, bytes);
}

// Two hops, pipelined over rows: CTA b handles rows b, b + grid, ..., one per round. blockDim.x is a multiple of 32 and
// at least the packs of a row's slice.
template <class T, int kWorld>
__device__ __forceinline__ void norm_two_shot(const Link& link, const NormArgs<T>& args) {
    using R = Reducer<T, kWorld, Lamport>;
    __shared__ float shared[32];
    allow_successor();
    wait_for_predecessor();
    const NormRow<T, Lamport> rows(args);
    R r{link,
        R::Cut::cut(rows.pitch(), kWorld),
        nullptr,
        rows.align,
        size_t(blockIdx.x) * blockDim.x + threadIdx.x,
        size_t(gridDim.x) * blockDim.x,
        {}};
    const size_t pack = threadIdx.x;
    // All slices equal, whole and aligned: the usual shapes. The same for all threads, as the branch holds CTA
    // barriers.
    const bool even = moves_wide<4>(rows.align) && r.cut.whole_packs(kWorld) == r.cut.packs();
    const uint32_t rounds = uint32_t((args.tokens + gridDim.x - 1) / gridDim.x);
    const uint32_t first = claim_rounds(link, rounds, r.waiter.gave_up);
    auto token = [&](uint32_t k) { return size_t(k) * gridDim.x + blockIdx.x; };
    auto scatter = [&](uint32_t k) {
        if (token(k) >= args.tokens) return;
        r.send = reinterpret_cast<const char*>(args.input) + token(k) * rows.pitch();
        r.scatter(first + k, pack);
    };
    auto finish = [&](uint32_t k) {
        if (token(k) >= args.tokens) return;
        const size_t row = token(k) * rows.pitch();
        typename R::Data v[kWorld];
        float squares = 0.0f;
        if (even) {
            const bool mine = pack < r.cut.packs();
            typename R::Data weight[kWorld];
            if (mine) {
                // The row's weights are fetched while the packs are under way.
#pragma unroll
                for (int s = 0; s < kWorld; s++)
                    weight[s] = read_wide<4>(reinterpret_cast<const char*>(args.weight) + r.cut.offset(s, pack));
                const auto own = read_wide<4>(reinterpret_cast<const char*>(args.residual_out) + row +
                                              r.cut.offset(link.rank, pack));
                r.collect(first + k, kGather, r.thread, r.others(), v);
#pragma unroll
                for (int s = 0; s < kWorld; s++) {
                    if (s == int(link.rank))
                        v[s] = own;
                    else
                        write_wide(reinterpret_cast<char*>(args.residual_out) + row + r.cut.offset(s, pack), v[s]);
                    squares += rows.square(v[s]);
                }
            }
            const float scale = rows.scale(cta_sum(squares, shared));
            if (mine) {
#pragma unroll
                for (int s = 0; s < kWorld; s++)
                    rows.normed(v[s], weight[s], scale, row, r.cut.offset(s, pack), R::Cut::kBytes);
            }
            return;
        }
        uint32_t sources = 0;
        for (int s = 0; s < kWorld; s++)
            if (s != int(link.rank) && r.cut.bytes(s, pack) != 0) sources |= 1u << s;
        r.collect(first + k, kGather, r.thread, sources, v);
        for (int s = 0; s < kWorld; s++) {
            const uint32_t bytes = r.cut.bytes(s, pack);
            if (bytes == 0) continue;
            const size_t at = row + r.cut.offset(s, pack);
            const auto x = s == int(link.rank) ? rows.load(args.residual_out, at, bytes) : v[s];
            if (s != int(link.rank)) rows.store(args.residual_out, at, x, bytes);
            squares += rows.square(x);
        }
        const float scale = rows.scale(cta_sum(squares, shared));
        for (int s = 0; s < kWorld; s++) {
            const uint32_t bytes = r.cut.bytes(s, pack);
            const size_t column = r.cut.offset(s, pack);
            if (bytes != 0)
                rows.normed(rows.load(args.residual_out, row + column, bytes), rows.load(args.weight, column, bytes),
                            scale, row, column, bytes);
        }
    };
    scatter(0);
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        if (k > 0) fence_system();
        if (k + 1 < rounds) scatter(k + 1);
        const uint32_t bytes = token(k) < args.tokens ? r.cut.bytes(link.rank, pack) : 0;
        if (bytes != 0) {
            const size_t row = token(k) * rows.pitch(), column = r.cut.offset(link.rank, pack);
            r.send = reinterpret_cast<const char*>(args.input) + row;
            const auto residual = rows.load(args.residual, row + column, bytes), bias = rows.load_bias(column, bytes);
            const auto v = rows.with_residual(r.sum(first + k, pack, bytes), residual, bias);
            r.publish(first + k, v);
            rows.store(args.residual_out, row + column, v, bytes);
        }
        if (k > 0) finish(k - 1);
    }
    finish(rounds - 1);
}

}  // namespace p2p
