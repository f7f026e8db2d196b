//! Settings, from the context's options and the environment.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use comm_core::topology::Topology;
use comm_core::tuning::Tables;
use comm_core::{CommError, Result};
use comm_kernels::p2p::{BURST_PACKS, MAX_RANKS};

use crate::tables;
use crate::topology::verify::Pair;
use crate::usage::Algorithm;

/// What can be set; see [`P2pFactory`](crate::P2pFactory) for the names.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) staging_bytes: usize,
    pub(crate) pair_bytes: usize,
    pub(crate) packet_slots: usize,
    pub(crate) lamport_slots: usize,
    /// Whole bursts.
    pub(crate) line_slots: usize,
    pub(crate) cell_ctas: usize,
    pub(crate) first_round: u32,
    pub(crate) stall: Duration,
    /// The only rank whose kernels sleep; `None` for all.
    pub(crate) stall_rank: Option<usize>,
    /// This rank clears the other ranks' staging memory as well.
    pub(crate) clear_peers: bool,
    /// What double buffering does is switched off.
    pub(crate) single_buffer: bool,
    /// Copies go on after a wait that was given up.
    pub(crate) copies_when_broken: bool,
    /// Calls on several streams may overtake each other.
    pub(crate) unordered_streams: bool,
    /// What the first rank stores into the second's memory while the devices are checked is lost.
    pub(crate) corrupt_pair: Option<Pair>,
    pub(crate) algorithm: Option<Algorithm>,
    /// The topology to impose, by name.
    pub(crate) topology: Option<String>,
    /// Ranks may share devices.
    pub(crate) share_devices: bool,
    /// The user's own tables of algorithms.
    pub(crate) tables: Option<Arc<Tables>>,
    /// The caller's promise about operands in registered buffers.
    pub(crate) symmetric_operands: bool,
    /// Whether captured operands are registered after the capture, and how many at a time.
    pub(crate) graph_registration: bool,
    pub(crate) graph_entries: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            staging_bytes: 32 << 20,
            pair_bytes: 1 << 20,
            packet_slots: 33_792,
            lamport_slots: 67_584,
            line_slots: 84_480,
            cell_ctas: 132,
            first_round: 0,
            stall: Duration::ZERO,
            stall_rank: None,
            clear_peers: false,
            single_buffer: false,
            copies_when_broken: false,
            unordered_streams: false,
            corrupt_pair: None,
            algorithm: None,
            topology: None,
            share_devices: false,
            tables: None,
            symmetric_operands: false,
            graph_registration: false,
            graph_entries: 8192,
        }
    }
}

/// Enough for the check of the devices, and for a chunk of every type to every rank.
const LEAST_STAGING: usize = 8192;
const _: () = assert!(crate::topology::verify::NEEDED <= LEAST_STAGING);

const PREFIX: &str = "p2p.";
/// The variable that lets ranks share devices.
pub(crate) const SHARE_DEVICES: &str = "COMM_P2P_SHARE_DEVICES";

impl Options {
    /// What layouts, launches and collective calls follow from, which must be the same on all ranks; for people to read as
    /// well.
    pub(crate) fn shared_values(&self) -> String {
        let Self { staging_bytes, pair_bytes, packet_slots, lamport_slots, line_slots, cell_ctas, .. } = self;
        let Self { first_round, graph_registration, symmetric_operands, .. } = self;
        let switch = |on: &bool| if *on { "on" } else { "off" };
        format!(
            "p2p.staging_bytes={staging_bytes}, p2p.pair_bytes={pair_bytes}, p2p.packet_slots={packet_slots}, \
             p2p.lamport_slots={lamport_slots}, p2p.line_slots={line_slots}, p2p.cell_ctas={cell_ctas}, \
             p2p.first_round={first_round}, p2p.graph_registration={}, p2p.symmetric_operands={}",
            switch(graph_registration),
            switch(symmetric_operands)
        )
    }

