//! How the devices of one host are connected, as data: what algorithms choose by.
//!
//! Pure functions of a matrix of links. Who finds the links out, and how, is a backend's business.

use std::fmt;
use std::str::FromStr;

use crate::error::CommError;

/// Neighbours of a rank in a hybrid cube mesh.
const DEGREE: usize = 4;

/// Links between the ranks' devices: `links[a][b]` of them lead from `a` to `b`, over a switch or directly.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LinkMesh {
    links: Vec<Vec<u32>>,
}

impl LinkMesh {
    /// A mesh of `links[from][to]`.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] unless the matrix is square and symmetric. The diagonal is ignored.
    pub fn new(links: Vec<Vec<u32>>) -> Result<Self, CommError> {
        let size = links.len();
        for (from, row) in links.iter().enumerate() {
            if row.len() != size {
                let reason = format!("row {from} has {} entries, not {size}", row.len());
                return Err(CommError::invalid("links", reason));
            }
            if let Some(to) = (0..size).find(|&to| to != from && links[to][from] != row[to]) {
                let reason = format!("{} links from {from} to {to}, but {} back", row[to], links[to][from]);
                return Err(CommError::invalid("links", reason));
            }
        }
        Ok(Self { links })
    }

    /// The number of ranks.
    #[must_use]
    pub fn size(&self) -> usize {
        self.links.len()
    }

    /// Links between two ranks; none for a rank and itself.
    #[must_use]
    pub fn between(&self, a: usize, b: usize) -> u32 {
        if a == b { 0 } else { self.links[a][b] }
    }

    fn neighbours(&self, rank: usize) -> Vec<usize> {
        (0..self.size()).filter(|&other| self.between(rank, other) > 0).collect()
    }

    /// What kind of mesh it is.
    #[must_use]
    pub fn classify(&self) -> Topology {
        let neighbours: Vec<_> = (0..self.size()).map(|rank| self.neighbours(rank)).collect();
        if neighbours.iter().all(|n| n.len() + 1 == self.size()) {
            return Topology::FullyConnected;
        }
        CubeMesh::of(&neighbours).map_or(Topology::Other, Topology::HybridCubeMesh)
    }
}

/// How the devices of a communicator are connected.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Topology {
    /// Every device reaches every other over links of its own or a switch.
    FullyConnected,
    /// Eight devices with four neighbours each, of which one relays.
    HybridCubeMesh(CubeMesh),
    /// Anything else, PCIe included.
    Other,
}

impl Topology {
    /// The name used in variables and tables.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::FullyConnected => "fully_connected",
            Self::HybridCubeMesh(_) => "hybrid_cube_mesh",
            Self::Other => "other",
        }
    }
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Topology {
    type Err = CommError;

    /// A topology to impose. The hybrid cube mesh is that of two fully connected quads joined rank by rank.
    fn from_str(name: &str) -> Result<Self, CommError> {
        match name {
            "fully_connected" => Ok(Self::FullyConnected),
            "hybrid_cube_mesh" => Ok(Self::HybridCubeMesh(CubeMesh::two_quads())),
            "other" => Ok(Self::Other),
            _ => Err(CommError::invalid(
                "topology",
                format!("{name:?} is none; known are fully_connected, hybrid_cube_mesh, other"),
            )),
        }
    }
}

/// The roles in a hybrid cube mesh of eight.
///
/// A rank's relay is the neighbour that is adjacent to all three ranks which the rank itself does not reach. Columns
/// are paired: if `neighbours(x)[k]` is `y`, then `neighbours(y)[k]` is `x`, so that in step `k` the ranks exchange in
/// pairs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CubeMesh {
    /// Per rank: three neighbours, and the relay last.
    columns: Vec<[usize; DEGREE]>,
}

impl CubeMesh {
    /// Two fully connected quads, ranks 0 to 3 and 4 to 7, rank `r` joined with `r + 4`.
    #[must_use]
    pub fn two_quads() -> Self {
        // Within a quad, `rank ^ (k + 1)` pairs the ranks differently in each column.
        let columns = (0..8).map(|rank| [rank ^ 1, rank ^ 2, rank ^ 3, rank ^ 4]).collect();
        Self { columns }
    }

