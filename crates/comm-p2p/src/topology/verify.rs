//! Whether stores and loads between every two devices, in both directions, move what they should. Drivers have been
//! known to say yes and lose them.
//!
//! Every rank stores a pattern of its own into every other's staging memory and loads every other's; then it looks at
//! what it was given and at what it found. The ranks exchange their findings, so that they come to one verdict: where any
//! pair is broken, all of them say that the backend cannot be used.

use std::time::Duration;

use comm_core::{
    CallSite, CommError, DType, Deadline, DeviceAddr, HostComm, HostCommExt as _, OpKind, ReduceOp, Result,
};
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

/// A rank, and one whose memory it stores into.
pub(crate) type Pair = (usize, usize);

/// Of many broken pairs, so many are told of.
const MOST_TOLD: usize = 4;

/// Bytes of staging memory that the check needs.
pub(crate) const NEEDED: usize = PATTERNS * BYTES;

fn pattern(rank: usize, word: usize) -> u32 {
    (rank as u32 + 1).wrapping_mul(0x9e37_79b9) ^ (word as u32).wrapping_mul(0x85eb_ca6b)
}

/// Checks unless the kept verdict says that it was done. Collective; the context is current. `staging` is every rank's
/// staging memory, null where this rank does not reach. For tests, what the first rank of `vanishing` stores into the
/// second's memory is lost: then the check is made in any case, and what comes of it says nothing about the devices.
/// `timeout`: of each wait for the other ranks.
///
/// # Errors
/// [`CommError::Unsupported`] of [`OpKind::Create`], in the same words on every rank, where some pair is broken. What else
/// goes wrong is some rank's own error there, and a [`CommError::PeerFailed`] on the others.
pub(crate) fn verify(
    host: &dyn HostComm,
    kernels: &Kernels,
    staging: &Peers,
    (driver, uuids): (&str, &[String]),
    vanishing: Option<Pair>,
    timeout: Duration,
) -> Result<()> {
    let by = || Deadline::after(timeout);
    let policy = Policy::from_name(std::env::var("COMM_P2P_CHECK").ok().as_deref())
        .map_err(|reason| CommError::invalid("COMM_P2P_CHECK", reason));
    agree(host, &policy.as_ref().map(|_| 0).map_err(Clone::clone), by())?;
    let policy = policy?;
    let verdict = vanishing.is_none().then(|| Verdict::new(driver, uuids));
    // Caches may differ between ranks, so one rank that wants the check gets it.
    let wants = match (&verdict, policy) {
        (None, _) | (_, Policy::Force) => true,
        (_, Policy::Skip) => false,
        (Some(verdict), Policy::Cached) => !verdict.has_passed(),
    };
    if !host.all_gather_by(&wants, by())?.contains(&true) {
        return Ok(());
    }
    let (rank, size) = (host.rank(), host.size());
    let stored = exchange(kernels, staging, (rank, size), vanishing);
    agree(host, &stored.map(|()| 0), by())?;
    let findings = host.all_gather_by(&inspect(kernels, staging, rank, size), by())?;
    judge(CallSite::new(host.name(), OpKind::Create, 0), rank, findings)?;
    // A verdict is about every pair.
    if let Some(verdict) = verdict
        && (0..size).all(|rank| !staging[rank].is_null())
    {
        verdict.remember();
    }
    Ok(())
}

/// What a rank found wrong with the pairs that it is in, or why it could not look.
type Findings = Result<Vec<String>>;

/// The verdict on all ranks' findings.
fn judge(at: CallSite, rank: usize, findings: Vec<Findings>) -> Result<()> {
    // A rank that could not look has met with a failure, which is not that of a pair. It knows by its own error.
    if let Some(Err(error)) = findings.get(rank) {
        return Err(error.clone());
    }
    let mut broken = Vec::new();
    for (rank, findings) in findings.into_iter().enumerate() {
        match findings {
            Ok(found) => broken.extend(found),
            Err(cause) => return Err(CommError::PeerFailed { at, rank, cause: Box::new(cause) }),
        }
    }
    if broken.is_empty() {
        return Ok(());
    }
    let mut reason = broken[..broken.len().min(MOST_TOLD)].join("; ");
    if broken.len() > MOST_TOLD {
        reason.push_str(&format!("; and {} more", broken.len() - MOST_TOLD));
    }
    reason.push_str(
        ". Peer-to-peer is broken here, for which an IOMMU or PCIe access control is the usual cause",
    );
    Err(CommError::unsupported(OpKind::Create, crate::NAME, reason))
}

fn slot(base: DeviceAddr, index: usize) -> DeviceAddr {
    base.offset((index * BYTES) as u64)
}

