//! Wrong arguments: refused on every rank, with the communicator as usable as before.

use super::super::case::Case;
use super::super::runner::Runner;
use super::issue::{COUNT, Operands, quantized, query};
use super::{moves, reductions};
use crate::addr::{DeviceAddr, StreamHandle};
use crate::device_comm::{DeviceComm, P2pOp};
use crate::dtype::{DType, ReduceOp};
use crate::error::Result;
use crate::fused::{Block2d, NormQuantScale, NormQuantization, RmsNormArgs, TwoGroupNormArgs};
use crate::op::OpKind;

const TYPE: DType = DType::F32;
const NULL: DeviceAddr = DeviceAddr::NULL;
/// More elements than an address space holds.
const HUGE: usize = usize::MAX / 2;

pub(super) fn run(runner: &mut Runner<'_>) {
    for kind in OpKind::COLLECTIVES.into_iter().filter(|&kind| kind != OpKind::Barrier) {
        runner.case(kind, &format!("{kind}/arguments"), |case| {
            if !case.supported(&query(kind, TYPE)) {
                return Ok(());
            }
            let operands = Operands::new(case)?;
            let mut bad = Bad { case, kind };
            bad.calls(operands)?;
            reductions::simple(bad.case, TYPE, ReduceOp::Sum, 257)?;
            moves::simple(bad.case, TYPE, 257)
        });
    }
}

struct Bad<'c, 'r, 'a> {
    case: &'c mut Case<'r, 'a>,
    kind: OpKind,
}

/// A call by `send`, `recv` and count.
type OperandsCall<'f> =
    &'f dyn Fn(&dyn DeviceComm, DeviceAddr, DeviceAddr, usize, StreamHandle) -> Result<()>;
type Call<'f> = &'f dyn Fn(&dyn DeviceComm, StreamHandle) -> Result<()>;

