//! One case on one rank: makes operands, checks what comes back, and keeps the first failure.

use super::Config;
use super::buffers::{Arena, Region};
use super::data;
use super::reference::{Equality, show};
use crate::addr::{DeviceAddr, StreamHandle};
use crate::device_comm::DeviceComm;
use crate::dtype::DType;
use crate::error::{CommError, Result};
use crate::op::{OpQuery, Support};

/// How the operands of a call lie to each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    /// Disjoint, so many bytes off the alignment of 256.
    Apart { send_offset: usize, recv_offset: usize },
    /// `send` at this byte of `recv`.
    SendInRecv(usize),
    /// `recv` at this byte of `send`.
    RecvInSend(usize),
}

pub(super) struct Case<'r, 'a> {
    pub(super) comm: &'r dyn DeviceComm,
    pub(super) config: &'r Config,
    pub(super) arena: &'r mut Arena<'a>,
    pub(super) rank: usize,
    pub(super) world: usize,
    /// The call under way, for messages.
    pub(super) at: String,
    pub(super) failure: Option<String>,
    pub(super) skipped: Option<String>,
    /// What this rank noted for the judge.
    pub(super) facts: Vec<u64>,
    pub(super) calls: u64,
    /// What the receive buffer of the last out-of-place exchange held before it.
    pub(super) before: Vec<u8>,
    seed: u64,
}

impl<'r, 'a> Case<'r, 'a> {
    pub(super) fn new(
        comm: &'r dyn DeviceComm,
        config: &'r Config,
        arena: &'r mut Arena<'a>,
        seed: u64,
    ) -> Self {
        Self {
            rank: comm.rank(),
            world: comm.size(),
            comm,
            config,
            arena,
            at: "before the first call".into(),
            failure: None,
            skipped: None,
            facts: Vec::new(),
            calls: 0,
            before: Vec::new(),
            seed,
        }
    }

    /// The same case on another communicator (a group), with data of its own.
    pub(super) fn on<'s>(&'s mut self, comm: &'s dyn DeviceComm, salt: u64) -> Case<'s, 'a> {
        let seed = data::random(self.seed, comm.size(), salt as usize);
        Case::new(comm, self.config, self.arena, seed)
    }

    /// Takes over what a case on a group found.
    pub(super) fn absorb(&mut self, calls: u64, failure: Option<String>) {
        self.calls += calls;
        if self.failure.is_none() {
            self.failure = failure;
        }
    }

    /// A seed for the next call's data, the same on all ranks of the communicator.
    pub(super) fn next_seed(&mut self) -> u64 {
        self.seed = data::random(self.seed, 0, 0);
        self.seed
    }

    pub(super) fn stream(&self) -> StreamHandle {
        self.arena.memory().stream()
    }

    /// Records a failure of the call under way; the first one is reported.
    pub(super) fn fail(&mut self, message: impl AsRef<str>) {
        self.failure.get_or_insert_with(|| format!("{}: {}", self.at, message.as_ref()));
    }

    /// Whether the communicator carries the query out; notes the reason if not.
    pub(super) fn supported(&mut self, query: &OpQuery) -> bool {
        match self.comm.supports(query) {
            Support::Yes => true,
            Support::No { reason } => {
                self.skipped.get_or_insert(reason);
                false
            }
        }
    }

    /// Carries out one call on poisoned results and guarded operands, and returns what was received.
    pub(super) fn exchange(
        &mut self,
        send: &[u8],
        recv_len: usize,
        form: Form,
        call: impl FnOnce(DeviceAddr, DeviceAddr) -> Result<()>,
    ) -> Result<Vec<u8>> {
        self.calls += 1;
        match form {
            Form::Apart { send_offset, recv_offset } => {
                let from = self.arena.lay(0, send_offset, send.len())?;
                let to = self.arena.lay(1, recv_offset, recv_len)?;
                self.arena.put(&from, send)?;
                self.before = self.arena.poison(&to)?;
                let addr = |region: &Region| if region.len == 0 { DeviceAddr::NULL } else { region.addr() };
                call(addr(&from), addr(&to))?;
                let received = self.fetch(&to, "recv")?;
                if self.fetch(&from, "send")? != send {
                    self.fail("the send buffer was modified");
                }
                Ok(received)
            }
            Form::SendInRecv(start) => {
                let to = self.arena.lay(1, 0, recv_len)?;
                let mut contents: Vec<u8> = (0..recv_len).map(|index| (index as u8) ^ 0xa7).collect();
                contents[start..start + send.len()].copy_from_slice(send);
                self.arena.put(&to, &contents)?;
                call(to.addr().offset(start as u64), to.addr())?;
                self.fetch(&to, "recv")
            }
            Form::RecvInSend(start) => {
                let from = self.arena.lay(0, 0, send.len())?;
                self.arena.put(&from, send)?;
                call(from.addr(), from.addr().offset(start as u64))?;
                Ok(self.fetch(&from, "send")?[start..start + recv_len].to_vec())
            }
        }
    }

    /// Reads an operand back, having checked its guards.
    pub(super) fn fetch(&mut self, region: &Region, name: &str) -> Result<Vec<u8>> {
        let (bytes, broken) = self.arena.get(region)?;
        if let Some(offset) = broken {
            let place = if offset < 0 {
                format!("{} bytes before", -offset)
            } else {
                format!("{} bytes past the end of", offset - region.len as isize)
            };
            self.fail(format!("wrote {place} the {name} buffer of {} bytes", region.len));
        }
        Ok(bytes)
    }

    /// Checks a result element by element.
    pub(super) fn expect(&mut self, dtype: DType, expected: &[u8], got: &[u8], equality: Equality) {
        if expected == got {
            return;
        }
        let elements = expected.len() / dtype.size();
        for index in 0..elements {
            let (want, have) = (data::at(expected, dtype, index), data::at(got, dtype, index));
            if !equality.holds(dtype, want, have) {
                self.fail(format!(
                    "element {index} of {elements}: expected {}, got {}",
                    show(dtype, want),
                    show(dtype, have)
                ));
                return;
            }
        }
    }

    /// Notes a result that must be the same, bit by bit, on all ranks.
    pub(super) fn note_equal(&mut self, bytes: &[u8]) {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            hash = data::random(hash ^ u64::from_ne_bytes(word), chunk.len(), 0);
        }
        self.facts.push(hash);
    }

    /// Checks that a call was refused as an invalid argument.
    pub(super) fn expect_invalid(&mut self, what: &str, result: Result<()>) -> Result<()> {
        self.calls += 1;
        self.expect_error(what, "InvalidArgument", result, |e| matches!(e, CommError::InvalidArgument { .. }))
    }

    /// Checks that a call was refused in the right way. An error that lost the communicator is passed on.
    pub(super) fn expect_error(
        &mut self,
        what: &str,
        name: &str,
        result: Result<()>,
        right: impl Fn(&CommError) -> bool,
    ) -> Result<()> {
        match result {
            Err(error) if right(&error) => {}
            Err(error) => {
                self.fail(format!("{what}: expected {name}, got: {error}"));
                if error.is_fatal() {
                    return Err(error);
                }
            }
            Ok(()) => self.fail(format!("{what}: expected {name}, but the call was accepted")),
        }
        Ok(())
    }
}
