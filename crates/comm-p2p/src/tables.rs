//! The tables that algorithms are chosen by: shipped, or the user's own (`p2p.table`, `COMM_P2P_TABLE`).

use std::path::Path;
use std::sync::Arc;

use comm_core::tuning::{Choice, Table, Tables};
use comm_core::{CommError, OpKind, Result};

use crate::usage::Algorithm;

/// Measured on our own machines; the first is the one for GPUs that none of them is for.
const SHIPPED: [&str; 1] = [include_str!("../tables/nvidia_h200.json")];

/// The kind of GPU that ranks with different ones have in common.
pub(crate) const MIXED: &str = "mixed";

/// The table in use.
#[derive(Clone, Debug)]
pub(crate) struct InUse {
    /// As it was read.
    pub(crate) names: Arc<Table>,
    /// As calls ask it.
    pub(crate) algorithms: Arc<Table<Algorithm>>,
}

impl InUse {
    /// # Errors
    /// [`CommError::InvalidArgument`] if the table names what cannot be launched.
    pub(crate) fn new(table: &Table) -> Result<Self> {
        let algorithms = Arc::new(table.resolve(algorithm)?);
        Ok(Self { names: Arc::new(table.clone()), algorithms })
    }

    /// What ranks must have in common, for people to read as well.
    pub(crate) fn describe(&self, forced: Option<Algorithm>) -> String {
        let Self { names, .. } = self;
        let forced = forced.map_or_else(|| "no algorithm".to_owned(), |forced| forced.name().to_owned());
        let (gpu, world) = (names.gpu(), names.world());
        format!("table {} ({gpu:?}, {world} ranks) with {forced} forced", names.digest())
    }
}

/// The shipped tables.
pub(crate) fn shipped() -> Result<Tables> {
    let mut all = Tables::default();
    for text in SHIPPED {
        for table in Tables::parse(text)?.all() {
            all.insert(table.clone());
        }
    }
    Ok(all)
}

/// The user's own tables.
pub(crate) fn read(setting: &str, path: &Path) -> Result<Tables> {
    let invalid = |reason: String| CommError::invalid("table", reason);
    let at = format!("{setting} = {}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| invalid(format!("{at}: {error}")))?;
    let tables = Tables::parse(&text).map_err(|error| invalid(format!("{at}: {error}")))?;
    for table in tables.all() {
        InUse::new(table).map_err(|error| invalid(format!("{at}: {error}")))?;
    }
    Ok(tables)
}

/// The table for `world` GPUs of a kind: the user's for this number of ranks, of the same kind of GPU if there is one;
/// without one, of the shipped ones that of the same kind, or else of the kind that is listed first, for the nearest
/// number of ranks.
pub(crate) fn of(user: Option<&Tables>, gpu: &str, world: usize) -> Result<InUse> {
    if let Some(table) = user.and_then(|tables| tables.of_world(gpu, world)) {
        return InUse::new(table);
    }
    let shipped = shipped()?;
    let nearest = shipped.nearest(gpu, world);
    InUse::new(nearest.ok_or_else(|| CommError::invalid("table", "no table is shipped".to_owned()))?)
}

/// Every rank comes to this verdict for the same values, so all of them fail or none.
pub(crate) fn same_on_all<'a>(described: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut first = None;
    for (rank, own) in described.enumerate() {
        let first = *first.get_or_insert(own);
        if own != first {
            return Err(CommError::invalid(
                "options",
                format!(
                    "rank {rank} would choose algorithms by {own}, but rank 0 by {first}; give all ranks the same \
                     options, COMM_P2P_TABLE and COMM_P2P_ALGO"
                ),
            ));
        }
    }
    Ok(())
}

/// What a table may name for an operation.
pub(crate) const fn of_op(op: OpKind) -> &'static [Algorithm] {
    use Algorithm as A;
    match op {
        OpKind::AllReduce => {
            &[A::OneShot, A::Lamport, A::TwoShot, A::Cells, A::Steps, A::Composed, A::Pull, A::Staged]
        }
        OpKind::ReduceScatter => &[A::TwoShot, A::Cells, A::Lines, A::Steps, A::Staged],
        OpKind::AllGather => &[A::Packets, A::Lines, A::Direct, A::Spread, A::Steps, A::Staged],
        OpKind::Broadcast => &[A::Packets, A::Relayed, A::Lines, A::Direct, A::Staged],
        OpKind::AllReduceRmsNorm => &[A::OneShot, A::Lamport, A::TwoShot, A::Composed],
        _ => &[],
    }
}

