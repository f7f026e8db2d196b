//! Whether what the ranks saw of a fault is what reliability asks for.

use comm_core::CommError;
use std::time::Duration;

use crate::events::{CaseResult, GoodCall};
use crate::launch::{Fault, FaultKind};

/// How soon a failure that can be noticed must be.
const NOTICE: Duration = Duration::from_secs(1);
/// How long after the timeout a timeout may be reported.
const LATE: Duration = Duration::from_millis(500);
/// A clock read on another thread or process, and one scheduling delay.
const EARLY: Duration = Duration::from_millis(20);

/// A failed call as a rank reported it. Times are `CLOCK_MONOTONIC` nanoseconds.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The rank.
    pub rank: usize,
    /// The error.
    pub error: CommError,
    /// When the call began.
    pub began: u64,
    /// When it returned.
    pub returned: u64,
    /// The call before it, which this rank took for good.
    pub before: Option<GoodCall>,
    /// When the rank had dropped its communicator.
    pub dropped: Option<u64>,
}

impl Seen {
    /// What tells a wrong judgement from a slow thread: how long the call before took that was taken for good, how long
    /// the rank then took to make the next, and what the error says of its own wait.
    fn circumstances(&self) -> String {
        let span = |from: u64, to: u64| Duration::from_nanos(to.saturating_sub(from));
        let before = match &self.before {
            Some(good) => format!(
                "call #{} before it took {:?} and was good, the next began {:?} later",
                good.index,
                span(good.began, good.returned),
                span(good.returned, self.began)
            ),
            None => "it was the first call".to_owned(),
        };
        format!("{before}; the error: {}", self.error)
    }
}

/// Everything known about one run of a fault test.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The fault.
    pub fault: &'a Fault,
    /// Ranks.
    pub world: usize,
    /// The communicator's timeout.
    pub timeout: Duration,
    /// When the launcher brought the fault about, if it did.
    pub fault_at: Option<u64>,
    /// The failed calls.
    pub seen: &'a [Seen],
    /// For each rank that reported it, whether it could make a new communicator.
    pub went_on: &'a [(usize, CaseResult)],
}

impl Evidence<'_> {
    /// What happened when, one line each in that order: by the clock, and so comparable with what the ranks logged.
    pub fn history(&self) -> Vec<String> {
        let hit = |rank| if rank == self.fault.rank { " (hit)" } else { "" };
        let mut events = Vec::new();
        events.extend(self.fault_at.map(|at| (at, format!("rank {} was sent a signal", self.fault.rank))));
        for seen in self.seen {
            let who = format!("rank {}{}", seen.rank, hit(seen.rank));
            events.push((seen.began, format!("{who} began the call that failed")));
            events.push((seen.returned, format!("{who} saw: {}", seen.error)));
            events.extend(seen.dropped.map(|at| (at, format!("{who} had dropped its communicator"))));
        }
        events.sort_by_key(|(at, _)| *at);
        let line = |(at, what)| format!("{:.6} s, {what}", Duration::from_nanos(at).as_secs_f64());
        events.into_iter().map(line).collect()
    }
}

/// What is wrong, one line each; empty when all is as it should be.
pub fn judge(evidence: &Evidence<'_>) -> Vec<String> {
    let mut problems = Vec::new();
    for rank in 0..evidence.world {
        let seen = evidence.seen.iter().find(|seen| seen.rank == rank);
        if rank == evidence.fault.rank {
            if let Err(problem) = judge_hit(evidence.fault.kind, seen) {
                problems.push(format!("rank {rank} (hit): {problem}"));
            }
            continue;
        }
        match seen {
            None => problems.push(format!("rank {rank} reported no failure")),
            Some(seen) => {
                if let Err(problem) = judge_survivor(evidence, seen) {
                    problems.push(format!("rank {rank}: {problem}"));
                }
            }
        }
        match evidence.went_on.iter().find(|(other, _)| *other == rank) {
            Some((_, CaseResult::Passed)) => {}
            Some((_, other)) => problems.push(format!("rank {rank} could not go on: {other:?}")),
            None => problems.push(format!("rank {rank} did not try to make a new communicator")),
        }
    }
    problems
}

fn judge_hit(kind: FaultKind, seen: Option<&Seen>) -> Result<(), String> {
    match (kind, seen.map(|seen| &seen.error)) {
        (FaultKind::Abort, Some(CommError::Aborted { .. }))
        | (FaultKind::CudaError, Some(CommError::Cuda { .. }))
        | (FaultKind::Kill | FaultKind::Stop | FaultKind::Late, None) => Ok(()),
        (FaultKind::Kill | FaultKind::Stop | FaultKind::Late, Some(error)) => {
            Err(format!("reported {error}, before the fault"))
        }
        (_, Some(error)) => Err(format!("reported: {error}")),
        (_, None) => Err("reported nothing".into()),
    }
}

