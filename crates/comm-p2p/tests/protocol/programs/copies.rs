//! What copies between handshakes and barriers, by kernels that do not wait themselves.

use super::super::memory::{Instr, Place, Protocol, Round, packet};
use super::{ENTER, EXIT, Mutant, Writer, payload};

/// meet.cu, `p2p_pair`: rank 0 sends `messages` chunks to rank 1 through one slot; each step is a kernel.
pub(crate) fn pair(messages: u8, first: Round, mutant: Mutant) -> Protocol {
    let mut w = Writer::new(2, first, mutant);
    let (free, full) = (w.flag(0, ENTER, 1), w.flag(1, EXIT, 0));
    for number in (0..messages).map(|message| first.wrapping_add(message)) {
        let slot = w.protocol.word(Place::Result { owner: 0, src: 0 }, 0);
        let value = packet(1, payload(number, 0));
        if mutant != Mutant::NoAwaitFree {
            w.await_flag(0, free, number.wrapping_sub(1));
        }
        w.store(0, slot, value, false);
        w.raise(0, full, number, true);
        w.await_flag(1, full, number);
        w.emit(1, Instr::Read { at: slot, sees: value });
        w.raise(1, free, number, true);
    }
    w.protocol
}

/// comm-p2p's `ops/staged.rs`: every rank fills a half of its staging memory, all meet, everybody reads, and all meet at the
/// end. `calls`: chunks of each exchange.
pub(crate) fn staged(world: usize, calls: &[u8], first: Round, mutant: Mutant) -> Protocol {
    let mut w = Writer::new(world, first, mutant);
    let halves = if mutant == Mutant::OneBufferFewer { 1 } else { 2 };
    for &chunks in calls {
        for chunk in 0..chunks {
            let round = w.claim_rounds(1);
            let half = |owner| Place::Result { owner, src: usize::from(chunk % halves) };
            for rank in 0..world {
                let own = w.protocol.word(half(rank), 0);
                w.store(rank, own, packet(0, payload(round, rank)), false);
                w.meet(rank, EXIT, round, true);
                for src in w.others(rank) {
                    let at = w.protocol.word(half(src), 0);
                    w.emit(rank, Instr::Read { at, sees: packet(0, payload(round, src)) });
                }
            }
        }
        if mutant != Mutant::NoExit {
            let round = w.claim_rounds(1);
            (0..world).for_each(|rank| w.meet(rank, EXIT, round, true));
        }
    }
    w.protocol
}
