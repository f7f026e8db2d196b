//! One call: how it begins, what it is known by, and how it ends.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use comm_core::{CommError, DType, DeviceAddr, OpKind, Result, StreamHandle};
use comm_kernels::order::Destination;
use comm_kernels::p2p::Link;
use comm_kernels::raw::Current;

use crate::ledger::{Note, mix};
use crate::state::{Owned, Shared, lock};
use crate::symmetric::table::Found;
use crate::symmetric::{Hold, ipc};
use crate::usage::Algorithm;

/// Bits of a kernel's number that say which operation it belongs to.
pub(crate) const CALL_KIND_BITS: u32 = 5;
const _: () = assert!(OpKind::COLLECTIVES.len() < UNKNOWN_KIND);
pub(crate) const UNKNOWN_KIND: usize = (1 << CALL_KIND_BITS) - 1;

/// A call under way, with the lock held and the device current.
pub(crate) struct Call<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) owned: MutexGuard<'a, Owned>,
    kind: OpKind,
    seq: u64,
    /// What all ranks must pass alike: type, count, and a mixture of the rest.
    alike: (Option<DType>, usize, u64),
    to: Destination,
    _current: Current,
}

impl Shared {
    /// Begins a call: checks that the communicator is fit, makes its device current and takes the lock.
    pub(crate) fn begin(&self, kind: OpKind) -> Result<Call<'_>> {
        self.healthy()?;
        let current = Current::enter(&self.base.context).map_err(|error| self.fail(error))?;
        let owned = lock(&self.owned);
        // It may have failed, or been closed, while this thread waited for the lock.
        self.healthy()?;
        if let Some(record) = owned.words.as_ref().and_then(|words| words.error()) {
            drop(owned);
            return Err(self.fail(self.why(&record)));
        }
        let seq = self.seq.fetch_add(1, Ordering::Relaxed);
        Ok(Call {
            shared: self,
            owned,
            kind,
            seq,
            alike: (None, 0, 0),
            to: Destination::Stream,
            _current: current,
        })
    }

    /// The same for a call that enqueues work on `stream`: behind all calls before, on whatever stream those were.
    pub(crate) fn begin_on(&self, kind: OpKind, stream: StreamHandle) -> Result<Call<'_>> {
        let mut call = self.begin(kind)?;
        call.to = call.owned.order.follow(stream).map_err(|error| self.fail(error))?;
        Ok(call)
    }
}

impl Call<'_> {
    /// A channel, marked with this call for the error record.
    pub(crate) fn link(&self, channel: &Link) -> Link {
        let kind =
            OpKind::COLLECTIVES.iter().position(|&kind| kind == self.kind).unwrap_or(UNKNOWN_KIND) as u32;
        // The number is for people to read; that it wraps after 2^27 calls does no harm.
        Link { op: (self.seq as u32) << CALL_KIND_BITS | kind, ..*channel }
    }

    /// Turns an error of enqueueing into the communicator's failure: other ranks may be waiting for what was not.
    pub(crate) fn fatal<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| self.shared.fail(error))
    }

    /// For a call that stores into the ranks' operands where this rank's lies. Their place is among what all pass alike.
    /// Refuses a registered operand whose memory is no longer what was registered: nothing has been enqueued yet, so the
    /// communicator is unharmed here; the other ranks wait for the call until their timeout.
    pub(crate) fn reaches(&mut self, found: &Found, addr: DeviceAddr) -> Result<()> {
        self.alike.2 = mix(mix(self.alike.2, found.id + 1), found.offset);
        let Some(Hold::Opened(_, Some(registered))) = self.owned.table.hold(found.id) else { return Ok(()) };
        let now = ipc::allocation_id(addr);
        if now.as_ref().is_ok_and(|now| now == registered) {
            return Ok(());
        }
        Err(CommError::StaleHandle {
            handle: format!("registration {} of communicator {:?}", found.id, self.shared.info.name),
            reason: match now {
                Ok(_) => format!("the memory at {addr:?} was freed while registered, and allocated anew"),
                Err(error) => format!("the memory at {addr:?} was freed while registered: {error}"),
            },
        })
    }

    /// What all ranks must pass alike, for the ledger.
    pub(crate) fn passes(&mut self, dtype: DType, count: usize, rest: &[u64]) {
        let more = rest.iter().fold(0, |state, &value| mix(state, value));
        self.alike = (Some(dtype), count, more);
    }

    /// Ends the call, made on `stream`; it counts as used. Captured calls are not written down: a rank may rightly
    /// capture anew when others do not, and which replays meet shows nowhere in the calls.
    pub(crate) fn finish(mut self, algorithm: Algorithm, stream: StreamHandle) {
        let transfers = matches!(self.kind, OpKind::Send | OpKind::Recv | OpKind::Group);
        if let Some(ledger) = &self.shared.ledger
            && !transfers
            && matches!(self.to, Destination::Stream)
        {
            let (dtype, count, more) = self.alike;
            let note = Note { kind: self.kind, algorithm, dtype, count, more };
            self.owned.chain = ledger.add(self.owned.chain, &note);
        }
        self.shared.usage.count(self.kind, algorithm);
        if let Err(error) = self.owned.order.passed(self.to, stream) {
            // The next call returns it, if nothing else is found before.
            self.shared.fail(error);
        }
    }
}
