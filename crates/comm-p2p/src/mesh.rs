//! One rank's view of a mesh with gaps: what its kernels need to know, and where in its neighbours' memory the other
//! ranks' data is.
//!
//! Owns no memory. The addresses it gives lie in this rank's memory or a neighbour's, never elsewhere.

use comm_core::DeviceAddr;
use comm_core::topology::Topology;
use comm_kernels::p2p::{CubeRoles, MeshRoutes, Peers};

use crate::topology::routes::Routes;

/// The view of one rank.
#[derive(Clone, Debug)]
pub(crate) struct Mesh {
    rank: usize,
    routes: Routes,
    /// What the barrier needs.
    pub(crate) barrier: MeshRoutes,
    /// In a hybrid cube mesh.
    pub(crate) cube: Option<CubeRoles>,
}

impl Mesh {
    pub(crate) fn new(rank: usize, topology: &Topology, routes: &Routes) -> Self {
        let mut barrier =
            MeshRoutes { neighbours: routes.reach(rank) & !(1 << rank), ..MeshRoutes::default() };
        for origin in (0..routes.size()).filter(|&origin| origin != rank) {
            barrier.forwards[origin] = routes.forwards(rank, origin) as u8;
            barrier.via[origin] = routes.via(rank, origin) as u8;
        }
        let cube = match topology {
            Topology::HybridCubeMesh(cube) => {
                let [quad @ .., relay] = cube.neighbours(rank);
                let far = quad.map(|rank| cube.relay(rank) as u32);
                Some(CubeRoles { quad: quad.map(|rank| rank as u32), relay: relay as u32, far, reserved: 0 })
            }
            _ => None,
        };
        Self { rank, routes: routes.clone(), barrier, cube }
    }

    /// Where this rank reads what each rank has in one half of its staging memory, given where the ranks' staging memory
    /// begins, with an area for each copy behind the rank's own of `area` bytes, and the half's offset in an area.
    pub(crate) fn halves(&self, staging: &Peers, area: usize, offset: usize) -> Peers {
        let mut halves = Peers::default();
        for (from, half) in halves.iter_mut().enumerate().take(self.routes.size()) {
            let holder = if from == self.rank { from } else { self.routes.via(self.rank, from) };
            let areas = if holder == from { 0 } else { 1 + self.routes.place(holder, from) };
            *half = staging[holder].offset((areas * area + offset) as u64);
        }
        halves
    }