    /// The four neighbours of `rank`, the relay last.
    #[must_use]
    pub fn neighbours(&self, rank: usize) -> [usize; DEGREE] {
        self.columns[rank]
    }

    /// The neighbour of `rank` that relays.
    #[must_use]
    pub fn relay(&self, rank: usize) -> usize {
        self.columns[rank][DEGREE - 1]
    }

    fn of(neighbours: &[Vec<usize>]) -> Option<Self> {
        if neighbours.len() != 8 || neighbours.iter().any(|n| n.len() != DEGREE) {
            return None;
        }
        let relays: Vec<usize> = (0..8).map(|rank| only_relay(neighbours, rank)).collect::<Option<_>>()?;
        if (0..8).any(|rank| relays[relays[rank]] != rank) {
            return None;
        }
        let mut columns = vec![[usize::MAX; DEGREE]; 8];
        for (rank, &relay) in relays.iter().enumerate() {
            columns[rank][DEGREE - 1] = relay;
        }
        let mut edges = Vec::new();
        for (rank, list) in neighbours.iter().enumerate() {
            edges.extend(list.iter().filter(|&&n| n > rank && n != relays[rank]).map(|&n| (rank, n)));
        }
        colour(&edges, &mut columns).then_some(Self { columns })
    }
}

/// The neighbour of `rank` that reaches every rank which `rank` does not, if there is exactly one.
fn only_relay(neighbours: &[Vec<usize>], rank: usize) -> Option<usize> {
    let mut candidates = neighbours[rank].iter().copied().filter(|&candidate| {
        (0..neighbours.len())
            .filter(|&far| far != rank && !neighbours[rank].contains(&far))
            .all(|far| neighbours[candidate].contains(&far))
    });
    candidates.next().filter(|_| candidates.next().is_none())
}