/// The algorithm that a choice names, if it can be launched in the shape that the choice fixes.
fn algorithm(op: OpKind, choice: &Choice) -> Result<Algorithm> {
    let fault = |reason: String| Err(CommError::invalid("table", format!("{op}: {reason}")));
    let name = &choice.algorithm;
    let known = of_op(op);
    let Some(&algorithm) = known.iter().find(|algorithm| algorithm.name() == name) else {
        let known: Vec<_> = known.iter().map(|algorithm| algorithm.name()).collect();
        return fault(format!("{name:?} is no algorithm for it; known are [{}]", known.join(", ")));
    };
    match choice {
        Choice { block: Some(block), .. } if !block.is_multiple_of(32) || *block > 512 => {
            fault(format!("{name} in blocks of {block} threads; they take multiples of 32 up to 512"))
        }
        Choice { chunk: Some(chunk), .. } if !chunk.is_multiple_of(4096) => {
            fault(format!("{name} in chunks of {chunk} bytes; they are multiples of 4096"))
        }
        Choice { units: Some(units), .. } if !matches!(units, 2 | 4) => {
            fault(format!("{name} with {units} units; there are 2 and 4"))
        }
        _ => Ok(algorithm),
    }
}

#[cfg(test)]
mod tests {
    use comm_core::tuning::{Row, Rule};

    use super::*;

    fn with(op: OpKind, choice: Choice) -> Table {
        let rule = Rule { op, registered: false, rows: vec![Row { from: 0, choice }], measured: Vec::new() };
        Table::new("NVIDIA H200", 8, "a test", vec![rule]).unwrap()
    }

    fn named(name: &str) -> Choice {
        Choice::of(name.to_owned())
    }

    #[test]
    fn tables_are_shipped_for_h200_and_every_world() {
        let shipped = shipped().unwrap();
        for world in 2..=8 {
            let table = shipped.of_world("NVIDIA H200", world).unwrap();
            assert_eq!((table.gpu(), table.world()), ("NVIDIA H200", world));
            for op in OpKind::COLLECTIVES.into_iter().filter(|&op| !of_op(op).is_empty()) {
                assert!(table.rule(op, false).is_some(), "{op}, {world} ranks");
            }
            // Another Hopper takes the same rows.
            let other = of(None, "NVIDIA H100 80GB HBM3", world).unwrap();
            assert_eq!(other.names.digest(), table.digest());
        }
        assert_eq!(of(None, MIXED, 1).unwrap().names.world(), 2);
    }

    #[test]
    fn the_users_table_counts_for_its_own_number_of_ranks() {
        let user = Tables::new(vec![with(OpKind::AllReduce, named("staged"))]).unwrap();
        let source = |world| of(Some(&user), "NVIDIA H200", world).unwrap().names.source().to_owned();
        assert_eq!(source(8), "a test");
        assert_ne!(source(4), "a test");
        assert_eq!(of(Some(&user), "another", 8).unwrap().names.source(), "a test");
    }

    #[test]
    fn what_cannot_be_launched_is_refused_with_the_reason() {
        let shaped = |block, chunk, units| Choice { block, chunk, units, ..named("cells") };
        for (choice, reason) in [
            (named("packets"), "known are [one_shot, lamport, two_shot"),
            (shaped(Some(48), None, None), "48"),
            (shaped(Some(1024), None, None), "1024"),
            (shaped(None, Some(1000), None), "1000"),
            (shaped(None, None, Some(3)), "3 units"),
        ] {
            let error = InUse::new(&with(OpKind::AllReduce, choice)).unwrap_err().to_string();
            assert!(error.contains("all_reduce") && error.contains(reason), "{error}");
        }
        assert!(InUse::new(&with(OpKind::Barrier, named("flags"))).is_err());
        assert!(InUse::new(&with(OpKind::AllReduce, shaped(Some(512), Some(8192), Some(4)))).is_ok());
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own.json");
        let error = |path: &Path| read("COMM_P2P_TABLE", path).unwrap_err().to_string();
        assert!(error(&path).contains("own.json"), "{}", error(&path));
        std::fs::write(&path, "{}").unwrap();
        assert!(error(&path).contains("COMM_P2P_TABLE"), "{}", error(&path));
        let bad = Tables::new(vec![with(OpKind::AllGather, named("one_shot"))]).unwrap();
        std::fs::write(&path, bad.to_string()).unwrap();
        assert!(error(&path).contains("\"one_shot\" is no algorithm"), "{}", error(&path));
        std::fs::write(&path, shipped().unwrap().to_string()).unwrap();
        assert_eq!(read("COMM_P2P_TABLE", &path), shipped());
    }

    #[test]
    fn ranks_with_different_tables_are_refused() {
        let own = |choice, forced| InUse::new(&with(OpKind::AllReduce, choice)).unwrap().describe(forced);
        let (one, two) = (own(named("one_shot"), None), own(named("two_shot"), None));
        let forced = own(named("one_shot"), Some(Algorithm::Staged));
        assert_eq!(same_on_all([&*one, &*one].into_iter()), Ok(()));
        for other in [two, forced] {
            let error = same_on_all([&*one, &*one, &*other].into_iter()).unwrap_err();
            assert!(matches!(error, CommError::InvalidArgument { .. }), "{error:?}");
            assert!(error.to_string().contains("rank 2") && error.to_string().contains(&other), "{error}");
        }
    }
}
