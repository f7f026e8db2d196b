// All-reduce + residual + bias + RMSNorm in one kernel, row by row.
//
// Owns: the two schedules and the row's sum of squares. Exchange, and why its slots are safe, is reduce.cuh's: here a
// thread's packs are chosen by row and column instead of by position in the buffer, nothing else differs.
//
//     r      = round(sum over ranks + residual + bias)      -> residual_out
//     output = round(r * rsqrt(mean(r^2) + eps) * (weight + weight_offset))
//
// and with `kQuantized` an fp8 result, which comm-core's `NormQuantization` defines, from the rounded one.
//
// Two-shot: a rank sums its eighth (1/world) of the columns, adds residual and bias there, and sends r, rounded, to the
// others. So the wire carries what a plain all-reduce carries, the residual is read once, and every rank norms equal
// bits. The sum of squares is added up in the same order on every rank: equal bits again.
#pragma once
#include "../fp8.cuh"
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

// Where an fp8 result goes.
struct NormQuantized {
    uint8_t* output;
    float* scale;        // one to read, or one for each row to write
    uint32_t per_token;  // 1 for the latter
    uint32_t padding;
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

// The largest `x` over the CTA, in every thread. `shared`: 32 floats.
__device__ __forceinline__ uint32_t cta_max(uint32_t x, float* shared) {
    x = __reduce_max_sync(0xffffffffu, x);
    if (blockDim.x == 32) return x;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x / 32] = __uint_as_float(x);
    __syncthreads();
    const uint32_t lane = threadIdx.x & 31;
    return __reduce_max_sync(0xffffffffu, lane < blockDim.x / 32 ? __float_as_uint(shared[lane]) : 0u);
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

// The largest `x` over the cluster, in every thread. After `cluster_sum`, so all CTAs have started; `shared` is that
// one's with 8 more floats, used once per kernel. No CTA leaves before all have written here.
__device__ __forceinline__ uint32_t cluster_max(uint32_t x, float* shared) {
    x = cta_max(x, shared);
    const uint32_t ctas = cluster_ctas(), me = cluster_rank();
    if (ctas == 1) return x;
    float* all = shared + 40;
    if (threadIdx.x < ctas) {
        const uint32_t here = uint32_t(__cvta_generic_to_shared(all + me));
        uint32_t there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(threadIdx.x));
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(x) : "memory");
    }
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
    uint32_t most = 0;
    for (uint32_t c = 0; c < ctas; c++) most = max(most, __float_as_uint(all[c]));
    return most;
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
    __device__ __forceinline__ Data value(const Data& r, const Data& weight, float scale) const {
        Acc x, w;
        x.set(r);
        w.set(weight);
#pragma unroll
        for (int i = 0; i < Acc::kElems; i++) x.v[i] = x.v[i] * scale * (w.v[i] + a.weight_offset);
        return x.rounded();
    }
    __device__ __forceinline__ void normed(const Data& r, const Data& weight, float scale, size_t row, size_t column,
                                           uint32_t bytes) const {
        store(a.output, row + column, value(r, weight, scale), bytes);
    }
    // The same, kept for the fp8 result; the unquantised one need not be wanted.
    __device__ __forceinline__ Data kept(const Data& r, const Data& weight, float scale, size_t row, size_t column,
                                         uint32_t bytes) const {
        const Data y = value(r, weight, scale);
        if (a.output != nullptr) store(a.output, row + column, y, bytes);
        return y;
    }
    // What lies behind a row's end is zero here, and so changes no maximum.
    __device__ __forceinline__ static uint32_t amax(const Data& y) {
        Acc x;
        x.set(y);
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < Acc::kElems; i++) most = max(most, fp8::magnitude(x.v[i]));
        return most;
    }
    // Writes a pack as fp8. `at`: the pack's place in bytes of the operands' type.
    __device__ __forceinline__ void quantize(const NormQuantized& q, const Data& y, float inverse, size_t at,
                                             uint32_t bytes) const {
        Acc x;
        x.set(y);
        uint32_t words[(Acc::kElems + 3) / 4] = {};
#pragma unroll
        for (int i = 0; i < Acc::kElems; i += 2) {
            const float second = i + 1 < Acc::kElems ? x.v[i + 1] : 0.0f;
            words[i / 4] |= fp8::pack2(x.v[i], second, inverse) << (8 * (i % 4));
        }
        uint8_t* const to = q.output + at / sizeof(T);
        const uint32_t aligned = common_alignment(address(q.output) | a.hidden);
        if (bytes == 4 * Wire::kWords && Acc::kElems % 4 == 0 && aligned >= Acc::kElems) {
            if constexpr (Acc::kElems == 8)
                *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
            else
                *reinterpret_cast<uint32_t*>(to) = words[0];
        } else if (bytes == 4 * Wire::kWords && Acc::kElems % 2 == 0 && aligned >= 2) {
#pragma unroll
            for (int i = 0; i < Acc::kElems; i += 2)
                *reinterpret_cast<uint16_t*>(to + i) = uint16_t(words[i / 4] >> (8 * (i % 4)));
        } else {
#pragma unroll
            for (int i = 0; i < Acc::kElems; i++)
                if (i < int(bytes / sizeof(T))) to[i] = uint8_t(words[i / 4] >> (8 * (i % 4)));
        }
    }
    __device__ __forceinline__ float scale(float squares) const { return rsqrtf(squares / float(a.hidden) + a.eps); }
};

