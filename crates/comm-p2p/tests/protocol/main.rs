//! The flag protocol of the peer-to-peer kernels, model-checked.
//!
//! `programs` writes down what one CTA (or one thread, where threads are independent) of each rank does to shared memory, access
//! by access, as `comm-kernels/cuda/p2p` does it. Two checkers run the same programs behind the same [`memory::Mem`]:
//!
//! - `reordering` (stateright, 3 and 4 ranks): stores of a rank land in any order that its releases and fences allow, and every
//!   interleaving is visited; ranks may crash, be late, and give up.
//! - `visibility` (loom, 2 ranks): loads may see any value that acquires and releases allow.
//!
//! Every mutant, one protection taken away, must be caught by one of the two. Not modelled: the order of accesses inside a CTA
//! (CTA barriers order them), the host, and the copying of data that no rank shares.

mod memory;
mod programs;
mod reordering;
mod visibility;
