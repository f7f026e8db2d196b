//! How the ranks' devices are connected, and whether what they write to each other arrives.

mod cache;
pub(crate) mod links;
pub(crate) mod routes;
pub(crate) mod verify;

use comm_core::topology::{LinkMesh, Topology};
use comm_core::{CommError, OpKind, Result};

use self::links::{Links, MOST_LINKS};
use self::routes::Routes;

/// A rank of the communicator that was made first, before any split: an imposed mesh is about these. Where there are
/// fewer than it takes, they make up the mesh's first part.
pub(crate) type Place = usize;

/// The topology of a communicator: every rank derives the same from the same facts. One can be imposed by name. With it
/// come the routes, if ranks may touch their neighbours' memory alone.
pub(crate) fn of_ranks(
    links: &[Links],
    imposed: Option<&str>,
    places: &[Place],
) -> Result<(Topology, Option<Routes>)> {
    let Some(name) = imposed else {
        let mesh = mesh(links)?;
        let topology = mesh.classify();
        // Gaps are what direct links leave. Where there are only switches, links that seem to be missing are ones that NVML
        // did not tell of; and without any, devices may reach each other over the bus. If not, their check says so.
        let may_have_gaps = links.iter().any(|device| !device.direct.is_empty());
        let routes =
            if may_have_gaps && topology != Topology::FullyConnected { Routes::of(&mesh) } else { None };
        return Ok((topology, routes));
    };
    let topology: Topology = name.parse()?;
    let Topology::HybridCubeMesh(cube) = topology else { return Ok((topology, None)) };
    if let Some(&place) = places.iter().find(|&&place| place >= 8) {
        let reason = format!("a hybrid cube mesh has 8 ranks; there is none of number {place}");
        return Err(CommError::invalid("COMM_P2P_TOPOLOGY", reason));
    }
    let linked = |a: Place, b: Place| u32::from(cube.neighbours(a).contains(&b));
    let row = |&a: &Place| places.iter().map(|&b| linked(a, b)).collect();
    let mesh = LinkMesh::new(places.iter().map(row).collect())?;
    let topology = mesh.classify();
    if topology == Topology::FullyConnected {
        return Ok((topology, None));
    }
    let routes = Routes::of(&mesh).ok_or_else(|| {
        let reason = format!("the ranks {places:?} of the imposed hybrid cube mesh do not reach each other");
        CommError::unsupported(OpKind::Split, crate::NAME, reason)
    })?;
    Ok((topology, Some(routes)))
}

/// Whether every pair of ranks is known to be joined by NVLink, or is on one device, whatever topology is imposed.
pub(crate) fn all_linked(links: &[Links]) -> Result<bool> {
    Ok(mesh(links)?.classify() == Topology::FullyConnected)
}

