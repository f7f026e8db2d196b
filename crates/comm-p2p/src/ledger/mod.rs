//! What the ranks have called, side by side: how calls that differ are noticed where nothing in the kernels' traffic tells.
//!
//! A pack or a flag says which round it is of, and has no room for what the call was: ranks that pass different types,
//! reductions or places exchange bytes of the right length and get a wrong sum. So each rank writes down what it calls,
//! in memory of the host that all ranks map, and the watchdogs compare. That costs a call a few stores and nothing on the
//! device. The difference is known some tens of milliseconds after the later of two calls that differ: too late to keep
//! the operation from being carried out, in time for the communicator to fail before much is built on the result. Checked
//! mode compares beforehand.
//!
//! Only collectives that are enqueued. Captured ones are left out: a rank may capture a graph anew while the others
//! replay theirs, and which replays meet is not seen.

mod book;

use std::os::fd::{AsFd as _, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use comm_core::{CommError, Deadline, HostComm, Result};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use self::book::{Book, WORDS, describe};
pub(crate) use self::book::{Note, mix};
use crate::symmetric::agree;

const BYTES: usize = WORDS * 8;

/// A mapping of one rank's book.
struct Page(NonNull<AtomicU64>);

// SAFETY: a mapping belongs to the process, and what lies in it is atomic.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

fn io(context: &str, errno: rustix::io::Errno) -> CommError {
    CommError::io(context, &std::io::Error::from(errno))
}

impl Page {
    /// A descriptor for memory that other processes can map.
    fn create() -> Result<OwnedFd> {
        let context = "creating a page of shared memory for the ranks' calls";
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("p2p-calls", flags).map_err(|errno| io(context, errno))?;
        rustix::fs::ftruncate(&fd, BYTES as u64).map_err(|errno| io(context, errno))?;
        // A peer that truncated the file would turn reads into SIGBUS.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|errno| io(context, errno))?;
        Ok(fd)
    }

    fn map(fd: &OwnedFd) -> Result<Self> {
        let context = "mapping a page of a rank's calls";
        let found = rustix::fs::fstat(fd).map_err(|errno| io(context, errno))?.st_size;
        if usize::try_from(found).ok() != Some(BYTES) {
            return Err(CommError::Io { context: context.into(), message: format!("it has {found} bytes") });
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases no Rust object.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), BYTES, access, MapFlags::SHARED, fd.as_fd(), 0) };
        let start = start.map_err(|errno| io(context, errno))?;
        NonNull::new(start.cast()).map(Self).ok_or_else(|| CommError::Io {
            context: context.into(),
            message: "mapped at address zero".into(),
        })
    }

    fn book(&self) -> Book<'_> {
        // SAFETY: the mapping holds that many words, page-aligned, for as long as this object lives; all ranks access
        // them as atomics only, and any bits are a number.
        Book(unsafe { std::slice::from_raw_parts(self.0.as_ptr(), WORDS) })
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by the constructor and is unmapped once. An error leaves it in place, which harms
        // nobody.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), BYTES) };
    }
}

/// All ranks' books.
pub(crate) struct Ledger {
    pages: Vec<Page>,
    rank: usize,
}

/// A call that another rank made differently.
#[derive(Debug)]
pub(crate) struct Differs {
    pub(crate) rank: usize,
    pub(crate) number: u64,
    pub(crate) own: String,
    pub(crate) other: String,
}

impl Ledger {
    /// Collective over `host`.
    pub(crate) fn create(host: &dyn HostComm, deadline: Deadline) -> Result<Self> {
        let own = Page::create();
        agree(host, &own.as_ref().map(|_| 0).map_err(Clone::clone), deadline)?;
        let own = own?;
        let fds = host.exchange_fds(&[own.as_fd()], deadline)?;
        let map = |(rank, fds): (usize, &Vec<OwnedFd>)| {
            let none = || CommError::invalid("descriptors", format!("rank {rank} sent none"));
            Page::map(fds.first().ok_or_else(none)?)
        };
        let pages: Result<Vec<Page>> = fds.iter().enumerate().map(map).collect();
        agree(host, &pages.as_ref().map(|_| 0).map_err(Clone::clone), deadline)?;
        Ok(Self { pages: pages?, rank: host.rank() })
    }

    /// Writes a call down. One thread at a time; `chain` is what the call before gave, 0 at first.
    pub(crate) fn add(&self, chain: u64, note: &Note) -> u64 {
        self.pages[self.rank].book().add(chain, note)
    }

    /// The first rank whose calls differ from this one's. Never blocks.
    pub(crate) fn compare(&self) -> Option<Differs> {
        let own = self.pages[self.rank].book();
        let others = self.pages.iter().enumerate().filter(|&(rank, _)| rank != self.rank);
        others.into_iter().find_map(|(rank, page)| {
            let found = own.difference(&page.book())?;
            let (own, mut other) = (describe(found.own), describe(found.other));
            if own == other {
                other.push_str(", with another reduction, root or place of an operand");
            }
            Some(Differs { rank, number: found.number, own, other })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use comm_core::{DType, OpKind, run_threads};

    use super::*;
    use crate::usage::Algorithm;

    #[test]
    fn ranks_read_each_others_books() {
        let timeout = Duration::from_secs(10);
        run_threads(3, timeout, |host| {
            let ledger = Ledger::create(&*host, Deadline::after(timeout)).unwrap();
            let note = |more| Note {
                kind: OpKind::Broadcast,
                algorithm: Algorithm::Packets,
                dtype: Some(DType::F32),
                count: 5,
                more,
            };
            let chain = ledger.add(0, &note(0));
            host.barrier(Deadline::after(timeout)).unwrap();
            assert!(ledger.compare().is_none());
            host.barrier(Deadline::after(timeout)).unwrap();
            ledger.add(chain, &note(u64::from(host.rank() == 2)));
            host.barrier(Deadline::after(timeout)).unwrap();
            let found = ledger.compare().unwrap();
            assert_eq!(found.rank, if host.rank() == 2 { 0 } else { 2 });
            assert_eq!((found.number, found.own.as_str()), (1, "broadcast of 5 f32 by packets"));
            assert!(found.other.contains("another reduction, root"), "{}", found.other);
            host.barrier(Deadline::after(timeout)).unwrap();
        })
        .unwrap();
    }
}
