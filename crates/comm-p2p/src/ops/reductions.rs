//! What sums: all-reduce, reduce and reduce-scatter; and the barrier.

use comm_core::{DType, DeviceAddr, OpKind, ReduceOp, Result, StreamHandle, check};

use super::average::is_average;
use super::is_fast;
use super::staged::{Staging, barrier, copy};
use crate::call::Call;
use crate::comm::P2pComm;
use crate::select::Plan;
use crate::state::Channels;
use crate::usage::Algorithm;

/// Bytes from which a staged all-reduce is worth a second barrier: each rank then reduces a slice instead of everything.
const SLICED: usize = 256 << 10;

/// The address `count` elements of `size` bytes on.
fn at(addr: DeviceAddr, count: usize, size: usize) -> DeviceAddr {
    addr.offset((count * size) as u64)
}

/// What every function here asks of its caller is `DeviceComm`'s safety contract.
#[allow(clippy::missing_safety_doc, reason = "see above")]
impl P2pComm {
    pub(crate) unsafe fn do_all_reduce(
        &self,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        op: ReduceOp,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::AllReduce;
        let checked = check::same_size(send, recv, count, dtype);
        self.compare(KIND, &checked, || {
            format!("{count} {dtype} {op}{}", self.place(recv, count * dtype.size()))
        })?;
        let bytes = checked?;
        let mut call = self.begin(KIND, stream)?;
        call.passes(dtype, count, &[op as u64]);
        let Some(channels) = self.channels(bytes) else {
            return self.local(call, send, recv, bytes, stream);
        };
        if is_average(dtype, op) {
            let algorithm = self.average_all_reduce(&call, channels, (send, recv), count, dtype, stream)?;
            if algorithm != Algorithm::Staged {
                call.finish(algorithm, stream);
                return Ok(());
            }
        }
        if !is_fast(dtype, op) {
            self.stage_reduce(&call, channels, (send, recv), count, (dtype, op), None, stream)?;
            call.finish(Algorithm::Staged, stream);
            return Ok(());
        }
        let limits = self.limits();
        let found = call.owned.table.find(recv, bytes);
        if found.is_none()
            // SAFETY: the caller vouches for the operands.
            && unsafe { self.capture_all_reduce(&mut call, channels, (send, recv), count, dtype, stream) }?
        {
            call.finish(Algorithm::Captured, stream);
            return Ok(());
        }
        let plan = limits.all_reduce(bytes, found.is_some());
        let Plan { algorithm, shape, .. } = plan;
        let kernels = &channels.kernels;
        match (algorithm, found) {
            (Algorithm::OneShot | Algorithm::Lamport, _) => {
                let (channel, wire) = channels.one_hop(algorithm);
                let link = call.link(channel);
                self.share_a_buffer(&call, &link, stream)?;
                // SAFETY: here and below, the channels are live while the communicator is open, the plan is the same
                // on all ranks, and the caller vouches for the operands.
                call.fatal(unsafe {
                    kernels.all_reduce_one_shot((&link, wire), (send, recv), count, dtype, shape, stream)
                })?;
            }
            (Algorithm::Cells | Algorithm::Steps, Some(found)) => {
                call.reaches(&found, recv)?;
                let operands = (send, &found.peers);
                self.store_all_reduce(&call, channels, &plan, operands, (count, dtype), stream)?;
            }
            (Algorithm::Composed, _) => {
                self.composed_all_reduce(&call, channels, (send, recv), count, dtype, stream)?;
            }
            (Algorithm::Staged, _) => {
                self.stage_reduce(&call, channels, (send, recv), count, (dtype, op), None, stream)?;
            }
            (Algorithm::CubeMesh, _) => {
                self.cube_all_reduce(&call, channels, (send, recv), count, dtype, stream)?;
            }
            (Algorithm::Pull, _) => {
                self.pull_all_reduce(&call, channels, (send, recv), count, dtype, shape, stream)?;
            }
            _ => {
                let link = call.link(&channels.lamport);
                self.share_a_buffer(&call, &link, stream)?;
                // SAFETY: see above.
                call.fatal(unsafe {
                    kernels.all_reduce_two_shot(&link, (send, recv), count, dtype, shape, stream)
                })?;
            }
        }
        call.finish(algorithm, stream);
        Ok(())
    }

