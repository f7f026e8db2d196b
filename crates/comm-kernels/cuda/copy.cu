// Rows of bytes from one place to another.
//
// copy_rows(to, to_pitch, from, from_pitch, width, rows, unless): `width` bytes a row, at least 1, rows `pitch` bytes apart;
//     source and destination are disjoint. `unless` is null, or a word in device memory; while it is nonzero nothing is
//     read or written.

#include "dtype.cuh"

namespace {

// `Unit` divides all addresses, pitches and the width.
template <typename Unit>
__device__ __forceinline__ void copy_rows_by(char *to, u64 to_pitch, const char *from, u64 from_pitch, u64 width,
                                             u64 rows) {
    const u64 units = width / sizeof(Unit), step = static_cast<u64>(gridDim.x) * blockDim.x;
    for (u64 i = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x; i < units * rows; i += step) {
        const u64 row = i / units, at = i % units * sizeof(Unit);
        *reinterpret_cast<Unit *>(to + row * to_pitch + at) =
            *reinterpret_cast<const Unit *>(from + row * from_pitch + at);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    copy_rows(char *to, u64 to_pitch, const char *from, u64 from_pitch, u64 width, u64 rows, const u32 *unless) {
    if (unless != nullptr && *unless != 0) return;
    const u64 bits =
        reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | to_pitch | from_pitch | width;
    if (bits % 16 == 0) return copy_rows_by<uint4>(to, to_pitch, from, from_pitch, width, rows);
    if (bits % 4 == 0) return copy_rows_by<u32>(to, to_pitch, from, from_pitch, width, rows);
    copy_rows_by<u8>(to, to_pitch, from, from_pitch, width, rows);
}
