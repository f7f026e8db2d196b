//! The flag protocol of the peer-to-peer kernels, model-checked.
//!
//! `programs`, `staged`, `cube`, `direct`, `lines` and `steps` write down what one CTA (or one thread, where threads are
//! independent; or several warps, where they go their own ways) of each rank does to shared memory, access by access, as
//! `comm-kernels/cuda/p2p` does it. Three checkers run the same programs behind the same [`memory::Mem`]:
//!
//! - `reordering` (stateright, 2 to 4 ranks): stores of a rank land in any order that its releases and fences allow, and
//!   every interleaving is visited; ranks may crash, be late, and give up.
//! - `holding` (any number of ranks): the same, where that is too much: everything runs at once but what is held back.
//! - `visibility` (loom, 2 ranks): loads may see any value that acquires and releases allow.
//!
//! `handoff` stands by itself: what warps of one CTA tell each other outside of barriers.
//!
//! Every mutant, one protection taken away, must be caught by one of the three. Not modelled: the order of accesses inside a
//! CTA (CTA barriers order them), the order between ordinary stores and those of the bulk copy unit, the host, and the copying
//! of data that no rank shares.

mod cube;
mod direct;
mod handoff;
mod holding;
mod lines;
mod memory;
mod programs;
mod reordering;
mod staged;
mod steps;
mod visibility;
mod writer;
