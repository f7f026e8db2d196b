//! That every plan can be launched, and which one is chosen.

use super::*;

pub(crate) fn limits(world: usize, forced: Option<Algorithm>) -> Limits {
    Limits {
        world,
        packet_slots: 33_792,
        lamport_slots: 67_584,
        line_slots: 84_480,
        cell_ctas: 132,
        room: Room::alone(132),
        forced,
        gaps: None,
        table: crate::tables::of(None, "NVIDIA H200", world).unwrap().algorithms,
    }
}

/// Fails unless all blocks are resident at once and what is sent has room.
pub(crate) fn launchable(limits: &Limits, plan: &Plan, registered: bool) {
    if plan.algorithm == Algorithm::Composed {
        // Launches nothing itself.
        return;
    }
    let Shape { grid, block } = plan.shape;
    assert!(grid >= 1 && (32..=512).contains(&block), "{plan:?}");
    let two = block <= 256 && plan.algorithm != Algorithm::Lines;
    assert!(grid <= limits.room.blocks(if two { 2 } else { 1 }), "{plan:?} in {:?}", limits.room);
    let slots = match plan.algorithm {
        Algorithm::Packets | Algorithm::Relayed | Algorithm::OneShot => limits.packet_slots,
        Algorithm::Lines => limits.line_slots / 4,
        _ => limits.lamport_slots,
    };
    assert!(plan.shape.threads() <= slots as u64, "{plan:?}");
    let direct = plan.algorithm == Algorithm::Direct;
    assert!(!direct || registered && plan.chunk > 0 && plan.chunk.is_multiple_of(4096), "{plan:?}");
}

/// A device of one's own, and shared ones: of this many ranks each, and too small for all of theirs.
pub(crate) fn rooms() -> [Room; 5] {
    let shared = [2, 4, 8].map(|ranks| Room::shared(132, ranks));
    [Room::alone(132), shared[0], shared[1], shared[2], Room::shared(20, 8)]
}

#[test]
fn every_plan_can_be_launched() {
    for (world, room) in (2..=8).flat_map(|world| rooms().map(|room| (world, room))) {
        for forced in [
            None,
            Some(Algorithm::OneShot),
            Some(Algorithm::TwoShot),
            Some(Algorithm::Direct),
            Some(Algorithm::Steps),
            Some(Algorithm::Lines),
            Some(Algorithm::Lamport),
            Some(Algorithm::Composed),
        ] {
            let limits = Limits { room, ..limits(world, forced) };
            for bytes in (0..34).flat_map(|shift| [1_usize << shift, (1 << shift) + 1]) {
                for registered in [false, true] {
                    let plans = [
                        limits.all_reduce(bytes, registered),
                        limits.reduce_scatter(bytes),
                        limits.all_gather(bytes, registered),
                        limits.broadcast(bytes, registered),
                    ];
                    for plan in plans {
                        launchable(&limits, &plan, registered);
                    }
                }
            }
        }
    }
}

#[test]
fn small_goes_in_one_hop_and_large_by_cells() {
    let eight = limits(8, None);
    let shape = |plan: Plan| (plan.algorithm, plan.shape.grid, plan.shape.block);
    assert_eq!(shape(eight.all_reduce(1 << 10, false)), (Algorithm::OneShot, 1, 128));
    assert_eq!(shape(eight.all_reduce(64 << 10, false)), (Algorithm::OneShot, 43, 128));
    assert_eq!(shape(eight.all_reduce(256 << 10, false)), (Algorithm::TwoShot, 32, 64));
    assert_eq!(shape(eight.all_reduce(8 << 20, false)), (Algorithm::TwoShot, 256, 256));
    assert_eq!(eight.all_reduce(64 << 20, false).algorithm, Algorithm::Composed);
    assert_eq!(eight.all_reduce(64 << 20, true).algorithm, Algorithm::Cells);
    assert_eq!(eight.all_reduce(256 << 20, true).algorithm, Algorithm::Steps);
    assert_eq!(shape(eight.broadcast(16 << 20, true)), (Algorithm::Lines, 132, 128));
    assert_eq!(eight.broadcast(256 << 20, true).algorithm, Algorithm::Direct);
    assert_eq!(eight.reduce_scatter(2 << 20).algorithm, Algorithm::Lines);
    assert_eq!(eight.reduce_scatter(32 << 20).algorithm, Algorithm::Steps);
    assert_eq!(shape(eight.all_gather(8 << 20, true)), (Algorithm::Steps, 66, 32));
    assert_eq!(shape(eight.all_gather(2 << 20, true)), (Algorithm::Spread, 132, 64));
    assert_eq!(limits(2, None).all_reduce(256 << 20, true).algorithm, Algorithm::Cells);
    assert_eq!(limits(2, None).all_reduce(256 << 10, false).algorithm, Algorithm::OneShot);
    assert_eq!(limits(4, Some(Algorithm::Staged)).all_reduce(8, false).algorithm, Algorithm::Staged);
}

