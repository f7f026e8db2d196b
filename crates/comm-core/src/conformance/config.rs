//! What a run of the suite covers.

use std::time::Duration;

use crate::op::OpKind;

/// How much of the suite runs, and what the backend promises beyond the contract.
///
/// All ranks pass equal values.
#[derive(Clone, PartialEq, Debug)]
pub struct Config {
    /// Every datum derives from it. Another seed tests other data.
    pub seed: u64,
    /// Runs only the cases whose name contains this, for example `all_reduce/bf16`.
    pub filter: Option<String>,
    /// The largest operand, in bytes. Cases that need more are left out.
    pub max_bytes: usize,
    /// A few counts and types instead of all.
    pub quick: bool,
    /// Operations that are not to run, each with the reason that the report gives.
    pub skip: Vec<(OpKind, String)>,
    /// The backend sums in rank order with `f32` accumulation, as [`ReduceOp`](crate::ReduceOp) says, so sums of any
    /// values are compared bit by bit. Without it sums of arbitrary values need only be close, and averages of low
    /// precision over a number of ranks that is no power of two may be off by one unit in the last place per rank.
    pub ordered_sums: bool,
    /// Minima and maxima of NaNs are NaN, as [`ReduceOp`](crate::ReduceOp) says. Without it no NaNs are tried.
    pub nan_propagates: bool,
    /// The last case closes the communicator.
    pub close: bool,
    /// The communicator's timeout ([`run_threads`](super::run_threads) creates it with this). The suite waits for ranks
    /// somewhat longer, so that it hears the communicator's own verdict first.
    pub timeout: Duration,
    /// [`run_threads`](super::run_threads) gives up after this long, whatever the ranks do.
    pub limit: Duration,
    /// [`run_threads`](super::run_threads) creates the communicator in checked mode, and mismatched calls are tried too.
    pub checked: bool,
    /// Options handed to the factory by [`run_threads`](super::run_threads).
    pub options: Vec<(String, String)>,
}

impl Config {
    /// Everything.
    #[must_use]
    pub fn full() -> Self {
        Self {
            seed: 0x5eed,
            filter: None,
            max_bytes: 64 << 20,
            quick: false,
            skip: Vec::new(),
            ordered_sums: true,
            nan_propagates: true,
            close: true,
            timeout: Duration::from_secs(10),
            limit: Duration::from_secs(600),
            checked: false,
            options: Vec::new(),
        }
    }

    /// Every operation, with fewer types and counts.
    #[must_use]
    pub fn quick() -> Self {
        Self { quick: true, max_bytes: 8 << 20, ..Self::full() }
    }

    /// The same configuration, running only cases whose name contains `filter`.
    #[must_use]
    pub fn only(self, filter: impl Into<String>) -> Self {
        Self { filter: Some(filter.into()), ..self }
    }

    /// How long the suite waits for the other ranks after a case: twice the communicator's timeout (a case may end with
    /// two calls that time out) and a margin.
    pub(super) fn patience(&self) -> Duration {
        self.timeout.saturating_mul(2).saturating_add(Duration::from_secs(2))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::full()
    }
}
