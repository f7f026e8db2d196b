//! The block of memory that all ranks of a communicator share: who has arrived where, who has failed, what each rank is
//! calling with, and the staging areas.
//!
//! Owns the layout and the raw access to it. It never waits and never decides; `wait` and the collectives do.
//! A zeroed block is a valid fresh one.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use super::cause;
use super::segment::Segment;
use crate::error::{CommError, Result};

/// Bytes of a rank's staging window when the ranks are few.
const WINDOW: usize = 512 << 10;
/// Bytes of one packet of a send.
const PACKET: usize = 64 << 10;
/// Words of a call's description: see [`super::call`].
pub(super) const CALL_WORDS: usize = 16;
const CAUSE_BYTES: usize = 1008;

/// What a rank's peers know of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum Standing {
    Alive = 0,
    /// Dropped or closed its communicator.
    Departed = 1,
    /// A call of its own failed: only waits that need it fail, so that the others blame the culprit and not the first
    /// rank to notice.
    GaveUp = 2,
    /// Aborted: every wait ends.
    Aborted = 3,
}

/// Shared by all ranks; written by each.
#[repr(C, align(128))]
pub(super) struct Header {
    /// Non-zero once any rank's standing is not alive.
    pub(super) alarm: AtomicU32,
    /// Bumped to wake sleepers.
    pub(super) event: AtomicU32,
    /// Ranks that sleep or are about to.
    pub(super) sleepers: AtomicU32,
}

/// Written by its rank alone.
#[repr(C, align(128))]
pub(super) struct RankBlock {
    /// Synchronisation steps that this rank has arrived at.
    pub(super) step: AtomicU64,
    /// One more than the processor that it ran on when it arrived there; zero while that is unknown.
    pub(super) processor: AtomicU32,
    /// Its process, and where this block lies there.
    pub(super) process: AtomicU32,
    pub(super) home: AtomicU64,
    /// Descriptions of the calls that this rank is in, by parity of the step: peers may still read the previous one.
    pub(super) calls: [[AtomicU64; CALL_WORDS]; 2],
    standing: AtomicU32,
    /// Non-zero while this rank reads or writes its peers' operands.
    pub(super) touching: AtomicU32,
    cause_len: AtomicU32,
    cause: [AtomicU8; CAUSE_BYTES],
}

/// One packet in flight from one rank to another.
#[repr(C)]
pub(super) struct Packet {
    /// Bytes of the whole message.
    pub(super) total: AtomicU64,
    /// Element type and count, packed as [`super::p2p`] does.
    pub(super) elements: AtomicU64,
    /// Where the sender's operand lies, or zero: then the bytes are in the packet.
    pub(super) place: [AtomicU64; 2],
}

/// The path from one rank to another.
#[repr(C, align(128))]
pub(super) struct Channel {
    /// Packets sent; written by the sender.
    pub(super) posted: AtomicU64,
    pub(super) packets: [Packet; 2],
    /// Packets received; written by the receiver.
    pub(super) consumed: AtomicU64,
    /// One more than the last message's first packet that did not match, with what was expected.
    pub(super) refused: AtomicU64,
    pub(super) refused_for: AtomicU64,
}

#[derive(Clone, Copy)]
struct Layout {
    ranks: usize,
    channels: usize,
    packets: usize,
    stages: usize,
    stage_stride: usize,
    len: usize,
}

/// One rank's view of the shared block.
pub(super) struct Control {
    segment: Segment,
    size: usize,
    rank: usize,
    window: usize,
    row: usize,
    packet: usize,
    layout: Layout,
}

fn sizes(size: usize) -> (usize, usize, usize) {
    let row = ((WINDOW / size) & !63).max(4096);
    let packet = (8 * PACKET / size).clamp(4096, PACKET);
    (row * size, row, packet)
}

fn layout(size: usize) -> Result<Layout> {
    let (window, row, packet) = sizes(size);
    let page = |bytes: usize| bytes.next_multiple_of(4096);
    let ranks = size_of::<Header>();
    let channels = ranks + size * size_of::<RankBlock>();
    let pairs = size.checked_mul(size).filter(|&pairs| pairs < 1 << 20).ok_or_else(|| {
        CommError::invalid("size", format!("{size} ranks are more than one host's memory serves (1023)"))
    })?;
    let packets = page(channels + pairs * size_of::<Channel>());
    let stages = page(packets + pairs * 2 * packet);
    let stage_stride = page(2 * window + 2 * row);
    Ok(Layout { ranks, channels, packets, stages, stage_stride, len: stages + size * stage_stride })
}

impl Control {
    /// Bytes of the block for `size` ranks.
    pub(super) fn bytes(size: usize) -> Result<usize> {
        layout(size).map(|layout| layout.len)
    }

    /// `rank`'s view of a block of [`bytes`](Self::bytes) bytes.
    pub(super) fn new(segment: Segment, size: usize, rank: usize) -> Result<Self> {
        let layout = layout(size)?;
        if segment.len() < layout.len {
            return Err(CommError::invalid("segment", "smaller than the control block"));
        }
        let (window, row, packet) = sizes(size);
        Ok(Self { segment, size, rank, window, row, packet, layout })
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Bytes of a staging window; a multiple of the row.
    pub(super) fn window(&self) -> usize {
        self.window
    }

    /// Bytes of one rank's share of a window; a multiple of 64.
    pub(super) fn row(&self) -> usize {
        self.row
    }

    /// Bytes of a packet's payload.
    pub(super) fn packet_bytes(&self) -> usize {
        self.packet
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < self.layout.len);
        // SAFETY: every offset computed here is inside the segment, whose length `new` compared with the layout.
        unsafe { self.segment.start().add(offset) }
    }

