//! Each seeded mistake fails the suite, and the failure names the operation that is wrong.
#![allow(clippy::unwrap_used, reason = "these are tests, though not all of it is test functions")]
#![cfg(feature = "conformance")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use comm_core::conformance::{Config, Report, run_threads};
use comm_core::{BackendFactory, HostMemory, OpKind};
use support::GatherFactory;
use support::wrong::{Bug, Wrong};

fn run(bug: Bug, world: usize, config: &Config) -> Report {
    let factory: Arc<dyn BackendFactory> = Arc::new(GatherFactory {
        wrap: Arc::new(move |inner| Arc::new(Wrong::new(inner, bug))),
        ..GatherFactory::right()
    });
    run_threads(factory, world, |_| Box::new(HostMemory::new()), config)
}

/// The suite must fail, and only in `op`. Cases of other operations that build on it are not run.
#[track_caller]
fn caught(bug: Bug, op: OpKind) {
    let config = Config { timeout: Duration::from_secs(2), ..Config::quick() }.only(format!("{op}/"));
    let report = run(bug, 3, &config);
    println!("{report}");
    assert!(!report.is_success(), "{bug:?} passed:\n{report}");
    assert!(report.failures().iter().any(|failure| failure.op == op), "{bug:?}: {report}");
    let clean = run(Bug::None, 3, &config);
    assert!(clean.is_success(), "the wrapper itself fails: {clean}");
}

macro_rules! catches {
    ($($test:ident: $bug:ident in $op:ident;)*) => {$(
        #[test]
        fn $test() {
            caught(Bug::$bug, OpKind::$op);
        }
    )*};
}

catches! {
    tail_of_odd_counts: DropsTailOfOddCounts in AllReduce;
    misalignment: IgnoresMisalignment in AllGather;
    one_past_the_end: WritesOnePastTheEnd in Broadcast;
    stale_data: ReturnsDataOfThePreviousCall in AllGather;
    order_of_sums: SumsInAnotherOrderOnEachRank in AllReduce;
    swapped_ranks: SwapsTwoRanks in AllGather;
    undivided_average: AveragesWithoutDividing in AllReduce;
    wrong_broadcast_root: BroadcastsFromTheWrongRoot in Broadcast;
    wrong_reduce_root: ReducesToTheWrongRoot in Reduce;
    in_place: ForgetsInPlaceCalls in AllReduce;
    residual: LeavesTheResidual in AllReduceRmsNorm;
    weight_offset: IgnoresTheWeightOffset in AllReduceRmsNorm;
    two_group_bias: ForgetsTheBiasOfTwoGroups in AllReduceRmsNormTwoGroup;
    split_key: SplitsWithoutKeys in Split;
    claimed_but_lacking: ClaimsWhatItLacks in AllToAll;
    refused_but_done: RefusesWhatItClaims in AllToAll;
    zero_elements: FailsOnZeroElements in ReduceScatter;
    modified_input: ModifiesTheInput in AllToAll;
    counted_twice: CountsTwice in Reduce;
    counted_not_at_all: CountsNothing in AllGatherV;
    barrier: DoesNotWaitAtBarriers in Barrier;
    message_order: ReversesMessages in Group;
    second_deregister: DeregistersTwice in Register;
    allocation_alignment: AllocatesMisaligned in Allocate;
    lack_of_memory: DiesOfLackOfMemory in Allocate;
    overlap_accepted: AcceptsOverlaps in ReduceScatterV;
    wrong_part: ScattersTheWrongPart in ReduceScatterV;
    signedness: ReducesUnsignedAsSigned in AllReduce;
    nans: DropsNans in AllReduce;
    gaps: FillsTheGapsOfBlocks in AllGather2d;
    open_after_close: StaysOpenAfterClose in Close;
    large_counts: CorruptsLargeCounts in AllReduce;
    supports_by_rank: AnswersSupportsByRank in Reduce;
    unquantized_slice: KeepsItsSliceOfTheSumUnquantized in AllReduceQuantized;
    scale_of_the_first_row: ScalesAllRowsAlike in AllReduceRmsNormQuantized;
    panic_on_one_rank: PanicsOnOneRank in AllGather;
}

#[test]
fn sums_that_differ_between_ranks_fail_even_where_no_order_is_promised() {
    let config = Config { ordered_sums: false, ..Config::quick() }.only("all_reduce/f32/sum/real");
    let report = run(Bug::SumsInAnotherOrderOnEachRank, 4, &config);
    let differs = report.failures().iter().any(|failure| failure.message.contains("different bits"));
    assert!(differs, "{report}");
    assert!(run(Bug::None, 4, &config).is_success());
}

#[test]
fn a_rank_that_hangs_is_reported_and_not_waited_for() {
    let config = Config { timeout: Duration::from_millis(200), ..Config::quick() }.only("all_gather/");
    let start = Instant::now();
    let report = run(Bug::HangsOnOneRank, 3, &config);
    assert!(start.elapsed() < Duration::from_secs(20), "took {:?}", start.elapsed());
    assert!(!report.is_success());
    let named = report.failures().iter().any(|f| f.op == OpKind::AllGather && f.message.contains("[1]"));
    assert!(named, "{report}");
}

#[test]
fn a_failure_names_the_call_the_place_and_both_values() {
    let report = run(Bug::DropsTailOfOddCounts, 3, &Config::quick().only("all_reduce/f32/sum"));
    let text = report.failures()[0].to_string();
    for part in ["all_reduce of 3 f32 sum", "element 2 of 3", "expected", "got", "rank"] {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[cfg(feature = "host-backend")]
#[test]
fn corrupted_receives() {
    use comm_core::{Capability, CreateContext, DeviceComm, HostFactory, Result};

    struct Corrupt;
    impl BackendFactory for Corrupt {
        fn name(&self) -> &str {
            "corrupt"
        }
        fn probe(&self, context: &CreateContext) -> Result<Capability> {
            HostFactory.probe(context)
        }
        fn create(&self, context: &CreateContext, all: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
            Ok(Arc::new(Wrong::new(HostFactory.create(context, all)?, Bug::CorruptsReceives)))
        }
    }
    let config = Config::quick().only("send/");
    let report = run_threads(Arc::new(Corrupt), 2, |_| Box::new(HostMemory::new()), &config);
    assert!(!report.is_success() && report.failures()[0].op == OpKind::Send, "{report}");
}

#[test]
fn a_checked_mode_that_checks_nothing() {
    let config = Config { checked: true, timeout: Duration::from_secs(2), ..Config::quick() };
    let report = run(Bug::None, 3, &config.only("all_reduce/mismatch"));
    assert!(!report.is_success() && report.failures()[0].op == OpKind::AllReduce, "{report}");
}
