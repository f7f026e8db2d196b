//! The call by which ranks get to know each other's captured operands.

use std::collections::BTreeMap;

use comm_core::{CommError, DeviceAddr, HostCommExt as _, OpKind, Result};
use comm_kernels::p2p::CapturedEntry;
use serde::{Deserialize, Serialize};

use super::entries::Number;
use crate::comm::P2pComm;
use crate::state::lock;
use crate::symmetric::ipc::{self, Export};

/// One rank's operand.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Offer {
    number: Number,
    bytes: u64,
    export: Result<Export, String>,
}

/// An operand that all ranks hold, with every rank's export.
type Common = (Number, Vec<Result<Export, String>>);

/// The operands that all ranks offer, in order, or the first whose lengths differ: the rank, and the lengths there and
/// on rank 0. What a rank does not offer has gone there with its graph, and is not replayed any more.
fn common(all: Vec<Vec<Offer>>) -> Result<Vec<Common>, (usize, u64, u64)> {
    let mut ranks: Vec<BTreeMap<Number, Offer>> = all
        .into_iter()
        .map(|offers| offers.into_iter().map(|offer| (offer.number, offer)).collect())
        .collect();
    let Some(first) = ranks.first() else { return Ok(Vec::new()) };
    let numbers: Vec<Number> = first.keys().copied().collect();
    let mut found = Vec::new();
    for number in numbers {
        let offers: Vec<Offer> = ranks.iter_mut().filter_map(|rank| rank.remove(&number)).collect();
        if offers.len() < ranks.len() {
            continue;
        }
        let bytes = offers[0].bytes;
        if let Some(rank) = offers.iter().position(|offer| offer.bytes != bytes) {
            return Err((rank, offers[rank].bytes, bytes));
        }
        found.push((number, offers.into_iter().map(|offer| offer.export).collect()));
    }
    Ok(found)
}

impl P2pComm {
    /// The results of captured calls that graphs hold entries for; see the option `p2p.graph_registration`.
    #[must_use]
    pub fn captured_operands(&self) -> usize {
        lock(&self.shared().owned).captured.as_ref().map_or(0, |captured| captured.entries.len())
    }

    /// The results of captured calls that have been registered and yet travel by scratch memory, each with the reason:
    /// that of the first rank that could not make its own known, or not reach another's.
    #[must_use]
    pub fn captured_staging_reasons(&self) -> Vec<(DeviceAddr, String)> {
        let owned = lock(&self.shared().owned);
        let captured = owned.captured.iter();
        captured
            .flat_map(|captured| captured.entries.obstacles())
            .map(|(addr, reason)| (addr, reason.to_owned()))
            .collect()
    }

    pub(crate) fn register_captured_operands(&self) -> Result<()> {
        const KIND: OpKind = OpKind::Register;
        let shared = self.shared();
        let mut call = shared.begin(KIND)?;
        // All ranks have a table or none has: they pass the same options.
        let Some(captured) = &mut call.owned.captured else { return Ok(()) };
        let taken_back = captured.take_back();
        let host = shared.control()?;
        let own: Vec<Offer> = captured
            .entries
            .awaiting()
            .map(|(number, entry)| Offer {
                number,
                bytes: entry.bytes as u64,
                export: ipc::export(entry.addr, entry.bytes, shared.base.ordinal, host.same_process()),
            })
            .collect();
        let slots: BTreeMap<Number, (u32, DeviceAddr)> =
            captured.entries.awaiting().map(|(number, entry)| (number, (entry.slot, entry.addr))).collect();
        call.fatal(taken_back)?;
        let all =
            host.all_gather_by(&own, shared.deadline()).map_err(|error| self.lost(&*host, KIND, error))?;
        let common = common(all).map_err(|(rank, found, expected)| CommError::Mismatch {
            at: shared.at(KIND),
            rank,
            expected: format!("a captured result of {expected} bytes"),
            found: format!("{found} bytes"),
        })?;
        let opened: Vec<_> = common
            .into_iter()
            .filter_map(|(number, exports)| {
                let (slot, addr) = *slots.get(&number)?;
                Some((number, slot, self.open(exports, addr)))
            })
            .collect();
        // One rank that needs scratch memory makes all of them: their kernels exchange by one schedule.
        let own: Vec<Option<String>> =
            opened.iter().map(|(.., outcome)| outcome.as_ref().err().cloned()).collect();
        let obstacles: Vec<Vec<Option<String>>> =
            host.all_gather_by(&own, shared.deadline()).map_err(|error| self.lost(&*host, KIND, error))?;
        let (mut words, mut settled) = (Vec::new(), Vec::new());
        for (index, (number, slot, outcome)) in opened.into_iter().enumerate() {
            let obstacle = obstacles
                .iter()
                .enumerate()
                .find_map(|(rank, reasons)| Some(format!("rank {rank}: {}", reasons.get(index)?.as_ref()?)));
            let outcome = match (outcome, obstacle) {
                (Ok((peers, hold)), None) => {
                    words.push((slot, CapturedEntry::mapped(peers)));
                    Ok(hold)
                }
                (_, obstacle) => {
                    let reason = obstacle.unwrap_or_default();
                    tracing::debug!(
                        comm = shared.info.name,
                        number,
                        reason,
                        "captured result will go by way of scratch memory"
                    );
                    words.push((slot, CapturedEntry::scratch()));
                    Err(reason)
                }
            };
            settled.push((number, outcome));
        }
        let written = match &call.owned.captured {
            Some(captured) => captured.write(&words),
            None => Ok(()),
        };
        call.fatal(written)?;
        if let Some(captured) = &mut call.owned.captured {
            settled.into_iter().for_each(|(number, outcome)| captured.entries.settle(number, outcome));
        }
        shared.meet_if_shared(&*host).map_err(|error| self.lost(&*host, KIND, error))?;
        ipc::close_unused(shared.base.ordinal);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(number: Number, bytes: u64) -> Offer {
        Offer { number, bytes, export: Err(format!("{number}")) }
    }

    #[test]
    fn what_one_rank_has_dropped_no_rank_registers() {
        let all = vec![
            vec![offer(0, 8), offer(2, 16), offer(5, 8)],
            vec![offer(1, 8), offer(2, 16), offer(5, 8)],
            vec![offer(0, 8), offer(1, 8), offer(2, 16), offer(5, 8)],
        ];
        let common = common(all).unwrap();
        assert_eq!(common.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [2, 5]);
        assert!(common.iter().all(|(number, exports)| {
            exports.len() == 3
                && exports.iter().all(|export| export.as_ref().err() == Some(&number.to_string()))
        }));
    }

    #[test]
    fn lengths_that_differ_are_named() {
        let all = vec![vec![offer(3, 8)], vec![offer(3, 8)], vec![offer(3, 9)]];
        assert_eq!(common(all).unwrap_err(), (2, 9, 8));
        assert!(common(Vec::new()).unwrap().is_empty());
    }
}