    /// Options of other backends are ignored; unknown ones of this backend are errors.
    pub(crate) fn parse(options: &BTreeMap<String, String>) -> Result<Self> {
        let mut parsed = Self::default();
        if let Some(name) = std::env::var("COMM_P2P_ALGO").ok().filter(|name| !name.is_empty()) {
            parsed.algorithm = Some(algorithm("COMM_P2P_ALGO", &name)?);
        }
        if let Some(name) = std::env::var("COMM_P2P_TOPOLOGY").ok().filter(|name| !name.is_empty()) {
            parsed.topology = Some(topology("COMM_P2P_TOPOLOGY", &name)?);
        }
        if let Some(value) = std::env::var(SHARE_DEVICES).ok().filter(|value| !value.is_empty()) {
            parsed.share_devices = switch(SHARE_DEVICES, &value)?;
        }
        if let Some(path) = std::env::var_os("COMM_P2P_TABLE").filter(|path| !path.is_empty()) {
            parsed.tables = Some(Arc::new(tables::read("COMM_P2P_TABLE", Path::new(&path))?));
        }
        for (name, value) in options {
            let Some(own) = name.strip_prefix(PREFIX) else { continue };
            match own {
                "staging_bytes" => parsed.staging_bytes = number(name, value, LEAST_STAGING..=1 << 34)?,
                "pair_bytes" => parsed.pair_bytes = number(name, value, 256..=1 << 30)?,
                "packet_slots" => parsed.packet_slots = number(name, value, 512..=1 << 20)?,
                "lamport_slots" => parsed.lamport_slots = number(name, value, 512..=1 << 20)?,
                "line_slots" => parsed.line_slots = number(name, value, BURST_PACKS..=1 << 20)?,
                "cell_ctas" => parsed.cell_ctas = number(name, value, 1..=512)?,
                "first_round" => {
                    let most = u32::MAX as usize;
                    parsed.first_round = u32::try_from(number(name, value, 0..=most)?).unwrap_or(0);
                }
                "stall_ns" => {
                    let nanoseconds = number(name, value, 0..=10_000_000_000)?;
                    parsed.stall = Duration::from_nanos(nanoseconds as u64);
                }
                "stall_rank" => parsed.stall_rank = Some(number(name, value, 0..=usize::MAX)?),
                "test_clear_peers" => parsed.clear_peers = switch(name, value)?,
                "test_single_buffer" => parsed.single_buffer = switch(name, value)?,
                "test_copies_when_broken" => parsed.copies_when_broken = switch(name, value)?,
                "test_unordered_streams" => parsed.unordered_streams = switch(name, value)?,
                "test_corrupt_pair" => parsed.corrupt_pair = Some(pair(name, value)?),
                "algorithm" => parsed.algorithm = Some(algorithm(name, value)?),
                "topology" => parsed.topology = Some(topology(name, value)?),
                "share_devices" => parsed.share_devices = switch(name, value)?,
                "table" => parsed.tables = Some(Arc::new(tables::read(name, Path::new(value))?)),
                "graph_registration" => parsed.graph_registration = switch(name, value)?,
                "graph_entries" => {
                    let entries = number(name, value, 1..=1 << 20)?;
                    parsed.graph_entries = u32::try_from(entries).unwrap_or(u32::MAX);
                }
                "symmetric_operands" => parsed.symmetric_operands = switch(name, value)?,
                _ => {
                    return Err(CommError::invalid(
                        "options",
                        format!("the p2p backend has no option {name:?}"),
                    ));
                }
            }
        }
        // Halves and slots begin where any element may.
        parsed.staging_bytes = parsed.staging_bytes / 512 * 512;
        parsed.pair_bytes = parsed.pair_bytes / 256 * 256;
        parsed.line_slots = parsed.line_slots / BURST_PACKS * BURST_PACKS;
        Ok(parsed)
    }
}

