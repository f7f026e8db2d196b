//! Making a communicator: scratch memory on every rank, mapped by all, filled with what the kernels expect.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use comm_core::topology::Topology;
use comm_core::{
    CommError, CommInfo, Deadline, DeviceAddr, HostComm, HostCommExt as _, MemoryKind, OpKind, Result,
};
use comm_kernels::p2p::{
    BUFFERS, CUBE_ROW_PAIRS, FLAG_BYTES, Link, MAX_RANKS, P2pKernels, PAIR_COUNTERS_BYTES, Peers,
    buffer_bytes, cells_bytes, lines_bytes, scratch_bytes,
};
use comm_kernels::raw::Current;
use cudarc::driver::sys;

use crate::captured::Captured;
use crate::comm::P2pComm;
use crate::fitness::Sentinel;
use crate::ledger::Ledger;
use crate::mesh::Mesh;
use crate::order::Order;
use crate::state::{Base, Channels, Hosts, Owned, Shared};
use crate::symmetric::table::Table;
use crate::symmetric::words::Words;
use crate::symmetric::{Block, agree, shifted};
use crate::tables::{self, InUse};
use crate::topology::links::Links;
use crate::topology::routes::Routes;
use crate::topology::{self, Place, verify};
use crate::watchdog;

/// Where the parts of a rank's scratch block begin.
struct Layout {
    counters: usize,
    barrier: usize,
    pairs: usize,
    packet: usize,
    lamport: usize,
    lines: usize,
    cells: usize,
    staging: usize,
    pair_slots: usize,
    bytes: usize,
}

/// Parts begin where lines of the L2 cache do.
const ALIGN: usize = 256;
/// Counters of a channel have a line to themselves: an atomic on one must not slow down the reads of another.
const CHANNEL_STRIDE: usize = 256;
const CHANNELS: usize = 6;
/// The channels' counters, the word that says that this rank has given up, the pairs' counters.
const COUNTERS_BYTES: usize = (CHANNELS + 1) * CHANNEL_STRIDE + PAIR_COUNTERS_BYTES;

impl Layout {
    fn new(
        world: usize,
        base: &Base,
        routes: Option<&Routes>,
        (row_pairs, line_slots): (usize, usize),
    ) -> Self {
        let copies = routes.map_or(0, Routes::most_held);
        let boxes = routes.map_or(0, Routes::most_boxes);
        let options = &base.options;
        let mut bytes = 0;
        let mut place = |part: usize| {
            let at = bytes;
            bytes += usize::next_multiple_of(part, ALIGN);
            at
        };
        let counters = place(COUNTERS_BYTES);
        let barrier = place(FLAG_BYTES);
        let pairs = place(FLAG_BYTES);
        let packet = place(scratch_bytes(row_pairs, options.packet_slots));
        let lamport = place(scratch_bytes(world, options.lamport_slots));
        let lines = place(lines_bytes(world, line_slots));
        let cells = place(cells_bytes(world, options.cell_ctas));
        let staging = place(options.staging_bytes * (1 + copies));
        let pair_slots = place(options.pair_bytes * (world + boxes));
        Self { counters, barrier, pairs, packet, lamport, lines, cells, staging, pair_slots, bytes }
    }
}

/// A host communicator of the same ranks in the same order.
pub(crate) fn sibling(host: &dyn HostComm, deadline: Deadline) -> Result<Arc<dyn HostComm>> {
    let key = i64::try_from(host.rank()).unwrap_or(i64::MAX);
    host.split(Some(0), key, deadline)?.ok_or_else(|| CommError::Io {
        context: format!("splitting host communicator {:?}", host.name()),
        message: "it returned no communicator for a rank with a colour".into(),
    })
}

