// Work that is enqueued ahead and may turn out to be unwanted.
//
// Owns: the look at the word that says so by being 1. Never writes it: in comm-p2p it is `Link::broken` (p2p/link.cuh).
//
// # Why a look at the start is enough
// What makes a copy unwanted is a wait before it in the same stream. The kernel of that wait has ended when this one
// starts, so the word that it set is visible. A wait of another stream that is given up later, even while this kernel
// runs, has nothing to do with this copy: the wait that this copy stands behind ended well. It may then be done in part,
// and nobody is told of it: the flags' kernel behind it looks at the word as well.
#pragma once

#include "dtype.cuh"

__device__ __forceinline__ bool stopped(const u32 *unless) {
    return unless != nullptr && *reinterpret_cast<const volatile u32 *>(unless) == 1;
}