    pub(crate) unsafe fn do_reduce(
        &self,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        (dtype, op): (DType, ReduceOp),
        root: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::Reduce;
        let checked = check::reduce(&self.shared().info, send, recv, count, dtype, root);
        self.compare(KIND, &checked, || format!("{count} {dtype} {op} to {root}"))?;
        let bytes = checked?;
        let mut call = self.begin(KIND, stream)?;
        call.passes(dtype, count, &[op as u64, root as u64]);
        let Some(channels) = self.channels(bytes) else {
            return self.local(call, send, recv, bytes, stream);
        };
        self.stage_reduce(&call, channels, (send, recv), count, (dtype, op), Some(root), stream)?;
        call.finish(Algorithm::Staged, stream);
        Ok(())
    }

    fn stage_reduce(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        (dtype, op): (DType, ReduceOp),
        root: Option<usize>,
        stream: StreamHandle,
    ) -> Result<()> {
        let (size, rank) = (dtype.size(), self.shared().info.rank);
        let mut staging = Staging::new(call, channels, stream);
        let most = staging.room(1, size) / size;
        let mut done = 0;
        let world = self.shared().info.size;
        while done < count {
            let part = most.min(count - done);
            staging.uses(part * size);
            let fill = |staging: &Staging<'_>, own| staging.copy(at(send, done, size), own, part * size);
            let to = at(recv, done, size);
            if root.is_some() || part * size < SLICED {
                staging.exchange(fill, |staging, halves| match root {
                    Some(root) if root != rank => Ok(()),
                    _ => staging.reduce(halves, 0, to, part, (dtype, op)),
                })?;
            } else {
                // Slices of whole 16-byte units: a rank reduces its own where it lies, and the others fetch it.
                let slice = part.div_ceil(world).next_multiple_of(16);
                let length = |of: usize| part.saturating_sub(of * slice).min(slice);
                let offset = |of: usize| of * slice * size;
                staging.exchange_twice(
                    fill,
                    |staging, halves| match length(rank) {
                        0 => Ok(()),
                        count => {
                            let own = halves[rank].offset(offset(rank) as u64);
                            staging.reduce(halves, offset(rank), own, count, (dtype, op))
                        }
                    },
                    |staging, halves| {
                        (0..world).map(|turn| (rank + turn) % world).try_for_each(|of| {
                            let from = halves[of].offset(offset(of) as u64);
                            staging.copy(from, to.offset(offset(of) as u64), length(of) * size)
                        })
                    },
                )?;
            }
            done += part;
        }
        staging.finish()
    }

    pub(crate) unsafe fn do_reduce_scatter(
        &self,
        (send, recv): (DeviceAddr, DeviceAddr),
        count: usize,
        (dtype, op): (DType, ReduceOp),
        stream: StreamHandle,
    ) -> Result<()> {
        const KIND: OpKind = OpKind::ReduceScatter;
        let info = &self.shared().info;
        let checked = check::reduce_scatter(info, send, recv, count, dtype);
        self.compare(KIND, &checked, || format!("{count} {dtype} {op}"))?;
        let part = checked?;
        let mut call = self.begin(KIND, stream)?;
        call.passes(dtype, count, &[op as u64]);
        let Some(channels) = self.channels(part) else {
            return self.local(call, send, recv, part, stream);
        };
        if is_average(dtype, op) {
            let algorithm =
                self.average_reduce_scatter(&call, channels, (send, recv), count, dtype, stream)?;
            if algorithm != Algorithm::Staged {
                call.finish(algorithm, stream);
                return Ok(());
            }
        }
        let limits = self.limits();
        let plan = limits.reduce_scatter(part);
        if !is_fast(dtype, op) || plan.algorithm == Algorithm::Staged {
            let counts = vec![count; info.size];
            self.stage_reduce_scatter(&call, channels, (send, recv), &counts, (dtype, op), stream)?;
            call.finish(Algorithm::Staged, stream);
            return Ok(());
        }
        self.launch_reduce_scatter(&call, channels, &plan, (send, recv), count, dtype, stream)?;
        call.finish(plan.algorithm, stream);
        Ok(())
    }

