//! Which kernels were launched: for a program that is to try every one, and has to know that it did.
//!
//! Off at first. A kernel that is looked up while it is on gets a flag, which its launches set; without one a launch
//! tests a word of the handle that it reads anyway. Owns the flags, never a kernel.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// A kernel's flag. It lives as long as the process, like the handles that refer to it: there is one for each name.
pub(crate) type Flag = &'static AtomicBool;

/// The flags by name, once it is on.
static FLAGS: Mutex<Option<BTreeMap<&'static str, Flag>>> = Mutex::new(None);

/// Notes from now on which of the kernels are launched that are looked up from now on, for the rest of the process. To be
/// called before any are loaded.
pub fn record() {
    FLAGS.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
}

/// The names of the kernels that were launched, or put into a graph, since [`record`]; sorted.
#[must_use]
pub fn names() -> Vec<&'static str> {
    let flags = FLAGS.lock().unwrap_or_else(PoisonError::into_inner);
    let launched = flags.iter().flatten().filter(|(_, flag)| flag.load(Ordering::Relaxed));
    launched.map(|(name, _)| *name).collect()
}

/// The flag of a kernel that is being looked up; `None` where nothing is noted.
pub(crate) fn flag_of(name: &'static str) -> Option<Flag> {
    let mut flags = FLAGS.lock().unwrap_or_else(PoisonError::into_inner);
    Some(*flags.as_mut()?.entry(name).or_insert_with(|| Box::leak(Box::default())))
}

/// A launch of the kernel that the flag belongs to.
pub(crate) fn note(flag: Option<Flag>) {
    if let Some(flag) = flag {
        flag.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The only test that turns it on: it stays so for the process.
    #[test]
    fn only_what_is_looked_up_afterwards_and_launched_is_named() {
        let before = flag_of("early");
        assert!(before.is_none() && names().is_empty());
        record();
        note(before);
        let (one, _other) = (flag_of("one"), flag_of("other"));
        assert!(names().is_empty());
        note(one);
        // By another handle of the same kernel.
        note(flag_of("one"));
        assert_eq!(names(), ["one"]);
    }
}
