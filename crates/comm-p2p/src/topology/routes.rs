//! Who reaches whose memory in a mesh with gaps, and over which rank the rest comes.
//!
//! Pure functions of a mesh. Every rank derives the same routes from the same mesh.

use comm_core::topology::LinkMesh;

/// Ways between ranks of which not all are neighbours, none longer than two links.
///
/// What rank `to` reads of rank `from` lies in the memory of `via(to, from)`: in `from`'s own if they are neighbours,
/// else in that of a neighbour of both, which holds a copy. A rank so touches no memory but its own and its neighbours'.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Routes {
    reach: Vec<u32>,
    via: Vec<Vec<usize>>,
    held: Vec<Vec<usize>>,
}

impl Routes {
    /// The routes of a mesh, or `None` if two ranks are neither neighbours nor have one in common.
    pub(crate) fn of(mesh: &LinkMesh) -> Option<Self> {
        let size = mesh.size();
        let adjacent = |a: usize, b: usize| mesh.between(a, b) > 0;
        let reach = (0..size)
            .map(|rank| {
                (0..size)
                    .filter(|&other| adjacent(rank, other))
                    .fold(1 << rank, |reach, other| reach | 1 << other)
            })
            .collect();
        let mut via: Vec<Vec<usize>> = (0..size).map(|_| (0..size).collect()).collect();
        let mut held = vec![Vec::new(); size];
        (0..size).try_for_each(|from| {
            let mut far: Vec<usize> = (0..size).filter(|&to| to != from && !adjacent(to, from)).collect();
            // As few copies as possible: in a hybrid cube mesh the relay's serves all.
            while !far.is_empty() {
                let serves = |holder: usize| far.iter().filter(|&&to| adjacent(holder, to)).count();
                let holders = (0..size).filter(|&rank| adjacent(rank, from));
                // Of equal ones the lowest.
                let holder = holders.rev().max_by_key(|&holder| serves(holder)).filter(|&h| serves(h) > 0)?;
                far.retain(|&to| {
                    if adjacent(holder, to) {
                        via[to][from] = holder;
                    }
                    !adjacent(holder, to)
                });
                held[holder].push(from);
            }
            Some(())
        })?;
        Some(Self { reach, via, held })
    }

    pub(crate) fn size(&self) -> usize {
        self.via.len()
    }

    /// The ranks whose memory `rank` may touch, itself included: bit by bit.
    pub(crate) fn reach(&self, rank: usize) -> u32 {
        self.reach[rank]
    }

    /// In whose memory rank `to` finds what rank `from` has written.
    pub(crate) fn via(&self, to: usize, from: usize) -> usize {
        self.via[to][from]
    }

    /// The ranks of whose data `rank` holds copies, each in the place of its index.
    pub(crate) fn held(&self, rank: usize) -> &[usize] {
        &self.held[rank]
    }

    /// The place of `from`'s copy in the memory of `holder`.
    pub(crate) fn place(&self, holder: usize, from: usize) -> usize {
        self.held[holder].iter().position(|&rank| rank == from).unwrap_or(0)
    }

    /// Copies that one rank holds, at most.
    pub(crate) fn most_held(&self) -> usize {
        self.held.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// The ranks to which `rank` passes on what comes from `from`: bit by bit.
    pub(crate) fn forwards(&self, rank: usize, from: usize) -> u32 {
        let served = |&to: &usize| to != from && to != rank && from != rank && self.via[to][from] == rank;
        (0..self.size()).filter(served).fold(0, |mask, to| mask | 1 << to)
    }

    /// Of a message from one rank to another that are no neighbours: whose memory it crosses in, and the number of the
    /// box there. `None` between neighbours.
    pub(crate) fn mailbox(&self, from: usize, to: usize) -> Option<(usize, usize)> {
        let holder = self.via(to, from);
        (from != to && holder != from).then(|| {
            let boxes = self.boxes(holder);
            (holder, boxes.iter().position(|&pair| pair == (from, to)).unwrap_or(0))
        })
    }

    /// Mailboxes that one rank holds, at most.
    pub(crate) fn most_boxes(&self) -> usize {
        (0..self.size()).map(|rank| self.boxes(rank).len()).max().unwrap_or(0)
    }

    fn boxes(&self, holder: usize) -> Vec<(usize, usize)> {
        let pairs = (0..self.size()).flat_map(|from| (0..self.size()).map(move |to| (from, to)));
        pairs.filter(|&(from, to)| self.forwards(holder, from) >> to & 1 == 1).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use comm_core::topology::Topology;

    use super::*;

    fn mesh(places: &[usize]) -> LinkMesh {
        let linked = |a: usize, b: usize| a != b && (a / 4 == b / 4 || a % 4 == b % 4);
        let row = |&a: &usize| places.iter().map(|&b| u32::from(linked(a, b))).collect();
        LinkMesh::new(places.iter().map(row).collect()).unwrap()
    }

    fn check(places: &[usize]) -> Routes {
        let mesh = mesh(places);
        let routes = Routes::of(&mesh).unwrap();
        let mut boxes = std::collections::BTreeSet::new();
        for to in 0..places.len() {
            for from in (0..places.len()).filter(|&from| from != to) {
                let via = routes.via(to, from);
                if mesh.between(to, from) > 0 {
                    assert_eq!((via, routes.mailbox(from, to)), (from, None));
                } else {
                    // The reader and the writer reach the holder, and the holder has a place for it.
                    assert!(routes.reach(to) >> via & 1 == 1 && routes.reach(from) >> via & 1 == 1);
                    assert_eq!(routes.held(via)[routes.place(via, from)], from);
                    assert!(routes.forwards(via, from) >> to & 1 == 1);
                    let mailbox = routes.mailbox(from, to).unwrap();
                    assert!(mailbox.0 == via && mailbox.1 < routes.most_boxes());
                    assert!(boxes.insert(mailbox), "{mailbox:?} is used twice");
                }
            }
            assert!(routes.held(to).len() <= routes.most_held());
        }
        routes
    }

    #[test]
    fn in_a_cube_mesh_the_relay_holds_one_copy_for_all_who_need_it() {
        let places: [[usize; 8]; 3] =
            [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [3, 6, 1, 4, 7, 2, 5, 0]];
        for places in places {
            let routes = check(&places);
            let Topology::HybridCubeMesh(cube) = mesh(&places).classify() else { panic!() };
            assert_eq!((routes.most_held(), routes.most_boxes()), (1, 3));
            for rank in 0..8 {
                assert_eq!(routes.held(rank), [cube.relay(rank)]);
                assert_eq!(routes.reach(rank).count_ones(), 5);
            }
        }
    }

    #[test]
    fn parts_of_a_cube_mesh_have_routes_where_they_hold_together() {
        check(&[0, 2, 4, 6]);
        check(&[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(check(&[4, 5, 6, 7]).most_held(), 0);
        for all in 0..256_usize {
            let places: Vec<usize> = (0..8).filter(|rank| all >> rank & 1 == 1).collect();
            if Routes::of(&mesh(&places)).is_some() {
                check(&places);
            } else {
                assert!(places.len() >= 2);
            }
        }
        // 6 is a neighbour of none, and none of the three can pass anything on to it.
        assert!(Routes::of(&mesh(&[0, 1, 6])).is_none());
    }
}
