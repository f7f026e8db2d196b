//! The hub's book of groups and rounds: who has contributed what to which call, who is gone, and what each rank is told.
//!
//! Pure bookkeeping: it never touches a socket or a clock. Every method appends the replies it causes to a list, in
//! the order in which they must be sent.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::host_comm::call::Call;
use crate::host_comm::message::{Cause, Child, Failure, FromHub, WORLD};
use crate::host_comm::wire::{BODY_LIMIT, Frame};
use crate::op::OpKind;

/// Something to send to a rank.
pub(super) struct Reply {
    /// The receiver, in the world's numbering.
    pub(super) to: usize,
    pub(super) message: FromHub,
    /// The frames whose bodies follow one after the other.
    pub(super) bodies: Vec<Arc<Frame>>,
    pub(super) fds: Option<Arc<[OwnedFd]>>,
}

/// What one rank brings to a round.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) frame: Arc<Frame>,
    pub(super) fds: Arc<[OwnedFd]>,
    pub(super) color: Option<u32>,
    pub(super) key: i64,
}

struct Round {
    call: Call,
    opened_by: usize,
    parts: Vec<Option<Part>>,
    /// Members whose wait has ended with a failure.
    told: Vec<bool>,
}

/// What the others know of a member.
#[derive(Clone, PartialEq, Eq)]
enum Status {
    Alive,
    /// Dropped its handle in good order: only a round that still needs it fails.
    Departed,
    /// Its process ended, or a panic dropped its handle: every wait ends.
    Died,
    /// Reported a failure or aborted: every wait ends.
    Failed(Cause),
    /// A call of its own failed: only a round that still needs it fails, so that the others blame the rank that was
    /// missing and not the first to notice.
    GaveUp(Cause),
}

struct Group {
    name: String,
    /// World ranks, in the group's order.
    members: Vec<usize>,
    status: Vec<Status>,
    /// Members that hold no handle any more.
    left: Vec<bool>,
    rounds: HashMap<u64, Round>,
}

/// All groups of a job.
pub(super) struct Groups {
    groups: HashMap<u64, Group>,
    next: u64,
    /// By world rank.
    connected: Vec<bool>,
}

impl Groups {
    pub(super) fn new(size: usize) -> Self {
        let world = Group::new("world".into(), (0..size).collect());
        Self { groups: HashMap::from([(WORLD, world)]), next: WORLD + 1, connected: vec![true; size] }
    }

    /// A member's part of a round has arrived.
    pub(super) fn contribute(
        &mut self,
        from: usize,
        (group_id, seq): (u64, u64),
        call: Call,
        part: Part,
        replies: &mut Vec<Reply>,
    ) {
        let Some((group, rank)) = member(&mut self.groups, group_id, from) else { return };
        let size = group.members.len();
        let round = group.rounds.entry(seq).or_insert_with(|| Round {
            call,
            opened_by: rank,
            parts: vec![None; size],
            told: vec![false; size],
        });
        if round.call != call {
            let failure = Failure::Mismatch { rank: round.opened_by, found: round.call };
            replies.push(Reply::plain(from, FromHub::RoundFailed { group: group_id, seq, failure }));
            return;
        }
        round.parts[rank] = Some(part);
        group.end_hopeless_waits(group_id, seq, replies);
        // A failure that ends every wait has been told to all who contributed; the round is not handed out then, and
        // holds no descriptors until the group ends.
        if group.is_failed() {
            if let Some(round) = group.rounds.get_mut(&seq) {
                round.parts.iter_mut().flatten().for_each(|part| part.fds = Arc::default());
            }
            return;
        }
        if !group.rounds.get(&seq).is_some_and(Round::is_complete) {
            return;
        }
        let Some(round) = group.rounds.remove(&seq) else { return };
        if call.op == OpKind::Split {
            let (name, members) = (format!("{}/{seq}", group.name), group.members.clone());
            self.finish_split((group_id, seq), &name, &members, &round, replies);
        } else {
            round.finish((group_id, seq), &group.members, replies);
        }
    }