#[test]
fn norms_are_fused_where_a_row_fits() {
    let eight = limits(8, None);
    assert_eq!(eight.norm(1, 16_384).algorithm, Algorithm::OneShot);
    assert_eq!(eight.norm(8, 16_384).algorithm, Algorithm::Lamport);
    assert_eq!(eight.norm(128, 16_384).algorithm, Algorithm::TwoShot);
    assert_eq!(limits(2, None).norm(128, 32_768).algorithm, Algorithm::Composed);
    for tokens in [1, 3, 17, 1000, 16_384] {
        for row in [2, 1024, 5760, 16_384, 28_672, 32_768] {
            for world in 2..=8 {
                let plan = limits(world, None).norm(tokens, row);
                let threads = plan.shape.grid as usize * plan.shape.block as usize;
                match plan.algorithm {
                    Algorithm::OneShot => {
                        assert!(threads <= 33_792 && threads >= tokens * row.div_ceil(12), "{plan:?}");
                    }
                    Algorithm::Lamport => {
                        assert!(threads <= 67_584 && threads >= tokens * row.div_ceil(16), "{plan:?}");
                    }
                    Algorithm::TwoShot => assert!(threads <= 67_584, "{plan:?}"),
                    _ => {}
                }
            }
        }
    }
}

#[test]
fn on_a_shared_device_norms_keep_to_their_share() {
    let mut clusters = std::collections::BTreeSet::new();
    for (world, room) in (2..=8).flat_map(|world| rooms().map(|room| (world, room))) {
        for (tokens, row) in [1, 2, 3, 17, 1000]
            .into_iter()
            .flat_map(|tokens| [2, 1024, 1536, 5760, 16_384, 28_672, 32_768].map(|row| (tokens, row)))
        {
            let limits = Limits { room, ..limits(world, None) };
            let plan = limits.norm(tokens, row);
            let Shape { grid, block } = plan.shape;
            match plan.algorithm {
                Algorithm::OneShot | Algorithm::Lamport => {
                    let pack = if plan.algorithm == Algorithm::OneShot { PACKET_PAYLOAD } else { PACK };
                    assert_eq!(grid as usize, tokens * plan.chunk as usize, "{plan:?}");
                    assert!(grid <= room.multiprocessors(), "{plan:?} in {room:?}");
                    // A thread for each pack of a row.
                    assert!((plan.chunk * block) as usize >= row.div_ceil(pack) && block <= 512, "{plan:?}");
                    assert!(room.is_shared() || matches!(plan.chunk, 1 | 8));
                    clusters.insert((room.is_shared(), plan.chunk));
                }
                Algorithm::TwoShot => assert!(grid <= room.blocks(4) && grid > 0, "{plan:?} in {room:?}"),
                other => assert_eq!(other, Algorithm::Composed),
            }
        }
    }
    // The best cluster where there is room for it, smaller ones where not.
    assert!(
        [(false, 8), (true, 8), (true, 4), (true, 1)].iter().all(|of| clusters.contains(of)),
        "{clusters:?}"
    );
}

