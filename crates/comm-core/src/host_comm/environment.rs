//! A [`Rendezvous`] from environment variables, and the token that rank 0 leaves to the other ranks of its host.
//!
//! [`Rendezvous::from_env`] documents the variables. This module only reads them and never sets one.

use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::{CallSite, CommError, Result};
use crate::host_comm::Deadline;
use crate::host_comm::address::RendezvousAddress;
use crate::host_comm::private_dir::check_private_dir;
use crate::host_comm::rendezvous::Rendezvous;
use crate::host_comm::token::{Token, fill_random, hex, read_private, write_private};
use crate::op::OpKind;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
const TOKEN_POLL: Duration = Duration::from_millis(10);

/// Looks a variable up; tests pass maps.
type Get<'a> = &'a dyn Fn(&str) -> Option<String>;

/// This process's rank on its host, from `LOCAL_RANK`; what a program usually picks its GPU by.
///
/// # Errors
/// [`CommError::InvalidArgument`] when the variable is missing or not a number.
pub fn local_rank_from_env() -> Result<usize> {
    required(&|name| std::env::var(name).ok(), "LOCAL_RANK")
}

pub(super) fn rendezvous(get: Get<'_>) -> Result<Rendezvous> {
    let rank: usize = required(get, "RANK")?;
    let size: usize = required(get, "WORLD_SIZE")?;
    if rank >= size {
        let reason = format!("{rank} is not below WORLD_SIZE, which is {size}");
        return Err(CommError::invalid("environment variable RANK", reason));
    }
    let timeout = match optional::<f64>(get, "COMM_TIMEOUT_SECS")? {
        Some(secs) => Duration::try_from_secs_f64(secs).map_err(|error| {
            CommError::invalid("environment variable COMM_TIMEOUT_SECS", format!("{secs}: {error}"))
        })?,
        None => DEFAULT_TIMEOUT,
    };
    let job = text(get, "COMM_JOB_ID").or_else(|| text(get, "TORCHELASTIC_RUN_ID"));
    let job = job.unwrap_or_else(|| "default".into());
    let (address, one_host) = address(get, size, &job)?;
    let token = token(get, &address, one_host, rank, &job, timeout)?;
    Ok(Rendezvous { address, rank, size, job, token, timeout })
}

/// Where to meet, and whether all ranks run on this host.
fn address(get: Get<'_>, size: usize, job: &str) -> Result<(RendezvousAddress, bool)> {
    let local_size: Option<usize> = optional(get, "LOCAL_WORLD_SIZE")?;
    // A function of what all ranks share: where each looked at its own interfaces, those of rank 0's host would meet at
    // its unix socket and the others over TCP.
    let one_host =
        |host: &str| size == 1 || local_size.map_or_else(|| is_loopback(host), |local| local == size);
    if let Some(address) = text(get, "COMM_RENDEZVOUS") {
        let address: RendezvousAddress = address.parse()?;
        let one_host = match &address {
            RendezvousAddress::Unix(_) => true,
            RendezvousAddress::Tcp { host, .. } => one_host(host),
        };
        return Ok((address, one_host));
    }
    let Some(host) = text(get, "MASTER_ADDR") else {
        return Err(CommError::invalid(
            "environment",
            "set COMM_RENDEZVOUS (unix:/path or tcp:host:port), or MASTER_ADDR and MASTER_PORT as torchrun does",
        ));
    };
    let one_host = one_host(&host);
    if let Some(port) = optional::<u16>(get, "COMM_PORT")? {
        return tcp(host, port).map(|address| (address, one_host));
    }
    let store: u16 = required(get, "MASTER_PORT")?;
    if one_host {
        let name = format!("{}.sock", key(&[job, &host, &store.to_string()]));
        return Ok((RendezvousAddress::Unix(private_dir(get)?.join(name)), true));
    }
    // torchrun's own store listens at MASTER_PORT.
    let port = store.checked_add(1).unwrap_or(u16::MAX - 1);
    tcp(host, port).map(|address| (address, false))
}

fn tcp(host: String, port: u16) -> Result<RendezvousAddress> {
    if port == 0 {
        return Err(CommError::invalid("environment variable COMM_PORT", "a port is from 1 to 65535"));
    }
    Ok(RendezvousAddress::Tcp { host, port })
}

