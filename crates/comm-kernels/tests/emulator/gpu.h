// Enough of a GPU to run the exchange kernels on a CPU: every thread of every rank is a fiber, warps and blocks meet at
// barriers, and the ranks take turns of random length. Memory is sequentially consistent: what weaker orders do is for
// the models of comm-p2p; here it is the kernels' own source that runs.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__

struct uint4 {
    uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
using std::max;
using std::min;

inline uint32_t __float_as_uint(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}
inline float __uint_as_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

namespace gpu {

struct Index {
    uint32_t x;
};

// Threads that meet. What they agree on is kept until they next do, which none can before all have read it.
struct Barrier {
    uint32_t size, here = 0, meeting = 0;
    bool all = true, any = false, was_all = true, was_any = false;
    uint64_t value = 0;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    std::function<void()> body;
    Index thread, block, threads, blocks;
    std::shared_ptr<Barrier> warp, cta;
    bool done = false;
};

inline Fiber* current;
inline ucontext_t scheduler;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void meet(Barrier& barrier, bool agrees = false) {
    const uint32_t meeting = barrier.meeting;
    barrier.all &= agrees, barrier.any |= agrees;
    if (++barrier.here < barrier.size) {
        while (barrier.meeting == meeting) yield();
        return;
    }
    barrier.was_all = barrier.all, barrier.was_any = barrier.any;
    barrier.here = 0, barrier.all = true, barrier.any = false;
    barrier.meeting++;
}

// Memory of the ranks that kernels may store to and load from through their links.
struct Range {
    const char* begin;
    size_t bytes;
};
inline std::vector<Range> scratch;

[[noreturn]] inline void fail(const char* what) {
    std::printf("FAILED: %s\n", what);
    std::exit(1);
}
inline void check(const void* at, size_t bytes) {
    const char* const begin = static_cast<const char*>(at);
    for (const Range& range : scratch)
        if (begin >= range.begin && begin + bytes <= range.begin + range.bytes) return;
    fail("an access to no scratch memory");
}
inline void store(void* to, const void* from, size_t bytes) {
    check(to, bytes);
    std::memcpy(to, from, bytes);
    yield();
}
template <class T>
T load(const void* from) {
    check(from, sizeof(T));
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}
inline uint64_t now_ns() {
    return uint64_t(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

// One launch of a rank.
struct Launch {
    uint32_t blocks, threads;
    std::function<void()> body;
};

inline void enter(uint32_t high, uint32_t low) {
    auto* fiber = reinterpret_cast<Fiber*>(uint64_t(high) << 32 | low);
    fiber->body();
    fiber->done = true;
    yield();
}

inline std::vector<std::unique_ptr<Fiber>> start(const Launch& launch) {
    std::vector<std::unique_ptr<Fiber>> fibers;
    for (uint32_t block = 0; block < launch.blocks; block++) {
        auto cta = std::make_shared<Barrier>(Barrier{launch.threads});
        std::shared_ptr<Barrier> warp;
        for (uint32_t thread = 0; thread < launch.threads; thread++) {
            if (thread % 32 == 0) warp = std::make_shared<Barrier>(Barrier{min(32u, launch.threads - thread)});
            auto fiber = std::make_unique<Fiber>();
            fiber->body = launch.body;
            fiber->thread = {thread}, fiber->block = {block};
            fiber->threads = {launch.threads}, fiber->blocks = {launch.blocks};
            fiber->warp = warp, fiber->cta = cta;
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = fiber->stack.data();
            fiber->context.uc_stack.ss_size = fiber->stack.size();
            const auto address = reinterpret_cast<uint64_t>(fiber.get());
            makecontext(&fiber->context, reinterpret_cast<void (*)()>(enter), 2, uint32_t(address >> 32),
                        uint32_t(address));
            fibers.push_back(std::move(fiber));
        }
    }
    return fibers;
}

// Runs every rank's launches, one after the other. A rank rests, or is as much as four times as fast, for some turns.
inline void run(const std::vector<std::vector<Launch>>& ranks, std::mt19937& random) {
    std::vector<size_t> next(ranks.size(), 0);
    std::vector<std::vector<std::unique_ptr<Fiber>>> running(ranks.size());
    std::vector<uint32_t> speed(ranks.size());
    for (uint32_t turn = 0;; turn++) {
        // Sequences that come to an end take 3000 at most.
        if (turn > 12000) fail("the ranks wait for each other");
        if (turn % 64 == 0)
            for (auto& each : speed) each = random() % 4 == 0 ? 0 : 1 + random() % 4;
        bool over = true;
        for (size_t rank = 0; rank < ranks.size(); rank++) {
            if (running[rank].empty() && next[rank] < ranks[rank].size())
                running[rank] = start(ranks[rank][next[rank]++]);
            over = over && running[rank].empty();
            for (uint32_t step = 0; step < speed[rank]; step++) {
                for (auto& fiber : running[rank]) {
                    current = fiber.get();
                    swapcontext(&scheduler, &current->context);
                }
                std::erase_if(running[rank], [](auto& fiber) { return fiber->done; });
            }
        }
        if (over) return;
    }
}

}  // namespace gpu

#define threadIdx (gpu::current->thread)
#define blockIdx (gpu::current->block)
#define blockDim (gpu::current->threads)
#define gridDim (gpu::current->blocks)

inline void __syncthreads() { gpu::meet(*gpu::current->cta); }
inline bool __syncthreads_or(bool p) {
    gpu::meet(*gpu::current->cta, p);
    return gpu::current->cta->was_any;
}
inline void __syncwarp() { gpu::meet(*gpu::current->warp); }
inline bool __all_sync(uint32_t, bool p) {
    gpu::meet(*gpu::current->warp, p);
    return gpu::current->warp->was_all;
}
inline bool __any_sync(uint32_t, bool p) {
    gpu::meet(*gpu::current->warp, p);
    return gpu::current->warp->was_any;
}
inline uint64_t __shfl_sync(uint32_t, uint64_t value, uint32_t lane) {
    if (threadIdx.x % 32 == lane) gpu::current->warp->value = value;
    gpu::meet(*gpu::current->warp);
    const uint64_t found = gpu::current->warp->value;
    gpu::meet(*gpu::current->warp);
    return found;
}
inline uint32_t atomicAdd(uint32_t* at, uint32_t more) { return *at += more, *at - more; }
inline uint32_t atomicExch(uint32_t* at, uint32_t value) { return std::exchange(*at, value); }
inline uint32_t atomicCAS(uint32_t* at, uint32_t expected, uint32_t value) {
    const uint32_t found = *at;
    if (found == expected) *at = value;
    return found;
}
inline uint32_t atomicCAS_system(uint32_t* at, uint32_t expected, uint32_t value) {
    return atomicCAS(at, expected, value);
}
inline void __threadfence_system() {}
inline void __nanosleep(uint32_t) { gpu::yield(); }