fn judge_survivor(evidence: &Evidence<'_>, seen: &Seen) -> Result<(), String> {
    let culprit = evidence.fault.rank;
    let error = &seen.error;
    let since = |start: u64| Duration::from_nanos(seen.returned.saturating_sub(start));
    match evidence.fault.kind {
        FaultKind::Kill => {
            let CommError::PeerDied { rank, .. } = error else {
                return Err(format!("not PeerDied: {error}"));
            };
            if *rank != culprit {
                return Err(format!("blamed rank {rank}: {error}"));
            }
            let at = evidence.fault_at.ok_or("the fault did not happen")?;
            within(since(at), NOTICE)?;
            believed_in_time(evidence, seen)
        }
        FaultKind::Stop | FaultKind::Late => {
            let CommError::Timeout { missing, .. } = error else {
                return Err(format!("not Timeout: {error}"));
            };
            if !missing.contains(&culprit) {
                return Err(format!("rank {culprit} is not among the missing: {error}"));
            }
            let waited = since(seen.began);
            if waited + EARLY < evidence.timeout {
                let circumstances = seen.circumstances();
                return Err(format!("gave up after {waited:?}, before the timeout ({circumstances})"));
            }
            within(waited, evidence.timeout + LATE)?;
            believed_in_time(evidence, seen)
        }
        FaultKind::CudaError | FaultKind::Abort => {
            let CommError::PeerFailed { rank, .. } = error else {
                return Err(format!("not PeerFailed: {error}"));
            };
            if *rank != culprit {
                return Err(format!("blamed rank {rank}: {error}"));
            }
            let hit = evidence.seen.iter().find(|other| other.rank == culprit);
            within(since(hit.ok_or("the hit rank reported nothing")?.returned), NOTICE)
        }
    }
}

/// A call that no rank could finish without the missing one, and that ended all the same, was ended by an abort: one that
/// began after the fault, or outlasted the timeout.
fn believed_in_time(evidence: &Evidence<'_>, seen: &Seen) -> Result<(), String> {
    let Some(good) = &seen.before else { return Ok(()) };
    let took = Duration::from_nanos(good.returned.saturating_sub(good.began));
    let early = u64::try_from(EARLY.as_nanos()).unwrap_or(u64::MAX);
    let began_after = evidence.fault_at.is_some_and(|at| good.began > at.saturating_add(early));
    if !began_after && took + EARLY < evidence.timeout {
        return Ok(());
    }
    Err(format!("took a call for good that could not be ({})", seen.circumstances()))
}

