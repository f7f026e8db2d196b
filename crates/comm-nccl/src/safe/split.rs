//! Splitting a communicator into groups.

use comm_core::{Deadline, HostCommExt, MemoryKind, OpKind, Result};

use super::comm::NcclComm;
use super::create;
use super::memory::Asked;

/// NCCL's colours are non-negative C ints; ours are any `u32`. The index among the colours in use is both.
fn dense(colors: &[Option<u32>], own: Option<u32>) -> Option<usize> {
    let mut used: Vec<u32> = colors.iter().flatten().copied().collect();
    used.sort_unstable();
    used.dedup();
    own.and_then(|color| used.binary_search(&color).ok())
}

impl NcclComm {
    pub(super) fn split_native(&self, color: Option<u32>, key: i32) -> Result<Option<Self>> {
        const OP: OpKind = OpKind::Split;
        let shared = self.shared();
        shared.healthy()?;
        let parents = shared.hosts()?;
        let lost = |error| shared.fail(shared.relocate(error, Some(OP)));
        let deadline = Deadline::after(shared.base.timeout);
        let colors: Vec<Option<u32>> = parents.control.all_gather_by(&color, deadline).map_err(lost)?;
        let control = parents.control.split(color, i64::from(key), deadline).map_err(lost)?;
        let MemoryKind::Cuda { ordinal } = shared.info.memory else {
            return Err(shared.closed());
        };
        // Everything that can fail on one rank alone comes before the native split, which needs all ranks.
        let drafted = control
            .map(|control| {
                let hosts = create::hosts(control, None, deadline)?;
                create::draft(shared.base.clone(), hosts, ordinal)
            })
            .transpose();
        let asked = Asked { argument: "color", what: "make its end of the group" };
        let draft = shared.agree(&parents, OP, &asked, drafted)?;
        let native = shared.split_off(dense(&colors, color), key)?;
        let Some(draft) = draft else { return Ok(None) };
        draft.shared.adopt(native)?;
        Ok(Some(draft.comm))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_numbered_in_order() {
        let colors = [Some(u32::MAX), None, Some(7), Some(u32::MAX)];
        assert_eq!(dense(&colors, Some(7)), Some(0));
        assert_eq!(dense(&colors, Some(u32::MAX)), Some(1));
        assert_eq!(dense(&colors, None), None);
    }
}
