//! Watching started ranks until all have ended: events, faults, time limits, the order of ending.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::process::Signal;

use crate::events::{Event, Message, monotonic_nanos};
use crate::launch::leaks::Before;
use crate::launch::ranks::{OUTPUT_PATIENCE, Rank, Ranks};
use crate::launch::{Exit, FAULT_POINT, FaultKind, LaunchReport, LaunchSpec, Mode, RankEnd};
use crate::signal;

/// How often ranks and events are looked at.
const TICK: Duration = Duration::from_millis(5);
/// Between asking a rank to end and making it.
const TERM_GRACE: Duration = Duration::from_secs(2);
/// What the ranks that are left get on top of their communicators' timeout, to notice that another one failed.
const NOTICE_GRACE: Duration = Duration::from_secs(10);

/// Why ranks that still run are ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reason {
    TimeUp,
    Interrupted,
    OthersFailed,
    /// Only a rank that a fault stopped is left.
    FaultOver,
}

pub fn supervise(
    spec: &LaunchSpec,
    mut started: Ranks,
    before: &Before,
    folder: &Path,
    on_event: &mut dyn FnMut(&Message),
) -> Result<LaunchReport> {
    let started_at = Instant::now();
    let mut deadline = started_at + spec.timeout;
    let mut bound = spec.after_fault_point;
    let mut fault_at = None;
    let mut ending: Option<(Reason, Instant)> = None;
    let mut ended_by_us = vec![false; started.ranks.len()];
    loop {
        for rank in &mut started.ranks {
            let messages = rank.drain()?;
            if fault_at.is_none() && messages.iter().any(|message| is_fault_point(spec, message)) {
                fault_at = inject(spec, rank);
            }
            if messages.iter().any(is_at_fault_point)
                && let Some(bound) = bound.take()
            {
                deadline = deadline.min(Instant::now() + bound);
            }
            messages.iter().for_each(&mut *on_event);
            reap(rank)?;
        }
        if started.ranks.iter().all(|rank| rank.ended.is_some()) {
            break;
        }
        match ending {
            None => {
                if let Some(reason) = reason_to_end(spec, &started.ranks, deadline, fault_at.is_some()) {
                    if matches!(reason, Reason::TimeUp | Reason::OthersFailed) {
                        say_what_hangs(spec, &started.ranks, reason, started_at.elapsed());
                    }
                    end(&started.ranks, &mut ended_by_us, Signal::TERM);
                    ending = Some((reason, Instant::now()));
                }
            }
            Some((reason, since)) => {
                if since.elapsed() > TERM_GRACE || reason == Reason::FaultOver {
                    end(&started.ranks, &mut ended_by_us, Signal::KILL);
                }
            }
        }
        std::thread::sleep(TICK);
    }
    // Events that were written between the last look and the end.
    for rank in &mut started.ranks {
        rank.drain()?.iter().for_each(&mut *on_event);
    }
    let groups: Vec<_> = started.ranks.iter().map(|rank| rank.group).collect();
    let mut leaks = before.leaks(&groups, None);
    // Whatever a rank started is ended with it, but it counts as left behind.
    started.ranks.iter().for_each(|rank| rank.signal(Signal::KILL));
    std::mem::take(&mut started.output).finish(OUTPUT_PATIENCE);
    if !signal::interrupted() {
        let changes = before.gpu_memory();
        leaks.extend(changes.leaks);
        changes.untold.iter().for_each(|line| (spec.output)(line));
    }
    let ranks: Vec<RankEnd> = std::iter::zip(&started.ranks, ended_by_us)
        .map(|(rank, by_us)| RankEnd {
            exit: exit_of(rank, by_us),
            done: rank.done,
            last_phase: rank.last_phase.clone(),
        })
        .collect();
    if ranks.iter().all(|end| end.exit == Exit::Code(0)) {
        // A killed rank cannot remove the socket; ranks that ended in good order must have.
        let socket = folder.join("sock");
        if socket.exists() {
            leaks.push(format!("rendezvous socket {}", socket.display()));
        }
    }
    Ok(LaunchReport {
        ranks,
        timed_out: matches!(ending, Some((Reason::TimeUp, _))),
        interrupted: matches!(ending, Some((Reason::Interrupted, _))),
        fault_at,
        leaks,
    })
}

fn is_fault_point(spec: &LaunchSpec, message: &Message) -> bool {
    spec.fault.as_ref().is_some_and(|fault| fault.kind.is_signal() && fault.rank == message.rank)
        && is_at_fault_point(message)
}

fn is_at_fault_point(message: &Message) -> bool {
    matches!(&message.event, Event::Phase(text) if text.contains(FAULT_POINT))
}

fn inject(spec: &LaunchSpec, rank: &Rank) -> Option<u64> {
    let signal = match spec.fault.as_ref()?.kind {
        FaultKind::Kill => Signal::KILL,
        FaultKind::Stop => Signal::STOP,
        _ => return None,
    };
    let now = monotonic_nanos();
    rank.signal(signal);
    Some(now)
}

fn reap(rank: &mut Rank) -> Result<()> {
    if rank.ended.is_none()
        && let Some(status) = rank.child.try_wait()?
    {
        rank.ended = Some((status, Instant::now()));
        rank.sudden_end = None;
    }
    Ok(())
}

fn reason_to_end(spec: &LaunchSpec, ranks: &[Rank], deadline: Instant, fault_done: bool) -> Option<Reason> {
    if signal::interrupted() {
        return Some(Reason::Interrupted);
    }
    if Instant::now() >= deadline {
        return Some(Reason::TimeUp);
    }
    let hit = spec.fault.as_ref().filter(|_| fault_done && spec.mode == Mode::Processes);
    let is_hit = |rank: usize| hit.is_some_and(|fault| fault.rank == rank);
    let mut others = ranks.iter().enumerate().filter(|(rank, _)| !is_hit(*rank)).map(|(_, rank)| rank);
    if hit.is_some() && others.clone().all(|rank| rank.ended.is_some()) {
        return Some(Reason::FaultOver);
    }
    let patience = spec.comm_timeout + NOTICE_GRACE;
    others
        .any(|rank| rank.ended.is_some_and(|(status, at)| !status.success() && at.elapsed() > patience))
        .then_some(Reason::OthersFailed)
}

fn say_what_hangs(spec: &LaunchSpec, ranks: &[Rank], reason: Reason, after: Duration) {
    let why = match reason {
        Reason::TimeUp => format!("time is up after {:.1} s", after.as_secs_f64()),
        _ => "a rank failed and others did not notice".to_owned(),
    };
    (spec.output)(&format!("{why}; ending the job. What each rank did last:"));
    for (rank, state) in ranks.iter().enumerate() {
        let state = match state.ended {
            Some((status, _)) => format!("ended with {status}, after: {}", state.last_phase),
            None => format!("still in: {}", state.last_phase),
        };
        (spec.output)(&format!("  [{rank}] {state}"));
    }
}

fn end(ranks: &[Rank], by_us: &mut [bool], signal: Signal) {
    for (rank, by_us) in ranks.iter().zip(by_us) {
        if rank.ended.is_none() {
            rank.signal(signal);
            *by_us = true;
        }
    }
}

fn exit_of(rank: &Rank, by_us: bool) -> Exit {
    let Some((status, _)) = rank.ended else { return Exit::Ended };
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, _) if by_us => Exit::Ended,
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Ended,
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
