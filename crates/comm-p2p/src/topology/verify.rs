//! Whether stores and loads between every two devices, in both directions, move what they should. Drivers have been
//! known to say yes and lose them.
//!
//! Every rank stores a pattern of its own into every other's staging memory and loads every other's; then it looks at
//! what it was given and at what it found.

use comm_core::{CommError, DType, DeviceAddr, HostComm, HostCommExt as _, ReduceOp, Result};
use comm_kernels::Kernels;
use comm_kernels::p2p::{MAX_RANKS, Peers};
use comm_kernels::raw::check;
use cudarc::driver::sys;

use super::cache::{Policy, Verdict};
use crate::stream::Stream;
use crate::symmetric::agree;

/// Words of a pattern.
const WORDS: usize = 64;
const BYTES: usize = WORDS * 4;
/// Patterns in a rank's staging memory: its own, one stored by each rank, one loaded from each.
const PATTERNS: usize = 1 + 2 * MAX_RANKS;

/// Bytes of staging memory that the check needs.
pub(crate) const NEEDED: usize = PATTERNS * BYTES;

fn pattern(rank: usize, word: usize) -> u32 {
    (rank as u32 + 1).wrapping_mul(0x9e37_79b9) ^ (word as u32).wrapping_mul(0x85eb_ca6b)
}

/// Checks unless `verdict` says that it was done. Collective; the context is current. `staging` is every rank's staging
/// memory, null where this rank does not reach.
pub(crate) fn verify(
    host: &dyn HostComm,
    kernels: &Kernels,
    staging: &Peers,
    driver: &str,
    uuids: &[String],
) -> Result<()> {
    let policy = Policy::from_name(std::env::var("COMM_P2P_CHECK").ok().as_deref())
        .map_err(|reason| CommError::invalid("COMM_P2P_CHECK", reason));
    agree(host, &policy.as_ref().map(|_| 0).map_err(Clone::clone))?;
    let policy = policy?;
    let verdict = Verdict::new(driver, uuids);
    // Caches may differ between ranks, so one rank that wants the check gets it.
    let wants = policy == Policy::Force || policy == Policy::Cached && !verdict.has_passed();
    if !host.all_gather(&wants)?.contains(&true) {
        return Ok(());
    }
    let (rank, size) = (host.rank(), host.size());
    let stored = exchange(kernels, staging, rank, size);
    agree(host, &stored.map(|()| 0))?;
    let seen = inspect(kernels, staging, rank, size);
    agree(host, &seen.map(|()| 0))?;
    // A verdict is about every pair.
    if (0..size).all(|rank| !staging[rank].is_null()) {
        verdict.remember();
    }
    Ok(())
}

fn slot(base: DeviceAddr, index: usize) -> DeviceAddr {
    base.offset((index * BYTES) as u64)
}

fn exchange(kernels: &Kernels, staging: &Peers, rank: usize, size: usize) -> Result<()> {
    let stream = Stream::new()?;
    let handle = stream.handle();
    let mine = staging[rank];
    let words: [u32; WORDS] = std::array::from_fn(|word| pattern(rank, word));
    // SAFETY: the slot is as large as the array, which lives until the stream has been waited for.
    check("cuMemcpyHtoDAsync", unsafe {
        sys::cuMemcpyHtoDAsync_v2(mine.0, words.as_ptr().cast(), BYTES, stream.raw())
    })?;
    for peer in (0..size).filter(|&peer| peer != rank && !staging[peer].is_null()) {
        let to = slot(staging[peer], 1 + rank);
        // SAFETY: both slots lie in staging memory that nothing else uses yet.
        unsafe { kernels.reduce(&[mine], to, BYTES, DType::U8, ReduceOp::Sum, handle) }?;
    }
    stream.wait()
}

fn inspect(kernels: &Kernels, staging: &Peers, rank: usize, size: usize) -> Result<()> {
    let stream = Stream::new()?;
    let handle = stream.handle();
    let own = staging[rank];
    let loaded = |peer: usize| slot(own, 1 + MAX_RANKS + peer);
    let peers = || (0..size).filter(|&peer| peer != rank && !staging[peer].is_null());
    for peer in peers() {
        // SAFETY: as in `exchange`; every rank has written its own pattern by now.
        unsafe { kernels.reduce(&[staging[peer]], loaded(peer), BYTES, DType::U8, ReduceOp::Sum, handle) }?;
    }
    stream.wait()?;
    for peer in peers() {
        compare(&stream, slot(own, 1 + peer), peer, || {
            format!("what rank {peer}'s GPU stores into rank {rank}'s memory does not arrive")
        })?;
        compare(&stream, loaded(peer), peer, || {
            format!("rank {rank}'s GPU loads wrong data from rank {peer}'s memory")
        })?;
    }
    Ok(())
}

/// Compares a slot with what `peer` wrote.
fn compare(stream: &Stream, at: DeviceAddr, peer: usize, problem: impl FnOnce() -> String) -> Result<()> {
    let mut words = [0_u32; WORDS];
    // SAFETY: the slot is that large, and so is the array, which lives until the stream has been waited for.
    check("cuMemcpyDtoHAsync", unsafe {
        sys::cuMemcpyDtoHAsync_v2(words.as_mut_ptr().cast(), at.0, BYTES, stream.raw())
    })?;
    stream.wait()?;
    let Some(wrong) = (0..WORDS).find(|&word| words[word] != pattern(peer, word)) else { return Ok(()) };
    Err(CommError::invalid(
        "memory",
        format!(
            "{}: word {wrong} is {:#x}, not {:#x}. Peer-to-peer is broken here; an IOMMU or PCIe access control is a \
             common cause",
            problem(),
            words[wrong],
            pattern(peer, wrong)
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_differ_between_ranks_and_words() {
        let all: std::collections::BTreeSet<u32> =
            (0..8).flat_map(|rank| (0..WORDS).map(move |word| pattern(rank, word))).collect();
        assert_eq!(all.len(), 8 * WORDS);
    }
}