/// Gives each edge a column that is free at both its ends; backtracks. There are twelve edges and three columns.
fn colour(edges: &[(usize, usize)], columns: &mut [[usize; DEGREE]]) -> bool {
    let Some((&(a, b), rest)) = edges.split_first() else { return true };
    for column in 0..DEGREE - 1 {
        if columns[a][column] == usize::MAX && columns[b][column] == usize::MAX {
            (columns[a][column], columns[b][column]) = (b, a);
            if colour(rest, columns) {
                return true;
            }
            (columns[a][column], columns[b][column]) = (usize::MAX, usize::MAX);
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mesh(size: usize, linked: impl Fn(usize, usize) -> bool) -> LinkMesh {
        let row = |a| (0..size).map(|b| u32::from(a != b && linked(a, b))).collect();
        LinkMesh::new((0..size).map(row).collect()).unwrap()
    }

    fn quads(a: usize, b: usize) -> bool {
        a / 4 == b / 4 || a % 4 == b % 4
    }

    #[test]
    fn switches_and_pairs_are_fully_connected() {
        assert_eq!(mesh(8, |_, _| true).classify(), Topology::FullyConnected);
        assert_eq!(mesh(2, |_, _| true).classify(), Topology::FullyConnected);
        assert_eq!(mesh(1, |_, _| false).classify(), Topology::FullyConnected);
        assert_eq!(mesh(4, |a, b| a / 2 == b / 2).classify(), Topology::Other);
        assert_eq!(mesh(8, |_, _| false).classify(), Topology::Other);
    }

    #[test]
    fn cube_meshes_are_found_whatever_the_order_of_the_ranks() {
        for shift in 0..8 {
            // A permutation that mixes the quads.
            let place = |rank: usize| (rank * 3 + shift) % 8;
            let Topology::HybridCubeMesh(cube) = mesh(8, |a, b| quads(place(a), place(b))).classify() else {
                panic!("shift {shift}");
            };
            for rank in 0..8 {
                let mut seen = cube.neighbours(rank).to_vec();
                for (column, &other) in cube.neighbours(rank).iter().enumerate() {
                    assert!(quads(place(rank), place(other)));
                    assert_eq!(cube.neighbours(other)[column], rank);
                }
                seen.sort_unstable();
                seen.dedup();
                assert_eq!(seen.len(), 4);
                assert_eq!(place(cube.relay(rank)) % 4, place(rank) % 4);
            }
        }
    }

    /// Calls `each` with every graph of eight ranks with four neighbours each, as rows of bits.
    fn four_regular(rows: &mut [u8; 8], rank: usize, each: &mut impl FnMut(&[u8; 8])) {
        if rank == 8 {
            return each(rows);
        }
        let open = 4 - rows[rank].count_ones();
        for later in 0..1_u32 << (7 - rank) {
            let chosen = ((later << (rank + 1)) & 0xff) as u8;
            let fits = |other: usize| chosen >> other & 1 == 0 || rows[other].count_ones() < 4;
            if chosen.count_ones() == open && (0..8).all(fits) {
                let before = *rows;
                rows[rank] |= chosen;
                for other in (0..8).filter(|other| chosen >> other & 1 == 1) {
                    rows[other] |= 1 << rank;
                }
                four_regular(rows, rank + 1, each);
                *rows = before;
            }
        }
    }

    /// That a rank's relay is the only neighbour next to all ranks it does not reach, and that relays are mutual, leaves
    /// two fully connected quads joined rank by rank, in any numbering, and nothing else. So the ranks that a rank
    /// reaches besides its relay, and those that its relay so reaches, are the same two quads for all ranks.
    #[test]
    fn every_cube_mesh_is_two_quads_joined_by_relays() {
        let (mut all, mut cubes) = (0, 0);
        four_regular(&mut [0; 8], 0, &mut |rows| {
            all += 1;
            let linked = |a: usize, b: usize| rows[a] >> b & 1 == 1;
            let Topology::HybridCubeMesh(cube) = mesh(8, linked).classify() else { return };
            cubes += 1;
            let quad = |rank: usize| rows[rank] & !(1 << cube.relay(rank)) | 1 << rank;
            for rank in 0..8 {
                for member in (0..8).filter(|member| quad(rank) >> member & 1 == 1) {
                    assert_eq!(quad(member), quad(rank), "{rows:?}");
                    assert_eq!(quad(cube.relay(member)), !quad(rank), "{rows:?}");
                }
            }
        });
        // All graphs of that kind, and all numberings of two joined quads: 8! over their 48 symmetries.
        assert_eq!((all, cubes), (19_355, 840));
    }

    #[test]
    fn four_neighbours_alone_make_no_cube_mesh() {
        // A ring in which everybody also reaches the next but one: nobody has a relay to all three others.
        let ring = |a: usize, b: usize| matches!((a + 8 - b) % 8, 1 | 2 | 6 | 7);
        assert_eq!(mesh(8, ring).classify(), Topology::Other);
        // A hypercube with its long diagonals: every far rank is two hops away in several ways.
        let cube = |a: usize, b: usize| matches!((a ^ b).count_ones(), 1 | 3) && (a ^ b) != 0;
        assert_eq!(mesh(8, cube).classify(), Topology::Other);
    }

    #[test]
    fn meshes_are_symmetric_and_imposed_ones_have_names() {
        assert!(LinkMesh::new(vec![vec![0, 1], vec![2, 0]]).is_err());
        assert!(LinkMesh::new(vec![vec![0, 1]]).is_err());
        for name in ["fully_connected", "hybrid_cube_mesh", "other"] {
            assert_eq!(name.parse::<Topology>().unwrap().name(), name);
        }
        assert_eq!(
            "hybrid_cube_mesh".parse::<Topology>().unwrap(),
            mesh(8, quads).classify(),
            "the imposed mesh is what a machine of that kind would give"
        );
        assert!("ring".parse::<Topology>().is_err());
    }
}