fn within(took: Duration, limit: Duration) -> Result<(), String> {
    if took <= limit { Ok(()) } else { Err(format!("took {took:?}, more than {limit:?}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use comm_core::{CallSite, OpKind};

    const MS: u64 = 1_000_000;

    fn at() -> CallSite {
        CallSite::new("world", OpKind::AllReduce, 7)
    }

    fn seen(rank: usize, error: CommError, began: u64, returned: u64) -> Seen {
        Seen { rank, error, began: began * MS, returned: returned * MS, before: None, dropped: None }
    }

    fn problems(kind: FaultKind, seen: &[Seen], went_on: CaseResult) -> Vec<String> {
        let fault = Fault { kind, rank: 1, case: None };
        judge(&Evidence {
            fault: &fault,
            world: 2,
            timeout: Duration::from_secs(3),
            fault_at: kind.is_signal().then_some(1000 * MS),
            seen,
            went_on: &[(0, went_on)],
        })
    }

    #[test]
    fn a_death_must_be_blamed_on_the_dead_in_time() {
        let died = |rank, returned| [seen(0, CommError::PeerDied { at: at(), rank }, 990, returned)];
        assert!(problems(FaultKind::Kill, &died(1, 1800), CaseResult::Passed).is_empty());
        assert!(problems(FaultKind::Kill, &died(1, 2100), CaseResult::Passed)[0].contains("more than"));
        assert!(problems(FaultKind::Kill, &died(0, 1800), CaseResult::Passed)[0].contains("blamed rank 0"));
        assert!(problems(FaultKind::Kill, &[], CaseResult::Passed)[0].contains("no failure"));
        let stuck = CaseResult::Failed("no".into());
        assert!(problems(FaultKind::Kill, &died(1, 1800), stuck)[0].contains("could not go on"));
    }

    #[test]
    fn a_timeout_must_come_in_its_window() {
        let timeout = |missing: &[usize], returned| {
            let waited = Duration::from_secs(3);
            [seen(0, CommError::Timeout { at: at(), missing: missing.to_vec(), waited }, 1000, returned)]
        };
        assert!(problems(FaultKind::Stop, &timeout(&[1], 4300), CaseResult::Passed).is_empty());
        assert!(problems(FaultKind::Stop, &timeout(&[1], 4600), CaseResult::Passed)[0].contains("more than"));
        assert!(
            problems(FaultKind::Late, &timeout(&[1], 3000), CaseResult::Passed)[0]
                .contains("before the timeout")
        );
        assert!(problems(FaultKind::Stop, &timeout(&[0], 4300), CaseResult::Passed)[0].contains("not among"));
    }

    #[test]
    fn a_call_that_an_abort_ended_must_not_be_taken_for_good() {
        let error = CommError::Timeout { at: at(), missing: vec![1], waited: Duration::from_millis(3_170) };
        let call = |began, returned| GoodCall { index: 41, began: began * MS, returned: returned * MS };
        let after =
            |good, began, returned| Seen { before: Some(good), ..seen(0, error.clone(), began, returned) };
        let good = after(call(900, 1_000), 1_000, 4_300);
        assert!(problems(FaultKind::Stop, &[good], CaseResult::Passed).is_empty());
        // The next call failed at once, because the failure had been on its way.
        let early = after(call(1_000, 4_200), 4_201, 4_204);
        let told = problems(FaultKind::Stop, &[early], CaseResult::Passed);
        assert!(
            told[0].contains("gave up after 3ms") && told[0].contains("call #41 before it took 3.2s"),
            "{told:?}"
        );
        // The next call was left in peace for a whole timeout.
        let late = after(call(1_000, 4_200), 4_201, 7_300);
        assert!(problems(FaultKind::Stop, &[late], CaseResult::Passed)[0].contains("took a call for good"));
        // No call that began after the death can be good.
        let died = CommError::PeerDied { at: at(), rank: 1 };
        let dead = |good| Seen { before: Some(good), ..seen(0, died.clone(), 1_300, 1_400) };
        let told = problems(FaultKind::Kill, &[dead(call(1_100, 1_300))], CaseResult::Passed);
        assert!(told[0].contains("took a call for good"), "{told:?}");
        assert!(problems(FaultKind::Kill, &[dead(call(990, 1_010))], CaseResult::Passed).is_empty());
    }

    #[test]
    fn a_device_s_error_is_told_in_time_and_the_history_says_who_was_when() {
        let cuda = CommError::Cuda { call: "cuEventQuery".into(), code: 700, message: "illegal".into() };
        let told = CommError::PeerFailed { at: at(), rank: 1, cause: Box::new(cuda.clone()) };
        let hit = Seen { dropped: Some(1_202 * MS), ..seen(1, cuda, 1_000, 1_201) };
        let good = [hit.clone(), seen(0, told, 1_000, 1_230)];
        assert!(problems(FaultKind::CudaError, &good, CaseResult::Passed).is_empty());
        let waited = Duration::from_secs(3);
        let missed = CommError::Timeout { at: at(), missing: vec![1], waited };
        let bad = [seen(0, missed, 1_001, 4_001), hit];
        assert!(problems(FaultKind::CudaError, &bad, CaseResult::Passed)[0].contains("not PeerFailed"));
        let fault = Fault { kind: FaultKind::CudaError, rank: 1, case: None };
        let timeout = Duration::from_secs(3);
        let history =
            Evidence { fault: &fault, world: 2, timeout, fault_at: None, seen: &bad, went_on: &[] }.history();
        assert_eq!(history.len(), 5);
        for (line, part) in history.iter().zip([
            "1.000000 s, rank 1 (hit) began",
            "1.001000 s, rank 0 began",
            "1.201000 s, rank 1 (hit) saw: CUDA call cuEventQuery",
            "1.202000 s, rank 1 (hit) had dropped",
            "4.001000 s, rank 0 saw: all_reduce #7",
        ]) {
            assert!(line.contains(part), "{line}");
        }
    }

    #[test]
    fn an_abort_is_seen_as_such_by_the_one_and_as_a_failure_by_the_others() {
        let cause = Box::new(CommError::Aborted { at: at() });
        let good = [
            seen(1, CommError::Aborted { at: at() }, 1000, 1200),
            seen(0, CommError::PeerFailed { at: at(), rank: 1, cause }, 1000, 1300),
        ];
        assert!(problems(FaultKind::Abort, &good, CaseResult::Passed).is_empty());
        assert!(problems(FaultKind::Abort, &good[1..], CaseResult::Passed)[0].contains("reported nothing"));
        let error = CommError::PeerDied { at: at(), rank: 1 };
        let bad = [good[0].clone(), seen(0, error, 1000, 1300)];
        assert!(problems(FaultKind::Abort, &bad, CaseResult::Passed)[0].contains("not PeerFailed"));
    }
}