// One hop. A cluster handles one row, a thread one pack of it. Grid = tokens * cluster size.
template <class T, int kWorld, class Wire, bool kQuantized = false>
__device__ __forceinline__ void norm_one_shot(const Link& link, const NormArgs<T>& args,
                                              const NormQuantized& quantized = {}) {
    using R = Reducer<T, kWorld, Wire>;
    __shared__ float shared[kQuantized ? 48 : 40];
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
    const uint32_t round = claim_rounds_by_thread(link, 1, r.waiter.gave_up);
    if (bytes != 0 && !r.waiter.gave_up) {
#pragma unroll
        for (int d = 1; d < kWorld; d++)
            Wire::send(slot<kWorld>(link, R::wrapped(int(link.rank) + d), round, kScatter, link.rank, r.thread), own,
                       round);
    }
    injected_stall(link);
    // Fetched while the packs are under way.
    typename R::Data sum, residual, bias, weight;
    float inverse = 0.0f;
    if (kQuantized && !quantized.per_token) inverse = __fdiv_rn(1.0f, *quantized.scale);
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
    if constexpr (kQuantized) {
        typename R::Data y;
        uint32_t amax = 0;
        if (bytes != 0) {
            y = rows.kept(sum, weight, scale, row, column, bytes);
            amax = rows.amax(y);
        }
        if (quantized.per_token) {
            const fp8::Scale s = fp8::scale_of(cluster_max(amax, shared));
            inverse = s.inverse;
            if (cluster_rank() == 0 && threadIdx.x == 0) quantized.scale[blockIdx.x / ctas] = s.scale;
        }
        if (bytes != 0) rows.quantize(quantized, y, inverse, row + column, bytes);
    } else {
        if (bytes != 0) rows.normed(sum, weight, scale, row, column, bytes);
    }
}

