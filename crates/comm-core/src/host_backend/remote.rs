//! Reading another process's memory through the kernel: one copy where staging takes two.
//!
//! The kernel checks the peer's mappings at every call, so a peer that is gone, or has freed its operand after a failed
//! call, is a refusal here and never a fault.

use std::sync::atomic::Ordering;

use super::control::{Control, RankBlock};
use super::layout::{Layout, runs};
use super::wait::Waiting;
use crate::error::{CommError, Result};

/// Says how peers can reach this process's memory.
pub(super) fn introduce(control: &Control) {
    let own = control.own();
    own.process.store(std::process::id(), Ordering::Relaxed);
    own.home.store(std::ptr::from_ref(own) as u64, Ordering::Release);
}

/// Whether this rank can read all others' memory, once they have introduced themselves. Systems may forbid it.
pub(super) fn possible(control: &Control) -> bool {
    (0..control.size()).all(|rank| {
        let peer = control.peer(rank);
        let (process, home) = (peer.process.load(Ordering::Relaxed), peer.home.load(Ordering::Acquire));
        let mut found = 0_u32;
        let source = home as usize + std::mem::offset_of!(RankBlock, process);
        // SAFETY: the destination is a local variable of four bytes.
        let read = unsafe { once(process, std::ptr::from_mut(&mut found) as usize, source, 4) };
        matches!(read, Ok(4)) && found == process
    })
}

/// # Safety
/// `target` is valid for writes of `len` bytes.
unsafe fn once(process: u32, target: usize, source: usize, len: usize) -> std::io::Result<usize> {
    let local = libc::iovec { iov_base: target as *mut libc::c_void, iov_len: len };
    let remote = libc::iovec { iov_base: source as *mut libc::c_void, iov_len: len };
    // SAFETY: the kernel checks the remote range; the local one is valid, as the caller vouches.
    let read = unsafe {
        libc::process_vm_readv(process as libc::pid_t, &raw const local, 1, &raw const remote, 1, 0)
    };
    usize::try_from(read).map_err(|_| std::io::Error::last_os_error())
}

/// Copies bytes number `from..to` from `src` in `rank`'s process to `dst` in this one. `false` when the kernel refuses:
/// some mappings it never reads for others, and what it permits may change while a program runs.
///
/// # Safety
/// They are valid for writes in `dst`.
pub(super) unsafe fn copy(
    control: &Control,
    waiting: &Waiting<'_>,
    rank: usize,
    (dst, src): (Layout, Layout),
    (from, to): (usize, usize),
) -> Result<bool> {
    let process = control.peer(rank).process.load(Ordering::Relaxed);
    for (mut target, mut source, mut len) in runs(dst, src, from, to) {
        while len > 0 {
            // SAFETY: the run is part of `dst`, as the caller vouches.
            let read = match unsafe { once(process, target, source, len) } {
                Ok(0) => return Ok(false),
                Ok(read) => read,
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                    return Err(CommError::PeerDied { at: waiting.site(), rank });
                }
                Err(_) => return Ok(false),
            };
            (target, source, len) = (target + read, source + read, len - read.min(len));
        }
    }
    Ok(true)
}
