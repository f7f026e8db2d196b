//! How the ranks' devices are connected, and whether what they write to each other arrives.

mod cache;
pub(crate) mod links;
pub(crate) mod routes;
pub(crate) mod verify;

use comm_core::topology::{LinkMesh, Topology};
use comm_core::{CommError, Result};

use self::links::Links;

/// The topology of a communicator: every rank derives the same from the same facts. `COMM_P2P_TOPOLOGY` imposes one.
pub(crate) fn of_ranks(links: &[Links], imposed: Option<&str>) -> Result<Topology> {
    if let Some(name) = imposed {
        let topology: Topology = name.parse()?;
        if matches!(topology, Topology::HybridCubeMesh(_)) && links.len() != 8 {
            return Err(CommError::invalid(
                "COMM_P2P_TOPOLOGY",
                format!("a hybrid cube mesh has 8 ranks, not {}", links.len()),
            ));
        }
        return Ok(topology);
    }
    Ok(mesh(links)?.classify())
}

/// Links over switches count for every pair of devices that both have some.
fn mesh(links: &[Links]) -> Result<LinkMesh> {
    let between = |a: &Links, b: &Links| {
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
        assert_eq!(of_ranks(&switched, None).unwrap(), Topology::FullyConnected);
        let pairs = [device("a", 0, &["b", "b"]), device("b", 0, &["a", "a"]), device("c", 0, &[])];
        assert_eq!(of_ranks(&pairs, None).unwrap(), Topology::Other);
        assert_eq!(mesh(&pairs).unwrap().between(0, 1), 2);
        let one_sided = [device("a", 0, &["b"]), device("b", 0, &[])];
        assert_eq!(of_ranks(&one_sided, None).unwrap(), Topology::Other);
    }

    #[test]
    fn a_topology_can_be_imposed() {
        let two = [device("a", 0, &[]), device("b", 0, &[])];
        assert_eq!(of_ranks(&two, Some("fully_connected")).unwrap(), Topology::FullyConnected);
        assert!(of_ranks(&two, Some("hybrid_cube_mesh")).is_err());
        assert!(of_ranks(&two, Some("torus")).is_err());
    }
}