fn exchange(
    kernels: &Kernels,
    staging: &Peers,
    (rank, size): (usize, usize),
    vanishing: Option<Pair>,
) -> Result<()> {
    let stream = Stream::new()?;
    let handle = stream.handle();
    let mine = staging[rank];
    let words: [u32; WORDS] = std::array::from_fn(|word| pattern(rank, word));
    // SAFETY: the slot is as large as the array, which lives until the stream has been waited for.
    check("cuMemcpyHtoDAsync", unsafe {
        sys::cuMemcpyHtoDAsync_v2(mine.0, words.as_ptr().cast(), BYTES, stream.raw())
    })?;
    let reached = |peer: usize| peer != rank && !staging[peer].is_null() && vanishing != Some((rank, peer));
    for peer in (0..size).filter(|&peer| reached(peer)) {
        let to = slot(staging[peer], 1 + rank);
        // SAFETY: both slots lie in staging memory that nothing else uses yet.
        unsafe { kernels.reduce(&[mine], to, BYTES, DType::U8, ReduceOp::Sum, handle) }?;
    }
    stream.wait()
}

fn inspect(kernels: &Kernels, staging: &Peers, rank: usize, size: usize) -> Findings {
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
    let mut found = Vec::new();
    for peer in peers() {
        found.extend(difference(&stream, slot(own, 1 + peer), peer)?.map(|how| {
            format!("what rank {peer}'s GPU stores into rank {rank}'s memory does not arrive: {how}")
        }));
        found.extend(
            difference(&stream, loaded(peer), peer)?
                .map(|how| format!("rank {rank}'s GPU loads wrong data from rank {peer}'s memory: {how}")),
        );
    }
    Ok(found)
}

/// How a slot differs from what `peer` wrote, if it does.
fn difference(stream: &Stream, at: DeviceAddr, peer: usize) -> Result<Option<String>> {
    let mut words = [0_u32; WORDS];
    // SAFETY: the slot is that large, and so is the array, which lives until the stream has been waited for.
    check("cuMemcpyDtoHAsync", unsafe {
        sys::cuMemcpyDtoHAsync_v2(words.as_mut_ptr().cast(), at.0, BYTES, stream.raw())
    })?;
    stream.wait()?;
    let wrong = (0..WORDS).find(|&word| words[word] != pattern(peer, word));
    Ok(wrong.map(|word| format!("word {word} is {:#x}, not {:#x}", words[word], pattern(peer, word))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The verdicts of all ranks on the same findings.
    fn verdicts(findings: &[Findings]) -> Vec<Result<()>> {
        let at = || CallSite::new("world", OpKind::Create, 0);
        (0..findings.len()).map(|rank| judge(at(), rank, findings.to_vec())).collect()
    }

    #[test]
    fn a_pair_that_one_rank_finds_broken_is_the_same_verdict_on_all() {
        assert_eq!(verdicts(&[Ok(vec![]), Ok(vec![]), Ok(vec![])]), [Ok(()), Ok(()), Ok(())]);
        let all = verdicts(&[Ok(vec![]), Ok(vec!["what rank 0 stores".to_owned()]), Ok(vec![])]);
        assert!(all.iter().all(|verdict| *verdict == all[0]), "{all:?}");
        let Err(CommError::Unsupported { op: OpKind::Create, backend, reason }) = &all[0] else {
            panic!("{all:?}")
        };
        assert!(backend == crate::NAME && reason.contains("what rank 0 stores"), "{reason}");
        let many = verdicts(&[Ok(vec!["one".to_owned(); 3]), Ok(vec!["two".to_owned(); 3])]);
        let text = many[1].as_ref().unwrap_err().to_string();
        assert!(text.contains("two; and 2 more"), "{text}");
    }

    #[test]
    fn a_rank_that_cannot_look_is_no_broken_pair() {
        let error = CommError::Cuda { call: "cuStreamSynchronize".into(), code: 700, message: "x".into() };
        let all = verdicts(&[Ok(vec!["broken".to_owned()]), Err(error.clone()), Ok(vec![])]);
        assert_eq!(all[1], Err(error.clone()));
        for verdict in [&all[0], &all[2]] {
            let Err(CommError::PeerFailed { rank: 1, cause, .. }) = verdict else { panic!("{verdict:?}") };
            assert_eq!(**cause, error);
        }
    }

    #[test]
    fn patterns_differ_between_ranks_and_words() {
        let all: std::collections::BTreeSet<u32> =
            (0..8).flat_map(|rank| (0..WORDS).map(move |word| pattern(rank, word))).collect();
        assert_eq!(all.len(), 8 * WORDS);
    }
}