/// Makes this rank's end of a communicator over the ranks of `hosts.control`. Collective. A rank that could not even
/// start passes its error, so that the others learn why there will be no communicator. `verified`: the ranks are known to
/// reach each other's memory.
pub(crate) fn create(hosts: Hosts, base: Result<Base>, verified: bool) -> Result<P2pComm> {
    let control = Arc::clone(&hosts.control);
    let timeout = base.as_ref().map_or(control.timeout(), |base| base.timeout);
    let by = || Deadline::after(timeout);
    let started = base.and_then(|base| {
        let tables = tables::of(base.options.tables.as_deref(), &base.gpu, control.size())?;
        Ok((base, tables))
    });
    agree(&*control, &started.as_ref().map(|_| 0).map_err(Clone::clone), by())?;
    let (base, tables) = started?;
    let _current = Current::enter(&base.context)?;
    let info = CommInfo {
        name: control.name().to_owned(),
        backend: crate::NAME.into(),
        rank: control.rank(),
        size: control.size(),
        memory: MemoryKind::Cuda { ordinal: base.ordinal },
    };
    let met = meet(&*control, &base, &tables);
    let Met { topology, routes, line_slots, uuids } = if verified { met } else { met.map_err(not_split) }?;
    let words = Words::new().map(Arc::new);
    let sentinel = Sentinel::new().map(Arc::new);
    let order = Order::new(base.options.unordered_streams);
    let (channels, scratch, captured, ledger) = if info.size > 1 {
        let prepared = words
            .as_ref()
            .map_err(Clone::clone)
            .and_then(|words| {
                Ok((Arc::clone(words), P2pKernels::load(&base.context, info.size, base.room.overlap())?))
            })
            .and_then(|(words, kernels)| Ok((words, kernels, table_of_captured(&base, info.size)?)))
            .and_then(|prepared| sentinel.as_ref().map(|_| prepared).map_err(Clone::clone))
            .and_then(|prepared| order.as_ref().map(|_| prepared).map_err(Clone::clone));
        agree(&*control, &prepared.as_ref().map(|_| 0).map_err(Clone::clone), by())?;
        let (words, kernels, captured) = prepared?;
        let mesh = routes.as_ref().map(|routes| (Mesh::new(info.rank, &topology, routes), routes));
        let kernels = (kernels, line_slots);
        let (channels, block) = channels(&*control, &base, &words, kernels, mesh, by())?;
        if !verified {
            let (devices, options) = ((&*base.device.driver, &*uuids), &base.options);
            verify::verify(
                &*control,
                &base.kernels,
                &channels.staging,
                devices,
                options.corrupt_pair,
                timeout,
            )?;
        }
        let ledger = Ledger::create(&*control, by())?;
        (Some(channels), Some(block), captured, Some(ledger))
    } else {
        (None, None, None, None)
    };
    static COMMUNICATORS: AtomicU64 = AtomicU64::new(0);
    let generations = COMMUNICATORS.fetch_add(1, Ordering::Relaxed) << 32;
    let owned = Owned {
        table: Table::new(generations),
        captured,
        order: order?,
        chain: 0,
        scratch,
        words: Some(words?),
        sentinel: Some(sentinel?),
    };
    let shared = Arc::new(Shared::new(info, base, topology, tables, channels, ledger, owned, hosts));
    let spawned = watchdog::spawn(Arc::clone(&shared));
    // A rank that fails in the very end has no communicator, so no rank may have one.
    let agreed = agree(&*control, &spawned.as_ref().map(|()| 0).map_err(Clone::clone), by());
    // Dropped, it is given back by its watchdog, if it has one.
    let made = P2pComm::new(shared);
    agreed.map(|()| made)
}

fn table_of_captured(base: &Base, world: usize) -> Result<Option<Captured>> {
    let options = &base.options;
    let table =
        || Captured::new((&base.context, base.ordinal), (world, base.room.overlap()), options.graph_entries);
    options.graph_registration.then(table).transpose()
}

/// What all ranks derive from what their devices are.
struct Met {
    topology: Topology,
    routes: Option<Routes>,
    /// Packs of lines in flight between two ranks. 0, so that no lines are sent, where not every pair is known to be
    /// joined by NVLink, over which they arrive whole, and where some do not reach each other.
    line_slots: usize,
    /// The devices' names.
    uuids: Vec<String>,
}

