// Entry points for a hybrid cube mesh of eight ranks.
//
// p2p_cube1_<dtype>(link, roles, send, recv, count): all-reduce in one round; ceil(bytes / 12) <= slot_packs.
// p2p_cube2_<dtype>(link, roles, send, recv, count): all-reduce in slices; any count.
// p2p_cube_ag(link, roles, send, recv, bytes): all-gather of `bytes` bytes a rank, at least 1.
//
// `link` is the packet channel's, with an area of kCubeRows rows a buffer (cube.cuh); its entries for ranks that are no
// neighbours are never used. `send` and `recv` are element-aligned, equal or disjoint; `count` is at least 1. Launch:
// one-dimensional, equal on all ranks, resident as a whole, 32 to 512 threads a CTA; cube2 and cube_ag: grid * block <=
// slot_packs. May be launched with programmatic stream serialization.
#include "cube.cuh"

#define P2P_CUBE(T, DTYPE)                                                                                          \
    extern "C" __global__ void __launch_bounds__(512)                                                               \
        p2p_cube1_##DTYPE(const __grid_constant__ p2p::Link link, const __grid_constant__ p2p::CubeRoles roles,     \
                          const T* send, T* recv, size_t count) {                                                   \
        p2p::cube_all_reduce_one_shot<T>(link, roles, send, recv, count);                                           \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(512)                                                               \
        p2p_cube2_##DTYPE(const __grid_constant__ p2p::Link link, const __grid_constant__ p2p::CubeRoles roles,     \
                          const T* send, T* recv, size_t count) {                                                   \
        p2p::cube_all_reduce_two_shot<T>(link, roles, send, recv, count);                                           \
    }

P2P_CUBE(__nv_bfloat16, bf16)
P2P_CUBE(__half, f16)
P2P_CUBE(float, f32)

extern "C" __global__ void __launch_bounds__(512)
    p2p_cube_ag(const __grid_constant__ p2p::Link link, const __grid_constant__ p2p::CubeRoles roles, const char* send,
                char* recv, size_t bytes) {
    p2p::cube_all_gather(link, roles, send, recv, bytes);
}
