//! What algorithms are chosen by, for those who ask, and another table in its place.

use std::sync::PoisonError;

use comm_core::tuning::{Choice, Table};
use comm_core::{CommError, Deadline, OpKind, Result};
use comm_kernels::p2p::Units;

use crate::comm::P2pComm;
use crate::select::Plan;
use crate::state::read;
use crate::tables::{self, InUse};
use crate::usage::Algorithm;

impl P2pComm {
    /// The kind of GPU that all ranks have, as the driver names it, or `mixed`: what a table is looked up by.
    #[must_use]
    pub fn gpu(&self) -> &str {
        &self.shared().base.gpu
    }

    /// The table that algorithms are chosen by, the same on all ranks.
    #[must_use]
    pub fn table(&self) -> Table {
        Table::clone(&read(&self.shared().tables).names)
    }

    /// Chooses algorithms by another table from the next call on. Collective: every rank passes the same table between
    /// the same two calls, while no other thread makes calls. What was enqueued or captured before stays as it is, and
    /// may still run. Groups that are split off choose by what this communicator was created with.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] on all ranks, with the old table in force, if a rank's table is for another number
    /// of ranks, names what cannot be launched, or differs from another rank's; the communicator's failure.
    pub fn set_table(&self, table: &Table) -> Result<()> {
        const KIND: OpKind = OpKind::Create;
        let shared = self.shared();
        shared.healthy()?;
        let fits = match table.world() == shared.info.size {
            true => InUse::new(table),
            false => Err(CommError::invalid(
                "table",
                format!("it is for {} ranks, this communicator has {}", table.world(), shared.info.size),
            )),
        };
        // A rank that refuses its table takes part, so that nobody waits for it.
        let own = match &fits {
            Ok(table) => table.describe(shared.base.options.algorithm),
            Err(error) => format!("none: {error}"),
        };
        let all = shared
            .control()?
            .all_gather_bytes(own.as_bytes(), Deadline::after(shared.base.timeout))
            .map_err(|error| shared.fail(shared.relocate(error, KIND)))?;
        let table = fits?;
        let all: Vec<_> = all.iter().map(|text| String::from_utf8_lossy(text)).collect();
        tables::same_on_all(all.iter().map(AsRef::as_ref))?;
        *shared.tables.write().unwrap_or_else(PoisonError::into_inner) = table;
        Ok(())
    }

    /// How an operation over `bytes` bytes of the full buffer would be launched: sums of bf16, f16 or f32, gathers and
    /// broadcasts, into results that every rank can reach (`registered`) or not. `None` where nothing is chosen by size:
    /// other operations, one rank, no bytes. Every launch parameter that the algorithm has is given.
    #[must_use]
    pub fn planned(&self, op: OpKind, bytes: usize, registered: bool) -> Option<Choice> {
        let world = self.shared().info.size;
        if world < 2 || bytes < world {
            return None;
        }
        let limits = self.limits();
        let plan = match op {
            OpKind::AllReduce => limits.all_reduce(bytes, registered),
            OpKind::ReduceScatter => limits.reduce_scatter(bytes / world),
            OpKind::AllGather => limits.all_gather(bytes / world, registered),
            OpKind::Broadcast => limits.broadcast(bytes, registered),
            _ => return None,
        };
        Some(described(&plan))
    }

    /// The same for a fused norm of `tokens` rows of `row` bytes; `None` with one rank, no rows or no columns.
    #[must_use]
    pub fn planned_norm(&self, tokens: usize, row: usize) -> Option<Choice> {
        let used = self.shared().info.size > 1 && tokens > 0 && row > 0;
        used.then(|| described(&self.limits().norm(tokens, row)))
    }
}

fn described(plan: &Plan) -> Choice {
    let Plan { algorithm, shape, chunk, units } = *plan;
    let some = |number: u32| (number > 0).then_some(number);
    let units = match (algorithm, units) {
        (Algorithm::Cells, Units::Two) => Some(2),
        (Algorithm::Cells, Units::Four) => Some(4),
        _ => None,
    };
    Choice {
        algorithm: algorithm.name().to_owned(),
        grid: some(shape.grid),
        block: some(shape.block),
        chunk: some(chunk),
        units,
    }
}