/// Exchanges what the ranks' devices are, and agrees on their topology and routes and on how algorithms are chosen.
fn meet(host: &dyn HostComm, base: &Base, tables: &InUse) -> Result<Met> {
    let (device, imposed) = (&base.device, &base.options.topology);
    let choice = format!("{} and {}", tables.describe(base.options.algorithm), base.options.shared_values());
    type Fact = (String, Links, (Option<String>, Place), String);
    let own = (device.uuid.clone(), device.links.clone(), (imposed.clone(), device.place), choice);
    let all: Vec<Fact> = host.all_gather_by(&own, Deadline::after(base.timeout))?;
    let links: Vec<_> = all.iter().map(|(_, links, ..)| links.clone()).collect();
    let places: Vec<_> = all.iter().map(|(.., (_, place), _)| *place).collect();
    // Every rank comes to these verdicts for the same values, so all of them fail or none.
    tables::same_on_all(all.iter().map(|(.., choice)| choice.as_str()))?;
    let imposed_on = |rank: usize| &all[rank].2.0;
    if let Some(rank) = (0..all.len()).find(|&rank| imposed_on(rank) != imposed_on(0)) {
        return Err(CommError::invalid(
            "COMM_P2P_TOPOLOGY",
            format!("{:?} on rank {rank}, but {:?} on rank 0", imposed_on(rank), imposed_on(0)),
        ));
    }
    let (topology, routes) = topology::of_ranks(&links, imposed.as_deref(), &places)?;
    for (rank, (_, links, ..)) in all.iter().enumerate() {
        if let Some(reason) = &links.unknown {
            tracing::debug!(rank, reason, "the NVLinks of a rank's GPU are not known");
        }
    }
    let sends_lines = routes.is_none() && topology::all_linked(&links)?;
    let line_slots = if sends_lines { base.options.line_slots } else { 0 };
    Ok(Met { topology, routes, line_slots, uuids: all.into_iter().map(|(uuid, ..)| uuid).collect() })
}

fn channels(
    host: &dyn HostComm,
    base: &Base,
    words: &Words,
    (kernels, line_slots): (P2pKernels, usize),
    mesh: Option<(Mesh, &Routes)>,
    deadline: Deadline,
) -> Result<(Channels, Block)> {
    let (world, options) = (host.size(), &base.options);
    let (mesh, routes) = mesh.unzip();
    let in_cube = mesh.as_ref().is_some_and(|mesh| mesh.cube.is_some());
    let row_pairs = if in_cube { CUBE_ROW_PAIRS } else { world };
    let layout = Layout::new(world, base, routes, (row_pairs, line_slots));
    let reach = routes.map_or(u32::MAX, |routes| routes.reach(host.rank()));
    let block = Block::create(host, base.ordinal, layout.bytes, reach, deadline)
        .map_err(|error| out_of_reach(host.rank(), error))?;
    let filled = fill(&block, &layout, (world, row_pairs), base).and_then(|()| match options.clear_peers {
        // Every owner clears the same bytes at the same time, so the order does not matter.
        true => {
            block.mapped().try_for_each(|part| part.fill(layout.staging, 0, layout.bytes - layout.staging))
        }
        false => Ok(()),
    });
    // Nobody may send before everybody's memory holds what says that nothing has arrived.
    agree(host, &filled.map(|()| 0), deadline)?;
    let peers = block.peers();
    let own = block.own().addr();
    // What is no neighbour's stays null, so that a kernel which touched it would fault.
    debug_assert!((0..world).all(|rank| peers[rank].is_null() == (reach >> rank & 1 == 0)));
    let link = |number: usize, area: usize, slots: usize| Link {
        scratch: used(&shifted(&peers, area), world),
        channel: own.offset((layout.counters + number * CHANNEL_STRIDE) as u64),
        broken: own.offset((layout.counters + CHANNELS * CHANNEL_STRIDE) as u64),
        abort: words.abort_addr(),
        error: words.error_addr(),
        timeout_ns: u64::try_from(base.timeout.as_nanos()).unwrap_or(u64::MAX),
        stall_ns: match options.stall_rank {
            Some(only) if only != host.rank() => 0,
            _ => u64::try_from(options.stall.as_nanos()).unwrap_or(0),
        },
        rank: host.rank() as u32,
        slot_packs: slots as u32,
        op: 0,
        reserved: 0,
    };
    let channels = Channels {
        kernels,
        barrier: link(0, layout.barrier, 0),
        pairs: link(1, layout.pairs, 0),
        packet: link(2, layout.packet, options.packet_slots),
        lamport: link(3, layout.lamport, options.lamport_slots),
        cells: link(4, layout.cells, 0),
        lines: link(5, layout.lines, line_slots),
        pair_counters: own.offset((layout.counters + (CHANNELS + 1) * CHANNEL_STRIDE) as u64),
        staging: used(&shifted(&peers, layout.staging), world),
        half: options.staging_bytes / 2,
        pair_slots: used(&shifted(&peers, layout.pair_slots), world),
        pair_bytes: options.pair_bytes,
        mesh,
    };
    Ok((channels, block))
}