fn token(
    get: Get<'_>,
    address: &RendezvousAddress,
    one_host: bool,
    rank: usize,
    job: &str,
    timeout: Duration,
) -> Result<Token> {
    if let Some(path) = text(get, "COMM_TOKEN_FILE") {
        return Token::from_file(path);
    }
    if let Some(digits) = text(get, "COMM_TOKEN") {
        return Token::from_hex(&digits);
    }
    if !one_host {
        return Err(CommError::invalid(
            "environment",
            "ranks on several hosts need a shared secret: put 64 random hexadecimal digits (openssl rand -hex 32) \
             into a file of mode 0600 on each host and name it in COMM_TOKEN_FILE, or set COMM_TOKEN; if all ranks run \
             on this host, set LOCAL_WORLD_SIZE to WORLD_SIZE instead",
        ));
    }
    let path = token_path(&private_dir(get)?, address, job);
    if rank == 0 { leave_token(&path, address) } else { find_token(&path, timeout) }
}

/// Rank 0: makes a token and leaves it for the others.
fn leave_token(path: &Path, address: &RendezvousAddress) -> Result<Token> {
    if let Some(left) = LeftToken::read(path)
        && left.pid != std::process::id()
        && left.is_current()
    {
        return Err(CommError::AddrInUse {
            addr: address.to_string(),
            reason: format!(
                "process {} is rank 0 of a job with this id and address; set another COMM_JOB_ID",
                left.pid
            ),
        });
    }
    let token = Token::random()?;
    let pid = std::process::id();
    let mut salt = [0; 8];
    fill_random(&mut salt)?;
    let fresh = path.with_extension(hex(&salt));
    write_private(&fresh, &format!("{} {pid} {}\n", token.to_hex(), start_time(pid).unwrap_or_default()))?;
    std::fs::rename(&fresh, path).map_err(|error| {
        // Best effort: the rename's error is the one to report.
        let _ = std::fs::remove_file(&fresh);
        CommError::io(format!("writing the token file {}", path.display()), &error)
    })?;
    Ok(token)
}

/// Another rank: waits for the token that rank 0 leaves.
fn find_token(path: &Path, timeout: Duration) -> Result<Token> {
    let deadline = Deadline::after(timeout);
    loop {
        // What a process left that is gone belongs to an earlier job.
        if let Some(left) = LeftToken::read(path).filter(LeftToken::is_current) {
            return Ok(left.token);
        }
        if deadline.has_passed() {
            let at = CallSite::new("world", OpKind::Rendezvous, 0);
            return Err(CommError::Timeout { at, missing: vec![0], waited: deadline.elapsed() });
        }
        std::thread::sleep(TOKEN_POLL.min(deadline.remaining()));
    }
}

/// The file in which this process, as rank 0, left `token`; `None` where the token came from elsewhere.
pub(super) fn own_token_file(address: &RendezvousAddress, job: &str, token: &Token) -> Option<PathBuf> {
    let path = token_path(&private_dir_path(&|name| std::env::var(name).ok()), address, job);
    let left = LeftToken::read(&path)?;
    (left.pid == std::process::id() && left.token == *token).then_some(path)
}

/// A token with the process that left it.
struct LeftToken {
    token: Token,
    pid: u32,
    start_time: u64,
}

impl LeftToken {
    /// `None` where there is none, or what is there is not such a file of this user's.
    fn read(path: &Path) -> Option<Self> {
        let text = read_private(path).ok()?;
        let mut words = text.split_ascii_whitespace();
        let token = Token::from_hex(words.next()?).ok()?;
        Some(Self { token, pid: words.next()?.parse().ok()?, start_time: words.next()?.parse().ok()? })
    }

    fn is_current(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }
}

/// When a living process started, in clock ticks since boot: with the process id, a name that is not used twice.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the program's name, may contain anything but ends at the last parenthesis.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let is_alive = fields.next().is_some_and(|state| state != "Z" && state != "X");
    fields.nth(18)?.parse().ok().filter(|_| is_alive)
}

fn token_path(dir: &Path, address: &RendezvousAddress, job: &str) -> PathBuf {
    dir.join(format!("{}.token", key(&[job, &address.to_string()])))
}

/// A short file name for a list of texts.
fn key(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hex(&hash.finalize()[..12])
}

fn private_dir_path(get: Get<'_>) -> PathBuf {
    match text(get, "XDG_RUNTIME_DIR").filter(|dir| dir.starts_with('/')) {
        Some(dir) => Path::new(&dir).join("comm"),
        None => std::env::temp_dir().join(format!("comm-{}", rustix::process::geteuid().as_raw())),
    }
}

/// This user's own directory, made where missing.
fn private_dir(get: Get<'_>) -> Result<PathBuf> {
    let dir = private_dir_path(get);
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(CommError::io(format!("making {}", dir.display()), &error));
        }
        _ => {}
    }
    check_private_dir(&dir)?;
    Ok(dir)
}