    pub(super) fn header(&self) -> &Header {
        // SAFETY: the segment begins with the header, is page-aligned and zeroed, and all fields are atomics.
        unsafe { &*self.at(0).cast::<Header>() }
    }

    pub(super) fn peer(&self, rank: usize) -> &RankBlock {
        assert!(rank < self.size, "rank out of range");
        // SAFETY: in range by the assertion, aligned by the layout, and all fields are atomics.
        unsafe { &*self.at(self.layout.ranks + rank * size_of::<RankBlock>()).cast::<RankBlock>() }
    }

    pub(super) fn own(&self) -> &RankBlock {
        self.peer(self.rank)
    }

    fn pair(&self, from: usize, to: usize) -> usize {
        assert!(from < self.size && to < self.size, "rank out of range");
        from * self.size + to
    }

    pub(super) fn channel(&self, from: usize, to: usize) -> &Channel {
        let index = self.pair(from, to);
        // SAFETY: in range by `pair`, aligned by the layout, and all fields are atomics.
        unsafe { &*self.at(self.layout.channels + index * size_of::<Channel>()).cast::<Channel>() }
    }

    /// The payload of packet `index` between two ranks, [`packet_bytes`](Self::packet_bytes) long.
    pub(super) fn payload(&self, from: usize, to: usize, index: u64) -> *mut u8 {
        let slot = self.pair(from, to) * 2 + (index % 2) as usize;
        self.at(self.layout.packets + slot * self.packet)
    }

    /// A rank's staging window for a step; [`window`](Self::window) bytes, 64-aligned.
    pub(super) fn stage(&self, rank: usize, step: u64) -> *mut u8 {
        assert!(rank < self.size, "rank out of range");
        self.at(self.layout.stages + rank * self.layout.stage_stride + (step % 2) as usize * self.window)
    }

    /// A rank's area for reduced elements for a step; [`row`](Self::row) bytes, 64-aligned.
    pub(super) fn reduced(&self, rank: usize, step: u64) -> *mut u8 {
        assert!(rank < self.size, "rank out of range");
        let results = self.layout.stages + rank * self.layout.stage_stride + 2 * self.window;
        self.at(results + (step % 2) as usize * self.row)
    }

    /// A rank's standing, and why when it is not alive.
    pub(super) fn standing(&self, rank: usize) -> (Standing, Option<CommError>) {
        let block = self.peer(rank);
        let standing = match block.standing.load(Ordering::Acquire) {
            0 => return (Standing::Alive, None),
            1 => Standing::Departed,
            2 => Standing::GaveUp,
            _ => Standing::Aborted,
        };
        let len = (block.cause_len.load(Ordering::Relaxed) as usize).min(CAUSE_BYTES);
        let bytes: Vec<u8> = block.cause[..len].iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        (standing, cause::decode(&bytes))
    }

    /// Whether any rank's standing is not alive. Ordered after this rank's earlier stores.
    pub(super) fn alarmed(&self) -> bool {
        self.header().alarm.load(Ordering::SeqCst) != 0
    }

    /// Makes this rank's standing known. The caller sees to it that one thread at a time does this. Only the first
    /// change counts, but an abort overrides.
    pub(super) fn declare(&self, standing: Standing, cause: Option<&CommError>) {
        let block = self.own();
        let now = block.standing.load(Ordering::Relaxed);
        if now != Standing::Alive as u32 && (standing != Standing::Aborted || now == Standing::Aborted as u32)
        {
            return;
        }
        let bytes = match cause {
            Some(cause) if now == Standing::Alive as u32 => cause::encode(cause, CAUSE_BYTES),
            _ => Vec::new(),
        };
        for (place, byte) in block.cause.iter().zip(&bytes) {
            place.store(*byte, Ordering::Relaxed);
        }
        block.cause_len.store(bytes.len() as u32, Ordering::Relaxed);
        block.standing.store(standing as u32, Ordering::Release);
        // Modifies rather than stores, so that whoever sees the alarm sees the standings of all that raised it.
        self.header().alarm.fetch_or(1, Ordering::SeqCst);
        self.wake();
    }

    /// Wakes the ranks that sleep. Call after a store that may end a wait.
    pub(super) fn notify(&self) {
        // Orders the caller's store before the look at `sleepers`; a sleeper announces itself before it looks at what it
        // waits for, so one of the two sees the other.
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.header().sleepers.load(Ordering::Relaxed) != 0 {
            self.wake();
        }
    }

    fn wake(&self) {
        self.header().event.fetch_add(1, Ordering::SeqCst);
        // A failed wake-up costs a sleeper a millisecond: its sleep is that short.
        let _ = rustix::thread::futex::wake(
            &self.header().event,
            rustix::thread::futex::Flags::empty(),
            i32::MAX as u32,
        );
    }
}
