//! Large results that the other ranks cannot reach: stored into staging memory, as into a registered result, and copied
//! from there, a piece at a time.
//!
//! The other ranks store into this rank's staging memory only after this rank's kernel has met theirs, and so after its
//! copy of the piece before: both are on one stream.

use comm_core::{DType, DeviceAddr, Result, StreamHandle};

use super::staged::copy_rows_unless_broken;
use crate::comm::P2pComm;
use crate::select::{pieces, pieces_of_parts};
use crate::state::{Call, Channels};

impl P2pComm {
    pub(super) fn bounce_all_reduce(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        (count, dtype): (usize, DType),
        stream: StreamHandle,
    ) -> Result<()> {
        let (size, staging) = (dtype.size(), &channels.staging);
        let plan = self.limits().bounced_all_reduce(count * size);
        for (begin, bytes) in pieces(count * size, 2 * channels.half) {
            let (from, to) = (send.offset(begin as u64), recv.offset(begin as u64));
            self.store_all_reduce(call, channels, &plan, (from, staging), (bytes / size, dtype), stream)?;
            let from = (staging[self.shared().info.rank], bytes);
            copy_rows_unless_broken(call, channels, from, (to, bytes), (bytes, 1), stream)?;
        }
        Ok(())
    }

    pub(super) fn bounce_all_gather(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        part: usize,
        stream: StreamHandle,
    ) -> Result<()> {
        let info = &self.shared().info;
        let plan = self.limits().bounced_all_gather(part);
        let staging = &channels.staging;
        for (begin, bytes) in pieces_of_parts(part, 2 * channels.half / info.size) {
            let from = send.offset(begin as u64);
            self.store_all_gather(call, channels, &plan, (from, staging), bytes, stream)?;
            let (from, to) = ((staging[info.rank], bytes), (recv.offset(begin as u64), part));
            copy_rows_unless_broken(call, channels, from, to, (bytes, info.size), stream)?;
        }
        Ok(())
    }

    pub(super) fn bounce_broadcast(
        &self,
        call: &Call<'_>,
        channels: &Channels,
        (send, recv): (DeviceAddr, DeviceAddr),
        (bytes, root): (usize, usize),
        stream: StreamHandle,
    ) -> Result<()> {
        let plan = self.limits().bounced_broadcast(bytes);
        let (rank, staging) = (self.shared().info.rank, &channels.staging);
        for (begin, bytes) in pieces(bytes, 2 * channels.half) {
            let (from, to) = (send.offset(begin as u64), recv.offset(begin as u64));
            // The root's own result takes no way round.
            let mut targets = *staging;
            targets[root] = if rank == root { to } else { targets[root] };
            self.store_broadcast(call, channels, &plan, (from, &targets), (bytes, root), stream)?;
            if rank != root {
                let from = (staging[rank], bytes);
                copy_rows_unless_broken(call, channels, from, (to, bytes), (bytes, 1), stream)?;
            }
        }
        Ok(())
    }
}
