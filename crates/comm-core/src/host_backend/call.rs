//! What a rank tells its peers about the call it is in: the arguments that must agree, and where its operands lie.
//!
//! Every collective begins with a step at which all ranks have published this, so calls that do not agree are refused
//! on every rank before any data moves.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::control::CALL_WORDS;
use crate::dtype::{DType, ReduceOp};
use crate::op::OpKind;

/// Kinds that synchronise through the control block, beyond [`OpKind::COLLECTIVES`].
const MANAGEMENT: [OpKind; 6] =
    [OpKind::Split, OpKind::Allocate, OpKind::Free, OpKind::Register, OpKind::Deregister, OpKind::Close];

/// The arguments that must be equal on all ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Call {
    pub(super) kind: OpKind,
    pub(super) count: u64,
    pub(super) dtype: Option<DType>,
    pub(super) reduce: Option<ReduceOp>,
    pub(super) root: Option<usize>,
    /// A digest of what the other fields cannot hold, such as the counts of a V operation.
    pub(super) shape: u64,
}

impl Call {
    pub(super) fn new(kind: OpKind, count: usize) -> Self {
        Self { kind, count: count as u64, dtype: None, reduce: None, root: None, shape: 0 }
    }

    /// A call on what has this number on all ranks: an allocation or a registration.
    pub(super) fn numbered(kind: OpKind, number: u64) -> Self {
        Self { count: number, ..Self::new(kind, 0) }
    }

    pub(super) fn of(kind: OpKind, count: usize, dtype: DType) -> Self {
        Self { dtype: Some(dtype), ..Self::new(kind, count) }
    }

    pub(super) fn reducing(self, op: ReduceOp) -> Self {
        Self { reduce: Some(op), ..self }
    }

    pub(super) fn rooted(self, root: usize) -> Self {
        Self { root: Some(root), ..self }
    }

    pub(super) fn shaped(self, numbers: impl IntoIterator<Item = usize>) -> Self {
        // FNV-1a over whole words: differences of a few counts never cancel out in practice.
        let shape = numbers.into_iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, number| {
            (hash ^ number as u64).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29)
        });
        Self { shape, ..self }
    }

    fn words(&self) -> [u64; 3] {
        let place = |found: Option<usize>| found.map_or(0xff, |at| at as u64);
        let kind = OpKind::COLLECTIVES.iter().chain(&MANAGEMENT).position(|&kind| kind == self.kind);
        let dtype = self.dtype.and_then(|dtype| DType::ALL.iter().position(|&d| d == dtype));
        let reduce = self.reduce.and_then(|op| ReduceOp::ALL.iter().position(|&o| o == op));
        let root = self.root.map_or(u64::from(u32::MAX), |root| root as u64);
        [place(kind) | place(dtype) << 8 | place(reduce) << 16 | root << 32, self.count, self.shape]
    }

    fn from_words(words: [u64; 3]) -> Option<Self> {
        let field = |shift: u32| (words[0] >> shift & 0xff) as usize;
        let kind = *OpKind::COLLECTIVES.iter().chain(&MANAGEMENT).nth(field(0))?;
        let root = words[0] >> 32;
        Some(Self {
            kind,
            count: words[1],
            dtype: DType::ALL.get(field(8)).copied(),
            reduce: ReduceOp::ALL.get(field(16)).copied(),
            root: (root != u64::from(u32::MAX)).then_some(root as usize),
            shape: words[2],
        })
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = if matches!(self.kind, OpKind::Free | OpKind::Deregister) { "number " } else { "" };
        write!(f, "{} of {number}{}", self.kind, self.count)?;
        if let Some(dtype) = self.dtype {
            write!(f, " {dtype}")?;
        }
        if let Some(reduce) = self.reduce {
            write!(f, " {reduce}")?;
        }
        if let Some(root) = self.root {
            write!(f, " root {root}")?;
        }
        if self.shape != 0 {
            write!(f, " shape {:016x}", self.shape)?;
        }
        Ok(())
    }
}

/// The space of addresses of the publishing rank's process.
pub(super) const FAR: u64 = u64::MAX;

/// Where an operand lies, in terms that a peer may be able to resolve.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Place {
    /// 0: nowhere a peer can reach; 1: at an address of the common process; [`FAR`]: at an address of the rank's own
    /// process; otherwise an allocation's number plus 2.
    pub(super) space: u64,
    /// The address, or the offset in the allocation.
    pub(super) offset: u64,
}

/// A rank's publication: the call, its operands, and one number of the operation's own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Published {
    pub(super) call: Option<Call>,
    pub(super) send: Place,
    pub(super) recv: Place,
    pub(super) extra: u64,
}

const _: () = assert!(CALL_WORDS >= 8);

/// Writes a rank's own publication; its next arrival makes it visible.
pub(super) fn publish(words: &[AtomicU64; CALL_WORDS], call: &Call, send: Place, recv: Place, extra: u64) {
    let [a, b, c] = call.words();
    let all = [a, b, c, send.space, send.offset, recv.space, recv.offset, extra];
    for (place, word) in words.iter().zip(all) {
        place.store(word, Ordering::Relaxed);
    }
}

/// Whether a peer's published call equals `call`.
pub(super) fn agrees(words: &[AtomicU64; CALL_WORDS], call: &Call) -> bool {
    call.words().iter().zip(words).all(|(mine, theirs)| theirs.load(Ordering::Relaxed) == *mine)
}

/// Reads a publication whose rank has arrived.
pub(super) fn read(words: &[AtomicU64; CALL_WORDS]) -> Published {
    let word = |at: usize| words[at].load(Ordering::Relaxed);
    Published {
        call: Call::from_words([word(0), word(1), word(2)]),
        send: Place { space: word(3), offset: word(4) },
        recv: Place { space: word(5), offset: word(6) },
        extra: word(7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publications_round_trip() {
        for kind in OpKind::COLLECTIVES.into_iter().chain(MANAGEMENT) {
            for dtype in DType::ALL {
                let call = Call::of(kind, 1 << 40, dtype).reducing(ReduceOp::Avg).rooted(3).shaped([1, 2]);
                let words = [const { AtomicU64::new(0) }; CALL_WORDS];
                let (send, recv) = (Place { space: 1, offset: 2 }, Place { space: 3, offset: 4 });
                publish(&words, &call, send, recv, 5);
                assert_eq!(read(&words), Published { call: Some(call), send, recv, extra: 5 });
                assert!(agrees(&words, &call));
                assert!(!agrees(&words, &call.shaped([2, 1])));
                assert!(!agrees(&words, &call.rooted(2)));
            }
        }
    }
}