impl Bad<'_, '_, '_> {
    fn refuse(&mut self, what: &str, call: Call<'_>) -> Result<()> {
        self.case.at = format!("{} with {what}", self.kind);
        let result = call(self.case.comm, self.case.stream());
        self.case.expect_invalid("the call", result)
    }

    /// Calls with two operands, a count, and perhaps a root: what is wrong with any of these.
    fn operands(&mut self, Operands { a, b }: Operands, call: OperandsCall<'_>) -> Result<()> {
        let rooted = matches!(self.kind, OpKind::Broadcast | OpKind::Reduce);
        // The operand that a rooted operation ignores on other ranks is not what is tried here.
        if !rooted || self.kind == OpKind::Reduce {
            self.refuse("a null send", &|comm, s| call(comm, NULL, b, COUNT, s))?;
            self.refuse("a misaligned send", &|comm, s| call(comm, a.offset(1), b, COUNT, s))?;
        }
        if !rooted || self.kind == OpKind::Broadcast {
            self.refuse("a null recv", &|comm, s| call(comm, a, NULL, COUNT, s))?;
            self.refuse("a misaligned recv", &|comm, s| call(comm, a, b.offset(2), COUNT, s))?;
        }
        if !rooted {
            let size = TYPE.size() as u64;
            self.refuse("overlapping operands", &|comm, s| call(comm, a.offset(size), a, COUNT, s))?;
        }
        self.refuse("a count that overflows", &|comm, s| call(comm, a, b, HUGE, s))?;
        self.refuse("operands beyond the address space", &|comm, s| {
            let last = DeviceAddr(u64::MAX - 7);
            call(comm, last, last, COUNT, s)
        })
    }

    /// The calls are refused before anything is read or written, whatever the addresses.
    fn calls(&mut self, at: Operands) -> Result<()> {
        let Operands { a, b } = at;
        let (world, own, sum) = (self.case.world, self.case.rank, ReduceOp::Sum);
        let few = vec![COUNT; world - 1];
        let many = vec![COUNT; world + 1];
        let sum_overflows = vec![HUGE; world.max(2)];
        // SAFETY: for all the calls below: the operands that pass the checks are live and long enough; the others are
        // what is tried, and an invalid argument is refused before anything is touched.
        unsafe {
            match self.kind {
                OpKind::AllReduce => self.operands(at, &|c, x, y, n, s| c.all_reduce(x, y, n, TYPE, sum, s)),
                OpKind::AllReduceQuantized => {
                    self.operands(at, &|c, x, y, n, s| c.all_reduce_quantized(x, y, n, TYPE, s))
                }
                OpKind::AllGather => self.operands(at, &|c, x, y, n, s| c.all_gather(x, y, n, TYPE, s)),
                OpKind::ReduceScatter => {
                    // The mirror image: the longer operand is `send`.
                    self.operands(at, &|c, x, y, n, s| c.reduce_scatter(x, y, n, TYPE, sum, s))
                }
                OpKind::AllToAll => {
                    self.operands(at, &|c, x, y, n, s| c.all_to_all(x, y, n, TYPE, s))?;
                    self.refuse("send and recv the same", &|c, s| c.all_to_all(a, a, COUNT, TYPE, s))
                }
                OpKind::AllGatherV => {
                    self.operands(at, &|c, x, y, n, s| c.all_gather_v(x, y, &vec![n; world], TYPE, s))?;
                    self.refuse("too few counts", &|c, s| c.all_gather_v(a, b, &few, TYPE, s))?;
                    self.refuse("too many counts", &|c, s| c.all_gather_v(a, b, &many, TYPE, s))?;
                    self.refuse("an overflow", &|c, s| c.all_gather_v(a, b, &sum_overflows, TYPE, s))
                }
                OpKind::ReduceScatterV => {
                    let call = |counts: &[usize], c: &dyn DeviceComm, s| {
                        c.reduce_scatter_v(a, b, counts, TYPE, sum, s)
                    };
                    self.operands(at, &|c, x, y, n, s| {
                        c.reduce_scatter_v(x, y, &vec![n; world], TYPE, sum, s)
                    })?;
                    self.refuse("too few counts", &|c, s| call(&few, c, s))?;
                    self.refuse("too many counts", &|c, s| call(&many, c, s))?;
                    self.refuse("an overflow", &|c, s| call(&sum_overflows, c, s))
                }
                OpKind::Broadcast => {
                    self.operands(at, &|c, x, y, n, s| c.broadcast(x, y, n, TYPE, 0, s))?;
                    self.refuse("a root out of range", &|c, s| c.broadcast(a, b, COUNT, TYPE, world, s))
                }
                OpKind::Reduce => {
                    self.operands(at, &|c, x, y, n, s| c.reduce(x, y, n, TYPE, sum, 0, s))?;
                    self.refuse("a root out of range", &|c, s| c.reduce(a, b, COUNT, TYPE, sum, world, s))
                }
                OpKind::Send => {
                    self.refuse("a peer out of range", &|c, s| c.send(a, COUNT, TYPE, world, s))?;
                    self.refuse("a null address", &|c, s| c.send(NULL, COUNT, TYPE, own, s))
                }
                OpKind::Recv => {
                    self.refuse("a peer out of range", &|c, s| c.recv(a, COUNT, TYPE, world, s))?;
                    self.refuse("a misaligned address", &|c, s| c.recv(a.offset(2), COUNT, TYPE, own, s))
                }
                OpKind::Group => {
                    let send = |addr, peer| P2pOp::Send { addr, count: COUNT, dtype: TYPE, peer };
                    let recv = |addr, peer| P2pOp::Recv { addr, count: COUNT, dtype: TYPE, peer };
                    let overlapping = [send(a, own), recv(a.offset(4), own)];
                    self.refuse("a peer out of range", &|c, s| c.group(&[send(a, world), recv(b, own)], s))?;
                    self.refuse("a null address", &|c, s| c.group(&[send(NULL, own), recv(b, own)], s))?;
                    self.refuse("overlapping transfers", &|c, s| c.group(&overlapping, s))
                }
                OpKind::AllGather2d => self.blocks(at),
                OpKind::AllReduceRmsNorm | OpKind::AllReduceRmsNormQuantized => self.norms(at),
                _ => self.two_group_norms(at),
            }
        }
    }

    fn blocks(&mut self, Operands { a, b }: Operands) -> Result<()> {
        let right = Block2d {
            height: 2,
            width: 4,
            row_pitch: 4 * self.case.world,
            rank_stride: 4,
            send_pitch: 4,
            dtype: TYPE,
            first: true,
            last: true,
        };
        let mut wrong = vec![
            ("a row pitch below the width", Block2d { row_pitch: 3, ..right }),
            ("a send pitch below the width", Block2d { send_pitch: 3, ..right }),
            ("a shape that overflows", Block2d { height: HUGE, ..right }),
        ];
        if self.case.world > 1 {
            wrong.push(("blocks that overlap", Block2d { rank_stride: 3, ..right }));
        }
        for (what, block) in wrong {
            // SAFETY: the shape is refused before anything is touched.
            self.refuse(what, &|c, s| unsafe { c.all_gather_2d(a, b, &block, s) })?;
        }
        // SAFETY: the null address is refused before anything is touched.
        self.refuse("a null send", &|c, s| unsafe { c.all_gather_2d(NULL, b, &right, s) })
    }

    fn norms(&mut self, at: Operands) -> Result<()> {
        let (Operands { a, b }, kind) = (at, self.kind);
        let right = RmsNormArgs {
            input: a,
            residual: a.offset(512),
            residual_out: a.offset(512),
            bias: None,
            weight: a.offset(1024),
            output: b,
            tokens: 1,
            hidden: COUNT,
            dtype: TYPE,
            eps: 1e-5,
            weight_offset: 0.0,
        };
        for (what, args) in [
            ("a hidden size of zero", RmsNormArgs { hidden: 0, ..right }),
            ("a negative eps", RmsNormArgs { eps: -1.0, ..right }),
            ("an eps that is NaN", RmsNormArgs { eps: f32::NAN, ..right }),
            ("a null input", RmsNormArgs { input: NULL, ..right }),
            ("a null weight", RmsNormArgs { weight: NULL, ..right }),
            ("a misaligned bias", RmsNormArgs { bias: Some(a.offset(1537)), ..right }),
            ("a residual that overlaps the output", RmsNormArgs { residual: b.offset(4), ..right }),
            ("a shape that overflows", RmsNormArgs { tokens: HUGE, ..right }),
        ] {
            // SAFETY: the arguments are refused before anything is touched.
            self.refuse(what, &|c, s| unsafe {
                match kind {
                    OpKind::AllReduceRmsNorm => c.all_reduce_rmsnorm(&args, s),
                    _ => c.all_reduce_rmsnorm_quantized(&args, &quantized(at), s),
                }
            })?;
        }
        if kind == OpKind::AllReduceRmsNorm {
            return Ok(());
        }
        let to = quantized(at);
        for (what, to) in [
            ("a null fp8 output", NormQuantization { output: NULL, ..to }),
            ("an fp8 output that overlaps the output", NormQuantization { output: b.offset(1), ..to }),
            (
                "a misaligned scale",
                NormQuantization { scale: NormQuantScale::PerTensor(a.offset(1026)), ..to },
            ),
            ("a null scale", NormQuantization { scale: NormQuantScale::PerToken(NULL), ..to }),
            (
                "scales over the weight",
                NormQuantization { scale: NormQuantScale::PerToken(right.weight), ..to },
            ),
        ] {
            // SAFETY: as above.
            self.refuse(what, &|c, s| unsafe { c.all_reduce_rmsnorm_quantized(&right, &to, s) })?;
        }
        Ok(())
    }

    fn two_group_norms(&mut self, at: Operands) -> Result<()> {
        let (a, kind) = (at.a, self.kind);
        let world = self.case.world;
        let tokens: Vec<usize> = (0..world).map(|rank| usize::from(rank == 0)).collect();
        let many = vec![0; world + 1];
        let right = TwoGroupNormArgs {
            hidden_states: a,
            residual: a.offset(512),
            bias: None,
            weight: a.offset(1024),
            reduce_first_row: 0,
            reduce_tokens: &tokens,
            gather_first_row: 0,
            gather_tokens: &tokens,
            hidden: COUNT,
            dtype: TYPE,
            eps: 1e-5,
            weight_offset: 0.0,
        };
        for (what, args) in [
            ("a hidden size of zero", TwoGroupNormArgs { hidden: 0, ..right }),
            ("a negative eps", TwoGroupNormArgs { eps: -1.0, ..right }),
            ("null hidden states", TwoGroupNormArgs { hidden_states: NULL, ..right }),
            ("too many token counts", TwoGroupNormArgs { reduce_tokens: &many, ..right }),
        ] {
            // SAFETY: the arguments are refused before anything is touched.
            self.refuse(what, &|c, s| unsafe {
                match kind {
                    OpKind::AllReduceRmsNormTwoGroup => c.all_reduce_rmsnorm_two_group(c, &args, s),
                    _ => c.all_reduce_rmsnorm_two_group_quantized(c, &args, &quantized(at), s),
                }
            })?;
        }
        Ok(())
    }
}
