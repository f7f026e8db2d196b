//! Why a communicator failed, when a rank learns several things at once.
//!
//! Pure: what a kernel wrote down and what the other ranks' host sides had to say go in, the error for the caller comes
//! out. Asks nobody, and declares nothing.

use std::time::Duration;

use comm_core::{CallSite, CommError, CommInfo, OpKind};
use comm_kernels::p2p::ErrorRecord;

use crate::call::{CALL_KIND_BITS, UNKNOWN_KIND};

/// Values of [`ErrorRecord::cause`].
const TIMED_OUT: u32 = 1;
const UNREGISTERED: u32 = 3;

/// The call that a record's kernel belongs to.
pub(crate) fn call(info: &CommInfo, record: &ErrorRecord) -> CallSite {
    let kind = OpKind::COLLECTIVES.get((record.op & UNKNOWN_KIND as u32) as usize);
    let seq = u64::from(record.op >> CALL_KIND_BITS);
    CallSite::new(&info.name, kind.copied().unwrap_or(OpKind::Poll), seq)
}

/// What a record says by itself.
pub(crate) fn gave_up(info: &CommInfo, record: &ErrorRecord) -> CommError {
    let at = call(info, record);
    if record.cause == UNREGISTERED {
        return CommError::NotRegistered { at };
    }
    if record.cause != TIMED_OUT {
        return CommError::Aborted { at };
    }
    let missing = (0..info.size).filter(|&rank| record.missing >> rank & 1 == 1).collect();
    CommError::Timeout { at, missing, waited: Duration::from_nanos(record.waited_ns) }
}

/// Whether what a host communicator says is why a wait was given up, if one was: a rank that is known to have failed or
/// died is missed for that. It is not if it says no more than the record.
pub(crate) fn explains(said: &CommError, record: Option<&ErrorRecord>) -> bool {
    match (said, record.map(|record| record.cause)) {
        // A rank that ran out of patience first reports the others; what was missed here says more.
        (CommError::PeerFailed { cause, .. }, Some(TIMED_OUT)) => {
            !matches!(**cause, CommError::Timeout { .. })
        }
        // Ranks that replay the same graph too early all make the same mistake.
        (CommError::PeerFailed { .. }, Some(UNREGISTERED)) => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use comm_core::MemoryKind;

    use super::*;

    const ABORTED: u32 = 2;

    fn info() -> CommInfo {
        CommInfo {
            name: "world".into(),
            backend: crate::NAME.into(),
            rank: 0,
            size: 3,
            memory: MemoryKind::Cuda { ordinal: 0 },
        }
    }

    fn record(cause: u32) -> ErrorRecord {
        // All-reduce number 7 missed rank 1; the bit of a rank that does not exist is none.
        let kind = OpKind::COLLECTIVES.iter().position(|&kind| kind == OpKind::AllReduce).unwrap();
        let op = 7 << CALL_KIND_BITS | kind as u32;
        ErrorRecord { cause, op, round: 9, missing: 0b1010, waited_ns: 3_000_000_000 }
    }

    fn reported(cause: CommError) -> CommError {
        let at = CallSite::new("world", OpKind::Poll, 0);
        CommError::PeerFailed { at, rank: 1, cause: Box::new(cause) }
    }

    #[test]
    fn a_record_names_its_call_and_whom_it_missed() {
        let at = CallSite::new("world", OpKind::AllReduce, 7);
        let waited = Duration::from_secs(3);
        let timeout = CommError::Timeout { at: at.clone(), missing: vec![1], waited };
        assert_eq!(gave_up(&info(), &record(TIMED_OUT)), timeout);
        assert_eq!(gave_up(&info(), &record(ABORTED)), CommError::Aborted { at: at.clone() });
        assert_eq!(gave_up(&info(), &record(UNREGISTERED)), CommError::NotRegistered { at });
        let unknown = ErrorRecord { op: u32::MAX, ..record(TIMED_OUT) };
        assert_eq!(call(&info(), &unknown).op, OpKind::Poll);
    }

    #[test]
    fn a_rank_that_is_known_to_have_failed_is_not_just_missing() {
        let cuda = reported(CommError::Cuda { call: "cuEventQuery".into(), code: 700, message: "".into() });
        let died = CommError::PeerDied { at: CallSite::new("world", OpKind::Poll, 0), rank: 1 };
        for said in [&cuda, &died] {
            assert!(explains(said, None));
            assert!(explains(said, Some(&record(TIMED_OUT))), "{said}");
            assert!(explains(said, Some(&record(ABORTED))), "{said}");
        }
        assert!(explains(&died, Some(&record(UNREGISTERED))));
        assert!(!explains(&cuda, Some(&record(UNREGISTERED))));
    }

    #[test]
    fn another_rank_s_timeout_says_less_than_an_own_one() {
        let other = reported(gave_up(&info(), &record(TIMED_OUT)));
        assert!(!explains(&other, Some(&record(TIMED_OUT))));
        assert!(explains(&other, Some(&record(ABORTED))));
        assert!(explains(&other, None));
    }
}