/// The argument of `room.rs`, put to the plans: whatever two kernels each rank has at a time.
#[test]
fn two_kernels_of_every_rank_fit_on_a_device_and_leave_room_for_a_cluster() {
    for ranks in 2..=8 {
        let limits = Limits { room: Room::shared(132, ranks), ..limits(8, None) };
        let sizes = (0..34).map(|shift| 1_usize << shift);
        let grids = sizes.flat_map(|bytes| {
            let registered = [limits.all_reduce(bytes, true), limits.all_gather(bytes, true)];
            let plain = [limits.all_reduce(bytes, false), limits.reduce_scatter(bytes)];
            let norm = limits.norm(bytes.div_ceil(16_384), 16_384);
            let uneven = [limits.all_gather_v(bytes, true), limits.reduce_scatter_v(bytes)];
            let averages = [limits.all_reduce_average(bytes), limits.reduce_scatter_average(bytes)];
            let composed = <[Plan; 2]>::from(limits.parts_of_all_reduce(bytes));
            [registered, plain, [limits.broadcast(bytes, true), norm], uneven, averages, composed].concat()
        });
        let most = grids.map(|plan| plan.shape.grid).max().unwrap();
        assert!(2 * ranks as u32 * most + 56 <= 132, "{ranks} ranks, kernels of {most} blocks");
    }
}

#[test]
fn where_no_lines_are_sent_every_plan_goes_without() {
    for (world, forced) in (2..=8).flat_map(|world| [(world, None), (world, Some(Algorithm::Lines))]) {
        let with = limits(world, forced);
        let without = Limits { line_slots: 0, ..with.clone() };
        let mut lines = 0;
        for bytes in (10..31).map(|shift| 1_usize << shift) {
            let plans = |limits: &Limits| {
                let gathers = [false, true].map(|registered| limits.all_gather(bytes / world, registered));
                let broadcasts = [false, true].map(|registered| limits.broadcast(bytes, registered));
                let sums = limits.reduce_scatter(bytes / world);
                let (first, second) = limits.parts_of_all_reduce(bytes / world);
                [gathers, broadcasts, [sums, first], [second, second]].concat()
            };
            lines += plans(&with).iter().filter(|plan| plan.algorithm == Algorithm::Lines).count();
            let instead = plans(&without);
            for plan in &instead {
                assert_ne!(plan.algorithm, Algorithm::Lines, "{bytes} bytes, {world} ranks");
                launchable(&without, plan, true);
            }
            // Large ones do not go by packs for that.
            if bytes / world > 4 << 20 {
                use Algorithm as A;
                let stores = |plan: &Plan| matches!(plan.algorithm, A::Direct | A::Spread | A::Steps);
                assert!(stores(&instead[1]) && stores(&instead[3]), "{bytes}, {world}: {instead:?}");
                assert_ne!(instead[4].algorithm, A::TwoShot, "{bytes}, {world}");
            }
        }
        assert!(lines > 0 || forced.is_none(), "{world} ranks");
    }
}

#[test]
fn lines_take_the_fewest_rounds_and_every_multiprocessor() {
    let four = limits(4, None);
    let choice = Choice::of(Algorithm::Lines);
    let shape = |part: usize| {
        let Shape { grid, block } = four.lines(&choice, part).unwrap().shape;
        (grid, block / 32, part.div_ceil(BURST_BYTES).div_ceil((grid * block / 32) as usize))
    };
    assert_eq!(shape(1), (1, 1, 1));
    assert_eq!(shape(132 * BURST_BYTES), (132, 1, 1));
    // 529 bursts: five warps a block, for one round.
    assert_eq!(shape(1 << 20), (106, 5, 1));
    // 1057: two full rounds instead of one with more and one with less.
    assert_eq!(shape(2 << 20), (106, 5, 2));
    assert_eq!(shape(64 << 20), (131, 5, 52));
    // As many warps as there are slots.
    let few = Limits { line_slots: 128, ..four };
    assert_eq!(few.lines(&choice, 1 << 20).unwrap().shape, Shape { grid: 1, block: 32 });
}