    fn finish_split(
        &mut self,
        (group, seq): (u64, u64),
        prefix: &str,
        parents: &[usize],
        round: &Round,
        replies: &mut Vec<Reply>,
    ) {
        let mut colors: BTreeMap<u32, Vec<(i64, usize)>> = BTreeMap::new();
        for (rank, part) in round.parts.iter().enumerate() {
            match part {
                Some(Part { color: Some(color), key, .. }) => {
                    colors.entry(*color).or_default().push((*key, rank));
                }
                _ => replies.push(Reply::plain(parents[rank], FromHub::Split { group, seq, child: None })),
            }
        }
        for (color, mut ranked) in colors {
            ranked.sort_unstable();
            let members: Vec<usize> = ranked.iter().map(|&(_, rank)| parents[rank]).collect();
            let id = self.next;
            self.next += 1;
            let mut child = Group::new(format!("{prefix}.{color}"), members.clone());
            for (rank, &to) in members.iter().enumerate() {
                let view = Child {
                    group: id,
                    name: child.name.clone(),
                    rank,
                    size: members.len(),
                    hub_rank: members.iter().position(|&world_rank| world_rank == 0),
                };
                replies.push(Reply::plain(to, FromHub::Split { group, seq, child: Some(view) }));
            }
            for (rank, &world_rank) in members.iter().enumerate() {
                if !self.connected[world_rank] {
                    child.mark(id, rank, Status::Died, replies);
                }
            }
            self.groups.insert(id, child);
        }
        // Rank 0's process runs the hub and may exit as soon as it has its answer, so it is answered last.
        replies.sort_by_key(|reply| reply.to == 0);
    }

    /// A member reported a failure or aborted.
    pub(super) fn fail(&mut self, from: usize, group: u64, cause: Cause, replies: &mut Vec<Reply>) {
        self.mark(from, group, Status::Failed(cause), replies);
    }

    /// A member's call failed.
    pub(super) fn give_up(&mut self, from: usize, group: u64, cause: Cause, replies: &mut Vec<Reply>) {
        self.mark(from, group, Status::GaveUp(cause), replies);
    }

    /// A member dropped its handle.
    pub(super) fn leave(&mut self, from: usize, group: u64, died: bool, replies: &mut Vec<Reply>) {
        self.mark(from, group, if died { Status::Died } else { Status::Departed }, replies);
        if let Some((group, rank)) = member(&mut self.groups, group, from) {
            group.left[rank] = true;
        }
        self.forget_abandoned();
    }

    /// A rank's connection is gone.
    pub(super) fn disconnect(&mut self, from: usize, replies: &mut Vec<Reply>) {
        self.connected[from] = false;
        let mut ids: Vec<u64> = self.groups.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            self.mark(from, id, Status::Died, replies);
        }
        self.forget_abandoned();
    }

    /// The ranks, in the group's numbering, that have not contributed to a round.
    pub(super) fn missing(&self, group: u64, seq: u64) -> Vec<usize> {
        self.groups.get(&group).and_then(|g| g.rounds.get(&seq)).map(Round::missing).unwrap_or_default()
    }

    /// A rank of the world in a group's numbering.
    pub(super) fn rank_in(&self, group: u64, world_rank: usize) -> Option<usize> {
        self.groups.get(&group)?.members.iter().position(|&member| member == world_rank)
    }

    fn mark(&mut self, from: usize, group_id: u64, status: Status, replies: &mut Vec<Reply>) {
        if let Some((group, rank)) = member(&mut self.groups, group_id, from) {
            group.mark(group_id, rank, status, replies);
        }
    }

    fn forget_abandoned(&mut self) {
        let connected = &self.connected;
        self.groups.retain(|_, group| {
            group.members.iter().zip(&group.left).any(|(&rank, left)| connected[rank] && !left)
        });
    }
}

/// A group and a rank of the world's number in it. Handles that outlive the group are answered by nothing.
fn member(groups: &mut HashMap<u64, Group>, group: u64, world_rank: usize) -> Option<(&mut Group, usize)> {
    let group = groups.get_mut(&group)?;
    let rank = group.members.iter().position(|&member| member == world_rank)?;
    Some((group, rank))
}

impl Group {
    fn new(name: String, members: Vec<usize>) -> Self {
        let status = vec![Status::Alive; members.len()];
        let left = vec![false; members.len()];
        Self { name, members, status, left, rounds: HashMap::new() }
    }