/// Whether `host` can only mean the host it is used on.
fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn text(get: Get<'_>, name: &str) -> Option<String> {
    get(name).filter(|value| !value.is_empty())
}

fn optional<T: std::str::FromStr>(get: Get<'_>, name: &str) -> Result<Option<T>> {
    let Some(value) = text(get, name) else { return Ok(None) };
    value.trim().parse().map(Some).map_err(|_| {
        CommError::invalid(
            format!("environment variable {name}"),
            format!("{value:?} is not a number in range"),
        )
    })
}

fn required<T: std::str::FromStr>(get: Get<'_>, name: &str) -> Result<T> {
    optional(get, name)?.ok_or_else(|| {
        CommError::invalid(
            format!("environment variable {name}"),
            "it is not set; torchrun sets it for each rank",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Result<Rendezvous> {
        let token = "ab".repeat(32);
        let get = |name: &str| {
            let found = vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
            // An empty value in the list unsets the default.
            found.or_else(|| (name == "COMM_TOKEN").then(|| token.clone()))
        };
        rendezvous(&get)
    }

    const HOSTS: [(&str, &str); 5] = [
        ("RANK", "9"),
        ("WORLD_SIZE", "16"),
        ("LOCAL_WORLD_SIZE", "8"),
        ("MASTER_ADDR", "node-0"),
        ("MASTER_PORT", "29500"),
    ];

    #[test]
    fn several_hosts_meet_beside_torchruns_store() {
        let tcp = |port| RendezvousAddress::Tcp { host: "node-0".into(), port };
        let found = read(&HOSTS).unwrap();
        assert_eq!((found.rank, found.size, &*found.job, found.timeout), (9, 16, "default", DEFAULT_TIMEOUT));
        assert_eq!(found.address, tcp(29501));
        assert_eq!(read(&[&HOSTS[..4], &[("MASTER_PORT", "65535")]].concat()).unwrap().address, tcp(65534));
        let more = [("COMM_PORT", "7"), ("TORCHELASTIC_RUN_ID", "run"), ("COMM_TIMEOUT_SECS", "1.5")];
        let found = read(&[&HOSTS[..], &more].concat()).unwrap();
        assert_eq!((found.address, &*found.job, found.timeout), (tcp(7), "run", Duration::from_millis(1500)));
        let named = read(&[&HOSTS[..], &[("COMM_RENDEZVOUS", "unix:/run/x/s")]].concat()).unwrap();
        assert_eq!(named.address, RendezvousAddress::Unix("/run/x/s".into()));
    }

    #[test]
    fn all_ranks_come_to_the_same_address_wherever_they_run() {
        // The first can be listened at here, as rank 0's address can on its host and on no other.
        for host in ["0.0.0.0", "node-0"] {
            let vars = [("RANK", "0"), ("WORLD_SIZE", "16"), ("MASTER_ADDR", host), ("MASTER_PORT", "29500")];
            let expected = RendezvousAddress::Tcp { host: host.into(), port: 29501 };
            assert_eq!(read(&vars).unwrap().address, expected);
        }
        for host in ["localhost", "127.0.0.1", "::1"] {
            let vars = [("RANK", "1"), ("WORLD_SIZE", "16"), ("MASTER_ADDR", host), ("MASTER_PORT", "29500")];
            let found = read(&vars).unwrap().address;
            assert!(matches!(found, RendezvousAddress::Unix(_)), "{found}");
        }
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let cases: [(&[(&str, &str)], &str); 7] = [
            (&[("WORLD_SIZE", "2")], "RANK"),
            (&[("RANK", "0")], "WORLD_SIZE"),
            (&[("RANK", "2"), ("WORLD_SIZE", "2")], "WORLD_SIZE"),
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK"),
            (&[("RANK", "0"), ("WORLD_SIZE", "2")], "MASTER_ADDR"),
            (&[("RANK", "0"), ("WORLD_SIZE", "2"), ("COMM_TIMEOUT_SECS", "-1")], "COMM_TIMEOUT_SECS"),
            (&[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "::1"), ("COMM_PORT", "0")], "COMM_PORT"),
        ];
        for (vars, name) in cases {
            let error = read(vars).unwrap_err();
            assert!(matches!(error, CommError::InvalidArgument { .. }), "{error:?}");
            assert!(error.to_string().contains(name), "{error} does not name {name}");
        }
        let no_token = read(&[&HOSTS[..], &[("COMM_TOKEN", "")]].concat()).unwrap_err().to_string();
        assert!(no_token.contains("COMM_TOKEN_FILE"), "{no_token}");
    }
}
