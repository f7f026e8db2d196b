//! The suite's buffers: data between guards, at any alignment.
//!
//! Owns memory and the guards' contents. Reuses its blocks from call to call, so that a stale read finds old data.

use crate::addr::DeviceAddr;
use crate::error::Result;
use crate::memory::DeviceMemory;

/// Guard bytes on either side of every operand: more than the widest vector access of any device.
const GUARD: usize = 256;

/// An operand and the guards around it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    block: DeviceAddr,
    offset: usize,
    pub(super) len: usize,
    salt: u8,
}

impl Region {
    /// A region in a block of the caller's, of at least [`Region::room`] bytes.
    pub(super) const fn inside(block: DeviceAddr, offset: usize, len: usize) -> Self {
        Self { block, offset, len, salt: 0x3c }
    }

    /// Bytes of block that a region takes up.
    pub(super) const fn room(offset: usize, len: usize) -> usize {
        2 * GUARD + offset + len
    }

    /// The operand's first byte.
    pub(super) const fn addr(&self) -> DeviceAddr {
        self.block.offset((GUARD + self.offset) as u64)
    }

    fn guard(&self, index: usize) -> u8 {
        (index as u8).wrapping_mul(37).wrapping_add(0x5a) ^ self.salt
    }
}

pub(super) struct Arena<'a> {
    memory: &'a dyn DeviceMemory,
    blocks: Vec<(DeviceAddr, usize)>,
    staging: Vec<u8>,
    salt: u8,
}

impl<'a> Arena<'a> {
    pub(super) fn new(memory: &'a dyn DeviceMemory) -> Self {
        Self { memory, blocks: Vec::new(), staging: Vec::new(), salt: 0 }
    }

    pub(super) fn memory(&self) -> &'a dyn DeviceMemory {
        self.memory
    }

    /// An operand of `len` bytes in block `slot`, `offset` bytes off the alignment of 256.
    pub(super) fn lay(&mut self, slot: usize, offset: usize, len: usize) -> Result<Region> {
        while self.blocks.len() <= slot {
            self.blocks.push((DeviceAddr::NULL, 0));
        }
        let room = Region::room(offset, len);
        let (block, capacity) = self.blocks[slot];
        if capacity < room {
            let capacity = room.next_power_of_two().max(4096);
            let fresh = self.memory.allocate(capacity)?;
            self.blocks[slot] = (fresh, capacity);
            if !block.is_null() {
                self.memory.synchronize()?;
                // SAFETY: the suite waits for every call that used the block before it lays the next operands.
                unsafe { self.memory.free(block) }?;
            }
        }
        self.salt = self.salt.wrapping_add(61);
        Ok(Region { block: self.blocks[slot].0, offset, len, salt: self.salt })
    }

    /// Writes the operand and its guards.
    pub(super) fn put(&mut self, region: &Region, bytes: &[u8]) -> Result<()> {
        let start = GUARD + region.offset;
        self.staging.clear();
        self.staging.extend((0..start).map(|index| region.guard(index)));
        self.staging.extend_from_slice(bytes);
        self.staging.extend((0..GUARD).map(|index| region.guard(start + region.len + index)));
        // SAFETY: the region's block has room for the operand (whose length `bytes` has) and both guards.
        unsafe { self.memory.upload(region.block, &self.staging) }
    }

    /// Fills the operand with values that no test expects, and returns them.
    pub(super) fn poison(&mut self, region: &Region) -> Result<Vec<u8>> {
        let salt = region.salt.wrapping_mul(13) | 0x80;
        let bytes: Vec<u8> = (0..region.len).map(|index| (index as u8).wrapping_mul(11) ^ salt).collect();
        self.put(region, &bytes)?;
        Ok(bytes)
    }

    /// The operand, and the first guard byte that changed, relative to the operand's start.
    pub(super) fn get(&mut self, region: &Region) -> Result<(Vec<u8>, Option<isize>)> {
        let start = GUARD + region.offset;
        self.staging.clear();
        self.staging.resize(Region::room(region.offset, region.len), 0);
        // SAFETY: the region's block is at least as long as its room.
        unsafe { self.memory.download(&mut self.staging, region.block) }?;
        let end = start + region.len;
        let outside = (0..start).chain(end..self.staging.len());
        let mut broken = outside.filter(|&index| self.staging[index] != region.guard(index));
        let broken = broken.next().map(|index| index as isize - start as isize);
        Ok((self.staging[start..end].to_vec(), broken))
    }

    /// Gives the blocks back.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.memory.synchronize()?;
        for (block, _) in self.blocks.drain(..) {
            if !block.is_null() {
                // SAFETY: all work has ended.
                unsafe { self.memory.free(block) }?;
            }
        }
        Ok(())
    }
}