// Two hops, pipelined over rows: CTA b handles rows b, b + grid, ..., one per round. blockDim.x is a multiple of 32 and
// at least the packs of a row's slice.
template <class T, int kWorld, bool kQuantized = false>
__device__ __forceinline__ void norm_two_shot(const Link& link, const NormArgs<T>& args,
                                              const NormQuantized& quantized = {}) {
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
    const uint32_t first = claim_rounds_by_thread(link, rounds, r.waiter.gave_up);
    auto token = [&](uint32_t k) { return size_t(k) * gridDim.x + blockIdx.x; };
    auto scatter = [&](uint32_t k) {
        if (token(k) >= args.tokens) return;
        r.send = reinterpret_cast<const char*>(args.input) + token(k) * rows.pitch();
        r.scatter(first + k, pack);
    };
    const float of_tensor = kQuantized && !quantized.per_token ? __fdiv_rn(1.0f, *quantized.scale) : 0.0f;
    // The factor of a row's fp8 result, whose scale is written here if it is the row's own. Called by all threads.
    auto row_inverse = [&](uint32_t k, uint32_t amax) {
        if (!quantized.per_token) return of_tensor;
        const fp8::Scale s = fp8::scale_of(cta_max(amax, shared));
        if (threadIdx.x == 0) quantized.scale[token(k)] = s.scale;
        return s.inverse;
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
            if constexpr (kQuantized) {
                uint32_t amax = 0;
                if (mine) {
#pragma unroll
                    for (int s = 0; s < kWorld; s++) {
                        v[s] = rows.kept(v[s], weight[s], scale, row, r.cut.offset(s, pack), R::Cut::kBytes);
                        amax = max(amax, rows.amax(v[s]));
                    }
                }
                const float inverse = row_inverse(k, amax);
                if (mine) {
#pragma unroll
                    for (int s = 0; s < kWorld; s++)
                        rows.quantize(quantized, v[s], inverse, row + r.cut.offset(s, pack), R::Cut::kBytes);
                }
            } else if (mine) {
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
        // The new residual is read back: every thread reads what it has written.
        auto each = [&](auto work) {
            for (int s = 0; s < kWorld; s++) {
                const uint32_t bytes = r.cut.bytes(s, pack);
                const size_t column = r.cut.offset(s, pack);
                if (bytes != 0)
                    work(rows.load(args.residual_out, row + column, bytes), rows.load(args.weight, column, bytes),
                         column, bytes);
            }
        };
        using Data = typename R::Data;
        if constexpr (kQuantized) {
            uint32_t amax = 0;
            each([&](const Data& x, const Data& weight, size_t column, uint32_t bytes) {
                amax = max(amax, rows.amax(rows.kept(x, weight, scale, row, column, bytes)));
            });
            const float inverse = row_inverse(k, amax);
            each([&](const Data& x, const Data& weight, size_t column, uint32_t bytes) {
                rows.quantize(quantized, rows.value(x, weight, scale), inverse, row + column, bytes);
            });
        } else {
            each([&](const Data& x, const Data& weight, size_t column, uint32_t bytes) {
                rows.normed(x, weight, scale, row, column, bytes);
            });
        }
    };
    const bool sums = r.cut.bytes(link.rank, 0) != 0;
    scatter(0);
    injected_stall(link);
    for (uint32_t k = 0; k < rounds; k++) {
        if (k > 0) fence_system();
        if (k > 0 && k + 1 < rounds) scatter(k + 1);
        const uint32_t bytes = token(k) < args.tokens ? r.cut.bytes(link.rank, pack) : 0;
        if (bytes != 0) {
            const size_t row = token(k) * rows.pitch(), column = r.cut.offset(link.rank, pack);
            r.send = reinterpret_cast<const char*>(args.input) + row;
            const auto residual = rows.load(args.residual, row + column, bytes), bias = rows.load_bias(column, bytes);
            const auto v = rows.with_residual(r.sum(first + k, pack, bytes), residual, bias);
            r.publish(first + k, v);
            rows.store(args.residual_out, row + column, v, bytes);
        }
        // The second push follows a receipt of this kernel, as in reduce.cuh: thread 0 has one if the slice is not empty,
        // which shows every thread behind the barrier that the others have started; else the row's results are one.
        if (k == 0 && rounds > 1) {
            if (!sums) {
                finish(0);
            } else {
                __syncthreads();
                // Unless thread 0 has given up its wait.
                const volatile uint32_t* const broken = link.broken;
                if (bytes == 0) r.waiter.gave_up = r.waiter.gave_up || *broken != kWhole;
            }
            scatter(1);
        }
        if (k > 1 || (k == 1 && sums)) finish(k - 1);
    }
    finish(rounds - 1);
}

}  // namespace p2p
