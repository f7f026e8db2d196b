//! Where the ranks of a job meet.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::CommError;

/// Where rank 0 listens and the other ranks connect.
///
/// Written `unix:/run/user/1000/job/rendezvous.sock` or `tcp:127.0.0.1:29501`.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum RendezvousAddress {
    /// A unix socket at this path, for ranks on one host; its directory belongs to this user alone (mode 0700) and is
    /// made by rank 0 where missing. Ranks that meet here can exchange file descriptors.
    Unix(PathBuf),
    /// A TCP socket. Rank 0 listens at the first address of its own host's that `host` stands for there, one that is not
    /// a loopback address where there is one, and at no other; the other ranks try all that it stands for on theirs.
    ///
    /// Some systems let a host's own name stand for a loopback address (Debian for `127.0.1.1`, in `/etc/hosts`), where
    /// ranks on other hosts time out. Then name rank 0's host by its address in numbers.
    Tcp {
        /// A name, an IPv4 address or an IPv6 address (without brackets).
        host: String,
        /// The port, not zero.
        port: u16,
    },
}

impl fmt::Display for RendezvousAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

impl FromStr for RendezvousAddress {
    type Err = CommError;

    fn from_str(text: &str) -> Result<Self, CommError> {
        let wrong = || {
            CommError::invalid(
                "rendezvous address",
                format!("{text:?} is neither unix:/path nor tcp:host:port, with a port from 1 to 65535"),
            )
        };
        if let Some(path) = text.strip_prefix("unix:").filter(|path| path.starts_with('/')) {
            return Ok(Self::Unix(path.into()));
        }
        let (host, port) =
            text.strip_prefix("tcp:").and_then(|rest| rest.rsplit_once(':')).ok_or_else(wrong)?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        match port.parse() {
            Ok(port) if port != 0 && !host.is_empty() => Ok(Self::Tcp { host: host.into(), port }),
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip_and_wrong_ones_are_refused() {
        for text in ["unix:/tmp/a b/s.sock", "tcp:127.0.0.1:29501", "tcp:node-1:1", "tcp:[::1]:65535"] {
            assert_eq!(text.parse::<RendezvousAddress>().unwrap().to_string(), text);
        }
        for text in
            ["", "unix:", "unix:relative", "tcp:host", "tcp:host:0", "tcp::5", "tcp:h:65536", "udp:h:5"]
        {
            assert!(
                matches!(text.parse::<RendezvousAddress>(), Err(CommError::InvalidArgument { .. })),
                "{text}"
            );
        }
    }
}
