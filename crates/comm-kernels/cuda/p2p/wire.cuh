// How 16-byte packs cross NVLink and how the receiver knows that one has arrived.
//
// Owns: the two self-announcing pack formats, the flag, and the memory instructions behind them. Never waits (wait.cuh)
// and never computes (numeric.cuh).
//
// Both formats carry their own arrival mark, so data and notice are one store and no fence stands between them:
//
// - `Lamport`: all 16 bytes are payload. The receiver's slot holds all-ones in every 32-bit word before the data; a
//   word that differs has arrived. Soundness needs single-copy atomicity of 32-bit words only. Payload words that are
//   all-ones are sent as 0x7fffffff. For f32, and for a pair of f16 or bf16, all-ones is a NaN (two NaNs), and so is
//   the replacement: no number, signed zeros included, changes. Only for data that is going to be summed: raw bytes
//   would not survive. The receiver puts the mark back after reading.
// - `Packet`: 12 bytes of payload and the round number. The store is one 128-bit access, which PTX makes single-copy
//   atomic (`.b128`), so a matching round vouches for the payload. For any bits; costs a quarter of the wire, and
//   nothing has to be restored.
#pragma once
#include <cstdint>
#include "link.cuh"

namespace p2p {

template <int kWords>
struct Words {
    uint32_t w[kWords];
};

__device__ __forceinline__ void store_pack(char* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile(
        "{\n\t.reg .b64 lo, hi;\n\t.reg .b128 v;\n\t"
        "mov.b64 lo, {%1, %2};\n\tmov.b64 hi, {%3, %4};\n\tmov.b128 v, {lo, hi};\n\t"
        "st.relaxed.sys.global.b128 [%0], v;\n\t}" ::"l"(to),
        "r"(a), "r"(b), "r"(c), "r"(d)
        : "memory");
}

__device__ __forceinline__ uint4 load_pack(const char* from) {
    uint64_t lo, hi;
    asm volatile("{\n\t.reg .b128 v;\n\tld.relaxed.sys.global.b128 v, [%2];\n\tmov.b128 {%0, %1}, v;\n\t}"
                 : "=l"(lo), "=l"(hi)
                 : "l"(from)
                 : "memory");
    return make_uint4(uint32_t(lo), uint32_t(lo >> 32), uint32_t(hi), uint32_t(hi >> 32));
}

struct Lamport {
    static constexpr int kWords = 4;
    // Slots need the mark back before their next use.
    static constexpr bool kRestores = true;
    static constexpr uint32_t kMark = 0xffffffffu;

    __device__ __forceinline__ static uint32_t unmarked(uint32_t w) { return w == kMark ? 0x7fffffffu : w; }

    __device__ __forceinline__ static void send(char* to, const Words<4>& v, uint32_t) {
        store_pack(to, unmarked(v.w[0]), unmarked(v.w[1]), unmarked(v.w[2]), unmarked(v.w[3]));
    }

    // Whether a loaded pack had arrived whole.
    __device__ __forceinline__ static bool arrived(const uint4& p, uint32_t) {
        return p.x != kMark && p.y != kMark && p.z != kMark && p.w != kMark;
    }
    __device__ __forceinline__ static Words<4> payload(const uint4& p) { return {{p.x, p.y, p.z, p.w}}; }

    __device__ __forceinline__ static void restore(char* at) { store_pack(at, kMark, kMark, kMark, kMark); }
};

struct Packet {
    static constexpr int kWords = 3;
    static constexpr bool kRestores = false;

    __device__ __forceinline__ static void send(char* to, const Words<3>& v, uint32_t round) {
        store_pack(to, v.w[0], v.w[1], v.w[2], round);
    }

    __device__ __forceinline__ static bool arrived(const uint4& p, uint32_t round) { return p.w == round; }
    __device__ __forceinline__ static Words<3> payload(const uint4& p) { return {{p.x, p.y, p.z}}; }

    __device__ __forceinline__ static void restore(char*) {}
};

// A word that says "everything I wrote before, you may read" (raise_after_writes) or only "I am here" (raise).
struct Flag {
    __device__ __forceinline__ static void raise(uint32_t* at, uint32_t round) {
        asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(at), "r"(round) : "memory");
    }
    __device__ __forceinline__ static void raise_after_writes(uint32_t* at, uint32_t round) {
        asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(round) : "memory");
    }
    // True once the flag has reached `round`; what the raiser wrote before is visible then. `ahead`: more than the
    // raiser can be ahead of the wait.
    __device__ __forceinline__ static bool raised(const uint32_t* at, uint32_t round, uint32_t ahead = kAhead) {
        uint32_t v;
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
        return v - round < ahead;
    }
};

// Orders a thread's earlier accesses before its later ones for every device.
__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

}  // namespace p2p