fn number(name: &str, value: &str, range: std::ops::RangeInclusive<usize>) -> Result<usize> {
    value.parse().ok().filter(|number| range.contains(number)).ok_or_else(|| {
        CommError::invalid(
            "options",
            format!("{name} = {value:?} is no whole number from {} to {}", range.start(), range.end()),
        )
    })
}

fn switch(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(CommError::invalid("options", format!("{name} = {value:?} is neither \"on\" nor \"off\""))),
    }
}

fn pair(name: &str, value: &str) -> Result<Pair> {
    let ranks = value.split_once('-').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    ranks.filter(|&(a, b): &Pair| a != b && a.max(b) < MAX_RANKS).ok_or_else(|| {
        let most = MAX_RANKS - 1;
        CommError::invalid(
            "options",
            format!("{name} = {value:?} is no two ranks of 0 to {most}, as in \"0-1\""),
        )
    })
}

fn topology(name: &str, value: &str) -> Result<String> {
    match value.parse::<Topology>() {
        Ok(_) => Ok(value.to_owned()),
        Err(error) => Err(CommError::invalid("options", format!("{name}: {error}"))),
    }
}

fn algorithm(name: &str, value: &str) -> Result<Algorithm> {
    Algorithm::from_name(value).ok_or_else(|| {
        CommError::invalid(
            "options",
            format!("{name} = {value:?} is no algorithm; known are {}", Algorithm::names()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_options_say_what_is_wrong() {
        let parse = |name: &str, value: &str| Options::parse(&[(name.to_owned(), value.to_owned())].into());
        assert_eq!(parse("p2p.staging_bytes", "10000").unwrap().staging_bytes, 9728);
        assert_eq!(parse("p2p.algorithm", "staged").unwrap().algorithm, Some(Algorithm::Staged));
        assert_eq!(parse("p2p.first_round", "4294967290").unwrap().first_round, u32::MAX - 5);
        let lines = parse("p2p.line_slots", "1000").unwrap();
        assert_eq!(lines.line_slots, 896);
        assert!(parse("nccl.staging_bytes", "x").is_ok());
        assert!(!parse("nccl.staging_bytes", "x").unwrap().symmetric_operands);
        assert!(parse("p2p.symmetric_operands", "on").unwrap().symmetric_operands);
        assert!(!parse("p2p.symmetric_operands", "off").unwrap().symmetric_operands);
        assert_eq!(parse("p2p.stall_rank", "3").unwrap().stall_rank, Some(3));
        assert!(parse("p2p.test_single_buffer", "on").unwrap().single_buffer);
        assert!(parse("p2p.test_copies_when_broken", "on").unwrap().copies_when_broken);
        assert!(parse("p2p.test_unordered_streams", "on").unwrap().unordered_streams);
        assert!(!Options::default().copies_when_broken && !Options::default().unordered_streams);
        assert_eq!(parse("p2p.test_corrupt_pair", "2-0").unwrap().corrupt_pair, Some((2, 0)));
        assert!(parse("p2p.share_devices", "on").unwrap().share_devices);
        assert!(!parse("p2p.share_devices", "off").unwrap().share_devices);
        for (name, value) in [
            ("p2p.staging_bytes", "12"),
            ("p2p.x", "1"),
            ("p2p.algorithm", "fast"),
            ("p2p.topology", "torus"),
            ("p2p.table", "/nonexistent/table.json"),
            ("p2p.symmetric_operands", "true"),
            ("p2p.share_devices", "2"),
            ("p2p.graph_registration", "auto"),
            ("p2p.graph_entries", "0"),
            ("p2p.test_corrupt_pair", "1-1"),
            ("p2p.test_corrupt_pair", "0-8"),
            ("p2p.test_corrupt_pair", "0"),
        ] {
            let text = parse(name, value).unwrap_err().to_string();
            assert!(text.contains(name), "{text}");
        }
    }
}