    fn is_failed(&self) -> bool {
        self.status.iter().any(|status| matches!(status, Status::Failed(_)))
    }

    fn mark(&mut self, id: u64, rank: usize, status: Status, replies: &mut Vec<Reply>) {
        // The first mark stays, except that a failure that ends every wait outranks a call that failed.
        match (&self.status[rank], &status) {
            (Status::Alive, _) | (Status::GaveUp(_), Status::Failed(_)) => {}
            _ => return,
        }
        self.status[rank] = status;
        let failure = match &self.status[rank] {
            Status::Died => Some(Failure::Died { rank }),
            Status::Failed(cause) | Status::GaveUp(cause) => {
                Some(Failure::Failed { rank, cause: cause.clone() })
            }
            Status::Alive | Status::Departed => None,
        };
        if let Some(failure) = failure {
            // To the rank itself too: a failure that the hub met in rank 0's process is news to rank 0.
            for (other, &to) in self.members.iter().enumerate() {
                if !self.left[other] {
                    replies.push(Reply::plain(to, FromHub::Noticed { group: id, failure: failure.clone() }));
                }
            }
        }
        let mut pending: Vec<u64> = self.rounds.keys().copied().collect();
        pending.sort_unstable();
        for seq in pending {
            self.end_hopeless_waits(id, seq, replies);
        }
    }

    /// Tells the members that wait for a round that cannot complete.
    fn end_hopeless_waits(&mut self, id: u64, seq: u64, replies: &mut Vec<Reply>) {
        let Some(round) = self.rounds.get(&seq) else { return };
        let missing = round.missing();
        let waiting: Vec<usize> =
            (0..self.members.len()).filter(|&r| round.parts[r].is_some() && !round.told[r]).collect();
        for rank in waiting {
            let Some(failure) = self.failure(&missing) else { continue };
            if let Some(round) = self.rounds.get_mut(&seq) {
                round.told[rank] = true;
            }
            let message = FromHub::RoundFailed { group: id, seq, failure };
            replies.push(Reply::plain(self.members[rank], message));
        }
    }

    /// What ends a wait for the ranks in `missing`. The likeliest root of the trouble goes first: a failure that
    /// ends every wait, a death, a rank that gave up and can say why; then a rank that left, as others do once they
    /// have seen a failure.
    fn failure(&self, missing: &[usize]) -> Option<Failure> {
        let status = || self.status.iter().enumerate();
        let failed = status().find_map(|(r, status)| match status {
            Status::Failed(cause) => Some(Failure::Failed { rank: r, cause: cause.clone() }),
            _ => None,
        });
        // A dead rank that has contributed ends the wait for others too: every survivor is to learn of it now.
        let died = || {
            let dead = self.status.iter().position(|status| *status == Status::Died)?;
            (!missing.is_empty()).then_some(Failure::Died { rank: dead })
        };
        let gave_up = || {
            missing.iter().find_map(|&rank| match &self.status[rank] {
                Status::GaveUp(cause) => Some(Failure::Failed { rank, cause: cause.clone() }),
                _ => None,
            })
        };
        let departed = || {
            missing.iter().find(|&&r| self.status[r] == Status::Departed).map(|&rank| Failure::Died { rank })
        };
        failed.or_else(died).or_else(gave_up).or_else(departed)
    }
}

impl Round {
    fn is_complete(&self) -> bool {
        self.parts.iter().all(Option::is_some)
    }

    fn missing(&self) -> Vec<usize> {
        self.parts.iter().enumerate().filter(|(_, part)| part.is_none()).map(|(rank, _)| rank).collect()
    }

