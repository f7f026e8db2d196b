// Copies of rows of bytes between buffers whose rows lie apart.
//
// copy_rows(to, to_pitch, from, from_pitch, width, rows, unit, unless): `rows` rows of `width` bytes, pitches in bytes.
// `unit` is 1, 2, 4, 8 or 16 and divides both addresses, both pitches and the width. `unless`: see stop.cuh.

#include "stop.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void copy(char *to, u64 to_pitch, const char *from, u64 from_pitch, u64 width, u64 rows) {
    const u64 units = width / sizeof(T);
    const u64 thread = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 threads = static_cast<u64>(gridDim.x) * blockDim.x;
    // A step of the grid in rows and columns, so that no division stands in the loop.
    const u64 down = threads / units, right = threads % units;
    u64 row = thread / units, column = thread % units;
    while (row < rows) {
        reinterpret_cast<T *>(to + row * to_pitch)[column] =
            reinterpret_cast<const T *>(from + row * from_pitch)[column];
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
    copy_rows(char *to, u64 to_pitch, const char *from, u64 from_pitch, u64 width, u64 rows, u32 unit,
              const u32 *unless) {
    if (stopped(unless)) return;
    switch (unit) {
        case 16: return copy<uint4>(to, to_pitch, from, from_pitch, width, rows);
        case 8: return copy<u64>(to, to_pitch, from, from_pitch, width, rows);
        case 4: return copy<u32>(to, to_pitch, from, from_pitch, width, rows);
        case 2: return copy<uint16_t>(to, to_pitch, from, from_pitch, width, rows);
        default: return copy<u8>(to, to_pitch, from, from_pitch, width, rows);
    }
}
