//! TCP sockets of the rendezvous: which of a host name's addresses are listened at and connected to.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::error::{CommError, Result};
use crate::host_comm::address::RendezvousAddress;
use crate::host_comm::transport::bind_error;

/// Connects to the first of `targets` that answers.
pub(super) fn dial_tcp(targets: &[SocketAddr], until: Instant) -> Option<OwnedFd> {
    for (index, target) in targets.iter().enumerate() {
        // One that is silent leaves the others their share of the time.
        let left = until.saturating_duration_since(Instant::now()) / (targets.len() - index) as u32;
        let Ok(stream) = TcpStream::connect_timeout(target, left.max(Duration::from_millis(1))) else {
            continue;
        };
        // A connection to a free port of this host can meet itself when the kernel picks that very port.
        if stream.set_nonblocking(true).is_err() || stream.local_addr().ok() == stream.peer_addr().ok() {
            continue;
        }
        let fd = OwnedFd::from(stream);
        tune_tcp(&fd);
        return Some(fd);
    }
    None
}

/// Listens at the first of `targets` that is this host's, which ranks of this host that try them in the same order meet.
pub(super) fn bind_tcp(address: &RendezvousAddress, targets: &[SocketAddr]) -> Result<TcpListener> {
    let mut outcome = Err(std::io::ErrorKind::AddrNotAvailable.into());
    for target in targets {
        outcome = TcpListener::bind(target);
        if !matches!(&outcome, Err(error) if is_not_of_this_host(error)) {
            break;
        }
    }
    let listener = outcome.map_err(|error| bind_error(address, &error))?;
    if let (RendezvousAddress::Tcp { host, .. }, Ok(at)) = (address, listener.local_addr())
        && at.ip().is_loopback()
        && host != "localhost"
        && host.parse::<IpAddr>().is_err()
    {
        tracing::warn!(
            "the host name {host:?} stands for {} on this host, where ranks on other hosts cannot connect; if there \
             are any, meet at an address in numbers or change this host's /etc/hosts",
            at.ip()
        );
    }
    Ok(listener)
}

/// Another of a name's addresses may do: this one is of another host, or of a protocol that this host does not speak.
fn is_not_of_this_host(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error())
}

/// The addresses that `host` stands for, those that other hosts may reach first: a name may stand for a loopback address
/// on its own host too.
pub(super) fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>> {
    let wrong = |reason: String| CommError::invalid("rendezvous address", format!("host {host:?}: {reason}"));
    let found = (host, port).to_socket_addrs().map_err(|error| wrong(error.to_string()))?;
    let found = in_order(found.collect());
    if found.is_empty() { Err(wrong("no address found".into())) } else { Ok(found) }
}

fn in_order(mut found: Vec<SocketAddr>) -> Vec<SocketAddr> {
    found.sort_by_key(|address| address.ip().is_loopback());
    let mut seen = Vec::new();
    found.retain(|address| {
        let is_new = !seen.contains(address);
        seen.push(*address);
        is_new
    });
    found
}

/// Small messages leave at once, and a host that vanishes is noticed. Best effort: without them it still works.
pub(super) fn tune_tcp(fd: &OwnedFd) {
    use rustix::net::sockopt;
    let _ = sockopt::set_tcp_nodelay(fd, true);
    let _ = sockopt::set_socket_keepalive(fd, true);
    let _ = sockopt::set_tcp_keepidle(fd, Duration::from_secs(1));
    let _ = sockopt::set_tcp_keepintvl(fd, Duration::from_secs(1));
    let _ = sockopt::set_tcp_keepcnt(fd, 5);
    let _ = sockopt::set_tcp_user_timeout(fd, 10_000);
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn addresses_that_other_hosts_reach_go_first() {
        let found = addresses(&["127.0.1.1:5", "192.0.2.1:5", "127.0.1.1:5", "[::1]:5", "192.0.2.1:5"]);
        assert_eq!(in_order(found), addresses(&["192.0.2.1:5", "127.0.1.1:5", "[::1]:5"]));
    }

    #[test]
    fn an_address_of_another_host_is_passed_over_when_binding_and_a_deaf_one_when_connecting() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = RendezvousAddress::Tcp { host: "localhost".into(), port };
        // The first is reserved for documentation, and so no host's.
        let targets = addresses(&[&format!("192.0.2.1:{port}"), &format!("127.0.0.1:{port}")]);
        let listener = bind_tcp(&address, &targets).unwrap();
        assert_eq!(listener.local_addr().unwrap(), targets[1]);
        let taken = bind_tcp(&address, &targets).unwrap_err();
        assert!(matches!(taken, CommError::AddrInUse { .. }), "{taken:?}");
        let nowhere = bind_tcp(&address, &targets[..1]).unwrap_err();
        assert!(matches!(nowhere, CommError::InvalidArgument { .. }), "{nowhere:?}");
        let deaf = addresses(&["127.0.0.2:1"]);
        let targets = [&deaf[..], &targets[1..]].concat();
        assert!(dial_tcp(&targets, Instant::now() + PATIENCE).is_some());
        assert!(dial_tcp(&deaf, Instant::now() + PATIENCE).is_none());
    }
}
