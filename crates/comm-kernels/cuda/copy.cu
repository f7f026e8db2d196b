// Rows of bytes from one place to another.
//
// copy_rows(to, to_pitch, from, from_pitch, width, rows, unless): `width` bytes a row, at least 1, rows `pitch` bytes apart;
//     source and destination are disjoint. `unless`: null, or a word that makes the kernel do nothing (stop.cuh).

#include "stop.cuh"

namespace {

// `Unit` divides all addresses, pitches and the width.
template <typename Unit>
__device__ __forceinline__ void copy_rows_by(char *to, u64 to_pitch, const char *from, u64 from_pitch, u64 width,
                                             u64 rows) {
    const u64 units = width / sizeof(Unit);
    const u64 thread = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 threads = static_cast<u64>(gridDim.x) * blockDim.x;
    // A step of the grid in rows and columns, so that no division stands in the loop.
    const u64 down = threads / units, right = threads % units;
    u64 row = thread / units, column = thread % units;
    while (row < rows) {
        reinterpret_cast<Unit *>(to + row * to_pitch)[column] =
            reinterpret_cast<const Unit *>(from + row * from_pitch)[column];
        row += down;
        column += right;
        if (column >= units) {
            column -= units;
            row++;
        }
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    copy_rows(char *to, u64 to_pitch, const char *from, u64 from_pitch, u64 width, u64 rows, const u32 *unless) {
    if (stopped(unless)) return;
    const u64 bits =
        reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | to_pitch | from_pitch | width;
    if (bits % 16 == 0) return copy_rows_by<uint4>(to, to_pitch, from, from_pitch, width, rows);
    if (bits % 8 == 0) return copy_rows_by<u64>(to, to_pitch, from, from_pitch, width, rows);
    if (bits % 4 == 0) return copy_rows_by<u32>(to, to_pitch, from, from_pitch, width, rows);
    if (bits % 2 == 0) return copy_rows_by<uint16_t>(to, to_pitch, from, from_pitch, width, rows);
    copy_rows_by<u8>(to, to_pitch, from, from_pitch, width, rows);
}