/// Links over switches count for every pair of devices that both have some. Ranks on one device reach each other over
/// nothing but its memory, as if over all links.
fn mesh(links: &[Links]) -> Result<LinkMesh> {
    let between = |a: &Links, b: &Links| {
        if !a.bus.is_empty() && a.bus == b.bus {
            return MOST_LINKS;
        }
        let direct = a.direct.iter().filter(|&bus| *bus == b.bus).count();
        let back = b.direct.iter().filter(|&bus| *bus == a.bus).count();
        // Both ends must see a link for it to be one.
        direct.min(back) as u32 + a.switch.min(b.switch)
    };
    LinkMesh::new(links.iter().map(|a| links.iter().map(|b| between(a, b)).collect()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(bus: &str, switch: u32, direct: &[&str]) -> Links {
        let direct = direct.iter().map(|&bus| bus.to_owned()).collect();
        Links { bus: bus.to_owned(), switch, direct, unknown: None }
    }

    #[test]
    fn switches_connect_everybody_and_direct_links_two() {
        let switched = [device("a", 18, &[]), device("b", 18, &[]), device("c", 18, &[])];
        assert_eq!(of_ranks(&switched, None, &[]).unwrap(), (Topology::FullyConnected, None));
        let pairs = [device("a", 0, &["b", "b"]), device("b", 0, &["a", "a"]), device("c", 0, &[])];
        assert_eq!(of_ranks(&pairs, None, &[]).unwrap(), (Topology::Other, None));
        assert_eq!(mesh(&pairs).unwrap().between(0, 1), 2);
        let one_sided = [device("a", 0, &["b"]), device("b", 0, &[])];
        assert_eq!(of_ranks(&one_sided, None, &[]).unwrap(), (Topology::Other, None));
    }

    #[test]
    fn ranks_on_one_device_reach_each_other_whatever_its_links() {
        let lone = vec![device("a", 0, &[]); 8];
        assert_eq!(of_ranks(&lone, None, &[]).unwrap(), (Topology::FullyConnected, None));
        // Two on each of two that a bridge joins: no cycle with gaps.
        let (a, b) = (device("a", 0, &["b"]), device("b", 0, &["a"]));
        let joined = [a.clone(), b.clone(), a, b];
        assert_eq!(of_ranks(&joined, None, &[]).unwrap(), (Topology::FullyConnected, None));
        let switched: Vec<_> = ["a", "b", "c", "a", "b"].map(|bus| device(bus, 18, &[])).to_vec();
        assert_eq!(of_ranks(&switched, None, &[]).unwrap(), (Topology::FullyConnected, None));
        // Of one rank NVML did not say: no gaps for that.
        let mut untold: Vec<_> = ["a", "b", "a", "b"].map(|bus| device(bus, 18, &[])).to_vec();
        untold[2].switch = 0;
        assert_eq!(of_ranks(&untold, None, &[]).unwrap(), (Topology::Other, None));
        // What is not told apart by its place is not known to be one device.
        let nameless = vec![device("", 0, &[]); 2];
        assert_eq!(of_ranks(&nameless, None, &[]).unwrap().0, Topology::Other);
    }

    #[test]
    fn a_topology_can_be_imposed() {
        let two = [device("a", 0, &[]), device("b", 0, &[])];
        let impose = |name| of_ranks(&two, Some(name), &[0, 1]);
        assert_eq!(impose("fully_connected").unwrap(), (Topology::FullyConnected, None));
        assert_eq!(impose("other").unwrap(), (Topology::Other, None));
        assert_eq!(impose("hybrid_cube_mesh").unwrap(), (Topology::FullyConnected, None));
        assert!(impose("torus").is_err());
        assert!(of_ranks(&two, Some("hybrid_cube_mesh"), &[0, 8]).is_err());
    }

    #[test]
    fn what_is_imposed_makes_no_links() {
        let two = |switch| [device("a", switch, &[]), device("b", switch, &[])];
        assert!(all_linked(&two(18)).unwrap());
        for name in ["fully_connected", "hybrid_cube_mesh"] {
            assert_eq!(of_ranks(&two(0), Some(name), &[0, 1]).unwrap().0, Topology::FullyConnected);
        }
        assert!(!all_linked(&two(0)).unwrap());
        assert!(!all_linked(&[device("a", 18, &[]), Links::default()]).unwrap());
    }

    #[test]
    fn groups_of_an_imposed_cube_mesh_keep_to_its_links() {
        let group = |places: &[usize]| {
            let links = vec![Links::default(); places.len()];
            of_ranks(&links, Some("hybrid_cube_mesh"), places)
        };
        let (topology, routes) = group(&[7, 6, 5, 4, 3, 2, 1, 0]).unwrap();
        assert!(matches!(topology, Topology::HybridCubeMesh(_)) && routes.is_some());
        assert_eq!(group(&[4, 5, 6, 7]).unwrap(), (Topology::FullyConnected, None));
        assert_eq!(group(&[3]).unwrap(), (Topology::FullyConnected, None));
        let (topology, routes) = group(&[0, 2, 4, 6]).unwrap();
        assert_eq!((topology, routes.unwrap().reach(0)), (Topology::Other, 0b0111));
        assert!(matches!(group(&[0, 1, 6]), Err(CommError::Unsupported { .. })));
    }

    #[test]
    fn of_parts_of_an_imposed_cube_mesh_the_conformance_suite_fits_those_without_gaps_and_the_whole() {
        // The groups that the suite makes: all, by `rank % 2`, all but rank 0, halves.
        let groups = |world: usize| {
            let by = |keep: &dyn Fn(usize) -> bool| (0..world).filter(|&rank| keep(rank)).collect::<Vec<_>>();
            let mut groups = vec![by(&|_| true), by(&|rank| rank % 2 == 0), by(&|rank| rank % 2 == 1)];
            groups.push(by(&|rank| rank > 0));
            if world.is_multiple_of(2) {
                groups.extend([by(&|rank| rank < world / 2), by(&|rank| rank >= world / 2)]);
            }
            groups
        };
        let reach = |places: &Vec<usize>| {
            let links = vec![Links::default(); places.len()];
            of_ranks(&links, Some("hybrid_cube_mesh"), places)
        };
        let fits = |world: &usize| groups(*world).iter().all(|places| reach(places).is_ok());
        assert_eq!((2..=8).filter(fits).collect::<Vec<_>>(), [2, 3, 4, 8]);
        let with_gaps = |places: &Vec<usize>| reach(places).is_ok_and(|(_, routes)| routes.is_some());
        assert_eq!(groups(8).iter().filter(|&places| with_gaps(places)).count(), 4);
    }

    #[test]
    fn direct_links_that_make_a_cube_mesh_are_kept_to() {
        let name = |rank: usize| format!("gpu{rank}");
        let links: Vec<Links> = (0..8)
            .map(|rank: usize| {
                let ends = [rank ^ 1, rank ^ 2, rank ^ 3, rank ^ 4].map(name);
                device(&name(rank), 0, &ends.each_ref().map(String::as_str))
            })
            .collect();
        let (topology, routes) = of_ranks(&links, None, &[]).unwrap();
        assert!(matches!(topology, Topology::HybridCubeMesh(_)));
        assert_eq!(routes.unwrap().reach(0), 0b0001_1111);
    }
}