    /// The copies that this rank holds for others: from which neighbour, and where. Arguments as for
    /// [`halves`](Self::halves).
    pub(crate) fn copies<'a>(
        &'a self,
        staging: &'a Peers,
        area: usize,
        offset: usize,
    ) -> impl Iterator<Item = (DeviceAddr, DeviceAddr)> + 'a {
        self.routes.held(self.rank).iter().enumerate().map(move |(place, &from)| {
            let to = staging[self.rank].offset(((1 + place) * area + offset) as u64);
            (staging[from].offset(offset as u64), to)
        })
    }

    /// In whose memory a message from one rank to another crosses, and in which box; `None` between neighbours.
    pub(crate) fn mailbox(&self, from: usize, to: usize) -> Option<(usize, usize)> {
        self.routes.mailbox(from, to)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use comm_core::topology::LinkMesh;

    use super::*;

    fn views(places: &[usize]) -> Vec<(Mesh, u32)> {
        let linked = |a: usize, b: usize| a != b && (a / 4 == b / 4 || a % 4 == b % 4);
        let row = |&a: &usize| places.iter().map(|&b| u32::from(linked(a, b))).collect();
        let mesh = LinkMesh::new(places.iter().map(row).collect()).unwrap();
        let (topology, routes) = (mesh.classify(), Routes::of(&mesh).unwrap());
        (0..places.len()).map(|rank| (Mesh::new(rank, &topology, &routes), routes.reach(rank))).collect()
    }

    /// Plays an exchange: every rank's half holds its number, copies are made, and everybody reads everything.
    #[test]
    fn everybody_reads_everybody_through_neighbours_memory_alone() {
        const AREA: usize = 100;
        for places in
            [vec![0, 1, 2, 3, 4, 5, 6, 7], vec![5, 0, 3, 6, 1, 4, 7, 2], vec![0, 2, 4, 6], (1..8).collect()]
        {
            let views = views(&places);
            let base = |rank: usize| (rank as u64 + 1) << 20;
            // What a rank may touch is not null.
            let staging = |reach: u32| {
                let mut peers = Peers::default();
                for rank in (0..places.len()).filter(|&rank| reach >> rank & 1 == 1) {
                    peers[rank] = DeviceAddr(base(rank));
                }
                peers
            };
            for offset in [0, 50] {
                let mut memory = std::collections::BTreeMap::new();
                memory.extend((0..places.len()).map(|rank| (base(rank) + offset as u64, rank)));
                for (view, reach) in &views {
                    let staging = staging(*reach);
                    let copies: Vec<_> = view.copies(&staging, AREA, offset).collect();
                    for (from, to) in copies {
                        assert!(!from.is_null() && memory.insert(to.0, memory[&from.0]).is_none());
                    }
                }
                for (view, reach) in &views {
                    let halves = view.halves(&staging(*reach), AREA, offset);
                    for (rank, half) in halves.iter().enumerate().take(places.len()) {
                        assert_eq!(memory[&half.0], rank);
                        assert!(reach >> ((half.0 >> 20) - 1) & 1 == 1);
                    }
                }
            }
        }
    }

    /// Plays the barrier: a token is brought to everybody, by those who have it.
    #[test]
    fn every_token_reaches_every_rank() {
        for places in [vec![0, 1, 2, 3, 4, 5, 6, 7], vec![0, 2, 4, 6], (1..8).collect()] {
            let views = views(&places);
            for origin in 0..places.len() {
                let mut stored = vec![0; places.len()];
                for (rank, (view, reach)) in views.iter().enumerate() {
                    let near = view.barrier.neighbours >> origin & 1 == 1;
                    assert!(rank == origin || near || view.barrier.forwards[origin] == 0);
                    if near {
                        assert_eq!(usize::from(view.barrier.via[origin]), origin);
                        stored[rank] += 1;
                    }
                    for to in (0..places.len()).filter(|&to| view.barrier.forwards[origin] >> to & 1 == 1) {
                        assert!(reach >> to & 1 == 1);
                        assert_eq!(usize::from(views[to].0.barrier.via[origin]), rank);
                        stored[to] += 1;
                    }
                }
                stored[origin] += 1;
                assert_eq!(stored, vec![1; places.len()], "each flag has one writer");
            }
        }
    }

    /// Plays the two schedules of `cube.cuh`: who stores what with whom.
    #[test]
    fn the_cubes_schedules_bring_everything_to_everybody() {
        for places in [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [3, 6, 1, 4, 7, 2, 5, 0]] {
            let roles: Vec<CubeRoles> = views(&places).iter().map(|(view, _)| view.cube.unwrap()).collect();
            let mut contributions = vec![vec![0; 8]; 8];
            let mut sliced = vec![vec![0; 8]; 8];
            for (rank, role) in roles.iter().enumerate() {
                let quad = role.quad.map(|rank| rank as usize);
                // One hop: to all neighbours, and the relay's to the quad.
                for to in quad.into_iter().chain([role.relay as usize]) {
                    contributions[to][rank] += 1;
                    sliced[to][rank] += 1;
                }
                for (k, to) in quad.into_iter().enumerate() {
                    contributions[to][role.relay as usize] += 1;
                    // `quad[k]` passes on what comes from `far[k]`, and hands to it what is for it.
                    assert_eq!(roles[to].relay, role.far[k]);
                    sliced[role.far[k] as usize][rank] += 1;
                    assert!(roles[role.far[k] as usize].far.contains(&(rank as u32)));
                }
            }
            for (rank, (contributions, sliced)) in contributions.iter().zip(&sliced).enumerate() {
                let once: Vec<i32> = (0..8).map(|other| i32::from(other != rank)).collect();
                assert_eq!((contributions, sliced), (&once, &once));
            }
        }
    }
}