/// The refusal of a group that cannot be split off, as that of ranks that are not a group of others.
fn not_split(error: CommError) -> CommError {
    match error {
        CommError::Unsupported { op: OpKind::Split, backend, reason } => {
            CommError::Unsupported { op: OpKind::Create, backend, reason }
        }
        other => other,
    }
}

/// The error of mapping memory as a refusal, where it says that a device may not touch another's. Ranks that see their own
/// device alone find out here: they cannot ask whether it reaches the others'. The error may be `rank`'s, or one that
/// another rank has met.
fn out_of_reach(rank: usize, error: CommError) -> CommError {
    let (rank, cause) = match &error {
        CommError::PeerFailed { rank, cause, .. } => (*rank, &**cause),
        own => (rank, own),
    };
    match cause {
        CommError::Cuda { call, code, .. } if call == "cuMemSetAccess" && NO_ACCESS.contains(code) => {
            let reason = format!("rank {rank}'s GPU may not map every other rank's memory: {cause}");
            CommError::unsupported(OpKind::Create, crate::NAME, reason)
        }
        _ => error,
    }
}

/// What the driver says where there is no path between two devices, and where it does not let them share memory.
const NO_ACCESS: [i32; 3] = [
    sys::CUresult::CUDA_ERROR_INVALID_DEVICE as i32,
    sys::CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED as i32,
    sys::CUresult::CUDA_ERROR_NOT_SUPPORTED as i32,
];

fn used(peers: &Peers, world: usize) -> Peers {
    let mut used = [DeviceAddr::NULL; MAX_RANKS];
    used[..world].copy_from_slice(&peers[..world]);
    used
}

/// What the kernels want to find: see `link.cuh`.
fn fill(block: &Block, layout: &Layout, (world, row_pairs): (usize, usize), base: &Base) -> Result<()> {
    let (own, options) = (block.own(), &base.options);
    let first = options.first_round;
    let before = first.wrapping_sub(1);
    // Cells and staging memory need no value: the peers store before this rank reads. A checker of uninitialised reads
    // cannot see those stores, though, and new memory takes well under a millisecond to clear.
    own.fill(0, 0, layout.bytes)?;
    for channel in 0..CHANNELS {
        own.fill(layout.counters + channel * CHANNEL_STRIDE, first, 4)?;
    }
    for flags in [layout.barrier, layout.packet, layout.lamport, layout.lines, layout.cells] {
        own.fill(flags, before, FLAG_BYTES)?;
    }
    let packets = (layout.packet, buffer_bytes(row_pairs, options.packet_slots));
    let lines = (layout.lines, (layout.cells - layout.lines - FLAG_BYTES) / BUFFERS);
    for (area, bytes) in [packets, lines] {
        for buffer in 0..BUFFERS {
            own.fill(area + FLAG_BYTES + buffer * bytes, !(buffer as u32), bytes)?;
        }
    }
    let lamport = scratch_bytes(world, options.lamport_slots) - FLAG_BYTES;
    own.fill(layout.lamport + FLAG_BYTES, u32::MAX, lamport)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_not_be_mapped_is_a_refusal_and_what_does_not_fit_a_failure() {
        let cuda =
            |call: &'static str, code| CommError::Cuda { call: call.into(), code, message: "x".into() };
        let at = comm_core::CallSite::new("world", OpKind::Allocate, 0);
        let peer = |cause| CommError::PeerFailed { at: at.clone(), rank: 3, cause: Box::new(cause) };
        let refused = out_of_reach(3, cuda("cuMemSetAccess", 101));
        assert!(matches!(&refused, CommError::Unsupported { op: OpKind::Create, .. }), "{refused}");
        // The rank that met it and the one that heard of it say the same.
        assert_eq!(out_of_reach(0, peer(cuda("cuMemSetAccess", 101))), refused);
        for failure in [cuda("cuMemSetAccess", 2), cuda("cuMemCreate", 101), cuda("cuMemMap", 801)] {
            assert_eq!(out_of_reach(3, failure.clone()), failure);
            assert_eq!(out_of_reach(0, peer(failure.clone())), peer(failure));
        }
    }

    #[test]
    fn a_refusal_is_of_what_was_asked_for() {
        let refusal = |op| CommError::unsupported(op, crate::NAME, "they do not reach each other");
        assert_eq!(not_split(refusal(OpKind::Split)), refusal(OpKind::Create));
        assert_eq!(not_split(CommError::invalid("a", "b")), CommError::invalid("a", "b"));
    }
}
