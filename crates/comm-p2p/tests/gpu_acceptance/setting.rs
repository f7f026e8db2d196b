//! Where a case is tried: in which worlds, with which options besides its own, and at which length.

use crate::common::{is_process, world_size};

/// Data crosses between neighbours alone, of which a rank has four.
const CUBE: [(&str, &str); 1] = [("p2p.topology", "hybrid_cube_mesh")];

pub(crate) struct Setting {
    pub(crate) sizes: Vec<usize>,
    options: &'static [(&'static str, &'static str)],
    /// Fewer calls, none of the largest: their number and their size are tried elsewhere.
    pub(crate) brief: bool,
}

impl Setting {
    /// The devices as they are, and the worlds that [`worlds`] names.
    pub(crate) fn usual() -> Self {
        Self { sizes: worlds(), options: &[], brief: false }
    }

    /// The same with every size of world.
    pub(crate) fn of_every_size() -> Self {
        let usual = Self::usual();
        let most = usual.sizes.last().copied().unwrap_or(0);
        let sizes = if is_process() { usual.sizes } else { (2..=most).collect() };
        Self { sizes, ..usual }
    }

    /// For a body of [`as_processes`](crate::common::as_processes).
    pub(crate) fn between_processes() -> Self {
        Self { brief: true, ..Self::usual() }
    }

    /// An imposed hybrid cube mesh; `None`, after saying why, where there is no world of eight.
    pub(crate) fn in_a_cube_mesh() -> Option<Self> {
        let most = world_size()?;
        if most < 8 {
            println!("SKIP: {most} ranks are not the whole mesh: 8 GPUs, or COMM_P2P_SHARE_DEVICES=on");
            return None;
        }
        Some(Self { sizes: vec![8], options: &CUBE, brief: true })
    }

    pub(crate) const fn is_cube_mesh(&self) -> bool {
        !self.options.is_empty()
    }

    /// A case's own options, and this setting's.
    pub(crate) fn options<'a>(&self, own: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        [own, self.options].concat()
    }

    /// The algorithms to force by turns, after none: in a mesh with gaps all but one give way.
    pub(crate) fn algorithms(&self, all: &[&'static str]) -> Vec<Option<&'static str>> {
        let forced = if self.is_cube_mesh() { &["staged"] } else { all };
        [None].into_iter().chain(forced.iter().copied().map(Some)).collect()
    }
}

/// The worlds to test, up to the GPUs there are; none, after saying why, where there are too few.
pub(crate) fn worlds() -> Vec<usize> {
    let Some(most) = world_size() else { return Vec::new() };
    let smaller = |&size: &usize| size < most && !is_process();
    let mut worlds: Vec<usize> = [2, 3, 4, 6, 8].into_iter().filter(smaller).collect();
    worlds.push(most);
    worlds
}

/// The smallest world and the largest.
pub(crate) fn two_worlds() -> Vec<usize> {
    let mut worlds = worlds();
    if worlds.len() > 2 {
        worlds.drain(1..worlds.len() - 1);
    }
    worlds
}