    /// A sum reduce-scatter of bf16, f16 or f32 by whatever the plan says.
    pub(super) fn launch_reduce_scatter(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        plan: &Plan,
        operands: (DeviceAddr, DeviceAddr),
        count: usize,
        dtype: DType,
        stream: StreamHandle,
    ) -> Result<()> {
        let (kernels, ctas) = (&channels.kernels, self.shared().base.options.cell_ctas);
        let Plan { algorithm, shape, units, .. } = *plan;
        let link = call.link(match algorithm {
            Algorithm::Steps | Algorithm::Cells => &channels.cells,
            Algorithm::Lines => &channels.lines,
            _ => &channels.lamport,
        });
        // Steps tell even rounds from odd ones.
        if algorithm != Algorithm::Steps {
            self.share_a_buffer(call, &link, stream)?;
        }
        // SAFETY: the channels are live while the communicator is open, the plan is the same on all ranks, and the
        // caller vouches for the operands.
        call.fatal(unsafe {
            match algorithm {
                Algorithm::Steps => {
                    kernels.reduce_scatter_steps((&link, ctas), operands, count, dtype, shape.grid, stream)
                }
                Algorithm::Lines => {
                    kernels.reduce_scatter_lines(&link, operands, count, dtype, shape, stream)
                }
                _ => {
                    let cells = (algorithm == Algorithm::Cells).then_some(units);
                    kernels.reduce_scatter(&link, cells, operands, count, dtype, shape, stream)
                }
            }
        })
    }

    /// `counts[r]` elements come to rank `r`, from parts laid end to end.
    pub(super) fn stage_reduce_scatter(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        counts: &[usize],
        reduction: (DType, ReduceOp),
        stream: StreamHandle,
    ) -> Result<()> {
        let (size, rank) = (reduction.0.size(), self.shared().info.rank);
        let mut staging = Staging::new(call, channels, stream);
        let longest = counts.iter().copied().max().unwrap_or(0);
        let room = staging.room(counts.len(), size).min((longest * size).next_multiple_of(16));
        let most = room / size;
        staging.uses(counts.len() * room);
        let mut done = 0;
        while done < longest {
            let left = |to: usize| counts[to].saturating_sub(done).min(most);
            staging.exchange(
                |staging, own| {
                    let mut begin = 0;
                    for (to, &count) in counts.iter().enumerate() {
                        let from = at(send, begin + done, size);
                        staging.copy(from, own.offset((to * room) as u64), left(to) * size)?;
                        begin += count;
                    }
                    Ok(())
                },
                |staging, halves| match left(rank) {
                    0 => Ok(()),
                    count => staging.reduce(halves, rank * room, at(recv, done, size), count, reduction),
                },
            )?;
            done += most;
        }
        staging.finish()
    }

    pub(crate) unsafe fn do_barrier(&self, stream: StreamHandle) -> Result<()> {
        const KIND: OpKind = OpKind::Barrier;
        self.compare(KIND, &Ok(()), String::new)?;
        let call = self.begin(KIND, stream)?;
        let Some(channels) = &self.shared().channels else {
            call.finish(Algorithm::Local, stream);
            return Ok(());
        };
        barrier(&call, channels, stream)?;
        call.finish(Algorithm::Flags, stream);
        Ok(())
    }

    /// The channels, if there is something to exchange.
    pub(super) fn channels(&self, bytes: usize) -> Option<&Channels> {
        self.shared().channels.as_ref().filter(|_| bytes > 0)
    }

    /// One rank alone, or nothing at all: the result is what is sent.
    pub(super) fn local(
        &self,
        call: Call<'_>,
        send: DeviceAddr,
        recv: DeviceAddr,
        bytes: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        copy(&call, send, recv, bytes, stream)?;
        call.finish(Algorithm::Local, stream);
        Ok(())
    }
}
