//! The operations: arguments are checked, an algorithm is chosen, and its kernels are enqueued.

mod average;
mod captured;
mod choice;
mod composed;
mod cube;
mod moves;
mod norm;
mod pairs;
mod quantized;
mod reductions;
mod staged;
mod stores;
mod vector;

use std::sync::Arc;

use comm_core::{CommError, DType, Deadline, OpKind, ReduceOp, Result, StreamHandle};

use crate::call::Call;
use crate::comm::P2pComm;
use crate::select::{Gaps, Limits};
use crate::state::read;

impl P2pComm {
    /// In checked mode, compares what the ranks are about to do. A rank that refuses the call takes part as well.
    fn compare<T>(&self, kind: OpKind, checked: &Result<T>, describe: impl FnOnce() -> String) -> Result<()> {
        let shared = self.shared();
        if !shared.base.checked {
            return Ok(());
        }
        shared.healthy()?;
        let own = match checked {
            Ok(_) => format!("{kind} of {}", describe()),
            Err(error) => format!("{kind}, refused there: {error}"),
        };
        let all = shared
            .control()?
            .all_gather_bytes(own.as_bytes(), Deadline::after(shared.base.timeout))
            .map_err(|error| shared.fail(shared.relocate(error, kind)))?;
        match all.iter().position(|other| other != own.as_bytes()) {
            Some(rank) if checked.is_ok() => Err(CommError::Mismatch {
                at: shared.at(kind),
                rank,
                expected: own,
                found: String::from_utf8_lossy(&all[rank]).into_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn limits(&self) -> Limits {
        let shared = self.shared();
        let options = &shared.base.options;
        Limits {
            world: shared.info.size,
            packet_slots: options.packet_slots,
            lamport_slots: options.lamport_slots,
            line_slots: shared.channels.as_ref().map_or(0, |channels| channels.lines.slot_packs as usize),
            cell_ctas: options.cell_ctas,
            room: shared.base.room,
            forced: options.algorithm,
            gaps: shared
                .channels
                .as_ref()
                .and_then(|channels| channels.mesh.as_ref())
                .map(|mesh| if mesh.cube.is_some() { Gaps::Cube } else { Gaps::Mesh }),
            table: Arc::clone(&read(&shared.tables).algorithms),
        }
    }

    /// In checked mode, where an operand lies, for the comparison: registered operands must lie alike on all ranks.
    fn place(&self, addr: comm_core::DeviceAddr, bytes: usize) -> String {
        let found = crate::state::lock(&self.shared().owned).table.find(addr, bytes);
        found.map_or_else(String::new, |found| format!(" at {} of region {}", found.offset, found.id))
    }

    fn begin(&self, kind: OpKind, stream: StreamHandle) -> Result<Call<'_>> {
        self.shared().begin_on(kind, stream)
    }
}

/// Whether the kernels with sums of their own take it.
const fn is_fast(dtype: DType, op: ReduceOp) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16) && matches!(op, ReduceOp::Sum)
}
