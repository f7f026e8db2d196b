// Entry points of all-gather and broadcast. All work on bytes.
//
// p2p_ag_packet_w<world>(link, send, recv, bytes): `bytes` per rank, at least 1.
// p2p_bc1_packet_w<world>(link, send, recv, bytes, root): root to all, one hop; at most 2 rounds, that is
//     12 * 2 * threads bytes.
// p2p_bc2_packet_w<world>: through relays, two hops; at most 12 * 2 * threads * (world - 1) bytes.
// p2p_ag_direct_w<world>(link, send, peers, bytes, chunk), p2p_bc_direct_w<world>(link, send, peers, bytes, root,
// chunk):
//     `peers.at[r]` is rank r's result buffer as mapped here. At most kFlagCtas CTAs, at least 32 threads each.
//
// `link` is the packet channel's. Launch: one-dimensional, equal on all ranks, resident as a whole, at most 512 threads
// a CTA; packet forms: threads <= slot_packs.
#include "gather.cuh"

#define P2P_GATHER(WORLD)                                                                                              \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        p2p_ag_packet_w##WORLD(const __grid_constant__ p2p::Link link, const char* send, char* recv, size_t bytes) {   \
        p2p::all_gather_packets<WORLD>(link, send, recv, bytes);                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) p2p_bc1_packet_w##WORLD(                                         \
        const __grid_constant__ p2p::Link link, const char* send, char* recv, size_t bytes, uint32_t root) {           \
        p2p::broadcast_packets<WORLD, false>(link, send, recv, bytes, int(root));                                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512) p2p_bc2_packet_w##WORLD(                                         \
        const __grid_constant__ p2p::Link link, const char* send, char* recv, size_t bytes, uint32_t root) {           \
        p2p::broadcast_packets<WORLD, true>(link, send, recv, bytes, int(root));                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        p2p_ag_direct_w##WORLD(const __grid_constant__ p2p::Link link, const char* send,                               \
                               const __grid_constant__ p2p::Peers recv, size_t bytes, uint32_t chunk) {                \
        p2p::all_gather_direct<WORLD>(link, send, recv, bytes, chunk);                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512)                                                                  \
        p2p_bc_direct_w##WORLD(const __grid_constant__ p2p::Link link, const char* send,                               \
                               const __grid_constant__ p2p::Peers recv, size_t bytes, uint32_t root, uint32_t chunk) { \
        p2p::broadcast_direct<WORLD>(link, send, recv, bytes, int(root), chunk);                                       \
    }

#ifndef P2P_WORLDS
#define P2P_WORLDS(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#endif
P2P_WORLDS(P2P_GATHER)