    /// Hands the round's outcome to those who still wait for it.
    fn finish(self, (group, seq): (u64, u64), members: &[usize], replies: &mut Vec<Reply>) {
        let parts: Vec<Part> = self.parts.into_iter().flatten().collect();
        let wanted = |rank: usize| self.call.op != OpKind::HostBroadcast || rank == self.call.root;
        let length =
            |(rank, part): (usize, &Part)| if wanted(rank) { part.frame.body().len() as u64 } else { 0 };
        let lengths: Vec<u64> = parts.iter().enumerate().map(length).collect();
        let total: u64 = lengths.iter().sum();
        let fds: Vec<u32> = parts.iter().map(|part| part.fds.len() as u32).collect();
        let bodies: Vec<Arc<Frame>> = parts
            .iter()
            .enumerate()
            .filter(|&(rank, _)| wanted(rank))
            .map(|(_, part)| part.frame.clone())
            .collect();
        // Rank 0's process runs the hub and may exit as soon as it has its answer, so it is answered last.
        let order = members.iter().enumerate().filter(|(_, to)| **to != 0);
        let order = order.chain(members.iter().enumerate().filter(|(_, to)| **to == 0));
        for (rank, &to) in order {
            if self.told[rank] {
                continue;
            }
            if total > BODY_LIMIT as u64 {
                let failure = Failure::TooLong { total };
                replies.push(Reply::plain(to, FromHub::RoundFailed { group, seq, failure }));
                continue;
            }
            for part in parts.iter().filter(|part| !part.fds.is_empty()) {
                let message = FromHub::Descriptors { count: part.fds.len() as u32 };
                replies.push(Reply { fds: Some(part.fds.clone()), ..Reply::plain(to, message) });
            }
            let message = FromHub::Complete { group, seq, lengths: lengths.clone(), fds: fds.clone() };
            replies.push(Reply { bodies: bodies.clone(), ..Reply::plain(to, message) });
        }
    }
}

impl Reply {
    pub(super) const fn plain(to: usize, message: FromHub) -> Self {
        Self { to, message, bodies: Vec::new(), fds: None }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 3;

    proptest! {
        /// Whatever authenticated ranks say, the book neither panics nor answers a rank that does not exist, and it is
        /// empty once all are gone.
        #[test]
        fn any_messages_in_any_order_are_survived(
            steps in prop::collection::vec((0..7_u8, 0..SIZE, 0..4_u64, 0..3_u64, 0..3_u32), 0..80),
        ) {
            let (mut groups, mut replies) = (Groups::new(SIZE), Vec::new());
            let part = |color| Part { frame: Arc::default(), fds: Arc::default(), color: Some(color), key: 0 };
            for (kind, from, group, seq, color) in steps {
                let out = &mut replies;
                let cause = Cause::new(&crate::CommError::invalid("x", "y"));
                match kind {
                    0 => groups.contribute(from, (group, seq), Call::new(OpKind::Split), part(color), out),
                    1 => groups.contribute(from, (group, seq), Call::new(OpKind::HostBarrier), part(color), out),
                    2 => groups.fail(from, group, cause, out),
                    3 => groups.give_up(from, group, cause, out),
                    4 => groups.leave(from, group, false, out),
                    5 => groups.disconnect(from, out),
                    _ => prop_assert!(groups.missing(group, seq).iter().all(|&rank| rank < SIZE)),
                }
            }
            (0..SIZE).for_each(|rank| groups.disconnect(rank, &mut replies));
            prop_assert!(replies.iter().all(|reply| reply.to < SIZE));
            prop_assert!(groups.groups.is_empty());
        }
    }

    /// One rank may bring more than an even share, as long as all together stay within the limit.
    #[test]
    fn what_the_ranks_bring_together_is_limited_and_not_each_one_s_share() {
        let whole = Arc::new(Frame::of_zeros(BODY_LIMIT));
        for (last, fits) in [(Arc::new(Frame::of_zeros(0)), true), (Arc::new(Frame::of_zeros(1)), false)] {
            let (mut groups, mut replies) = (Groups::new(2), Vec::new());
            for (rank, frame) in [whole.clone(), last].into_iter().enumerate() {
                let part = Part { frame, fds: Arc::default(), color: None, key: 0 };
                groups.contribute(rank, (WORLD, 0), Call::new(OpKind::HostAllGather), part, &mut replies);
            }
            let right = |reply: &Reply| match &reply.message {
                FromHub::Complete { .. } => fits,
                FromHub::RoundFailed { failure: Failure::TooLong { total }, .. } => {
                    !fits && *total == BODY_LIMIT as u64 + 1
                }
                _ => false,
            };
            assert!(replies.len() == 2 && replies.iter().all(right));
        }
    }
}
