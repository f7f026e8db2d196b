//! Frames on a byte stream: taking them apart as bytes arrive, and queueing them for a socket that may not take all at
//! once.
//!
//! A frame is `head length: u32 LE`, `body length: u32 LE`, the head (an encoded message) and the body (raw bytes).
//! This module never allocates by a length that it was told, only by bytes that arrived, and never blocks.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// The longest body, in bytes: what one rank may contribute to a call, or all ranks together to an all-gather.
pub(super) const BODY_LIMIT: usize = 1 << 30;
/// The longest head, in bytes.
pub(super) const HEAD_LIMIT: usize = 1 << 20;
/// The most file descriptors that one frame carries, and one rank contributes to a call.
pub(super) const FDS_LIMIT: usize = 64;

const PREFIX: usize = 8;
const READ_SIZE: usize = 64 * 1024;
/// How much one flush sends at most, so that a peer that reads as fast as this end writes does not keep it for long.
const FLUSH_LIMIT: u64 = 4 << 20;

/// Why a byte stream is not a stream of frames, or a frame is not what it should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WireError {
    /// A length field is over the limit.
    TooLong,
    /// The other end closed or reset the connection.
    Closed,
    /// A frame does not say what one may say, or announces descriptors that never came.
    Nonsense,
    /// A frame's descriptors were lost on the way, for want of free descriptor numbers in this process. The stream goes on.
    LostDescriptors,
}

/// A frame that has arrived whole.
#[derive(PartialEq, Eq, Debug, Default)]
pub(super) struct Frame {
    payload: Vec<u8>,
    head_len: usize,
}

impl Frame {
    pub(super) fn head(&self) -> &[u8] {
        &self.payload[..self.head_len]
    }

    pub(super) fn body(&self) -> &[u8] {
        &self.payload[self.head_len..]
    }
}

#[cfg(test)]
impl Frame {
    /// A body of zeros, which takes no memory before it is looked at.
    pub(super) fn of_zeros(len: usize) -> Self {
        Self { payload: vec![0; len], head_len: 0 }
    }
}

/// Turns bytes into frames, however the stream was cut.
#[derive(Default)]
pub(super) struct Decoder {
    prefix: [u8; PREFIX],
    filled: usize,
    frame: Frame,
    payload_len: usize,
}

impl Decoder {
    /// Takes `input` and appends the frames that it completes to `frames`. After an error the stream is lost.
    pub(super) fn push(&mut self, mut input: &[u8], frames: &mut VecDeque<Frame>) -> Result<(), WireError> {
        loop {
            if self.filled < PREFIX {
                let taken = input.len().min(PREFIX - self.filled);
                self.prefix[self.filled..self.filled + taken].copy_from_slice(&input[..taken]);
                self.filled += taken;
                input = &input[taken..];
                if self.filled < PREFIX {
                    return Ok(());
                }
                let [a, b, c, d, e, f, g, h] = self.prefix;
                let head_len = u32::from_le_bytes([a, b, c, d]) as usize;
                let body_len = u32::from_le_bytes([e, f, g, h]) as usize;
                if head_len > HEAD_LIMIT || body_len > BODY_LIMIT {
                    return Err(WireError::TooLong);
                }
                self.frame.head_len = head_len;
                self.payload_len = head_len + body_len;
            }
            let taken = input.len().min(self.payload_len - self.frame.payload.len());
            self.frame.payload.extend_from_slice(&input[..taken]);
            input = &input[taken..];
            if self.frame.payload.len() < self.payload_len {
                return Ok(());
            }
            frames.push_back(std::mem::take(&mut self.frame));
            self.filled = 0;
        }
    }
}

/// Bytes that wait to be sent; bodies are shared with the frames they arrived in.
#[derive(Clone)]
pub(super) enum Segment {
    Bytes(Arc<[u8]>),
    Body(Arc<Frame>),
}

impl Segment {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Body(frame) => frame.body(),
        }
    }
}

/// The length prefix and head of a frame whose body, `body_len` bytes, follows.
pub(super) fn prefix_and_head(head: &[u8], body_len: usize) -> Result<Arc<[u8]>, WireError> {
    if head.len() > HEAD_LIMIT || body_len > BODY_LIMIT {
        return Err(WireError::TooLong);
    }
    let mut bytes = Vec::with_capacity(PREFIX + head.len());
    bytes.extend_from_slice(&(head.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&(body_len as u32).to_le_bytes());
    bytes.extend_from_slice(head);
    Ok(bytes.into())
}

struct Chunk {
    segment: Segment,
    sent: usize,
    /// Sent with the chunk's first byte.
    fds: Option<Arc<[OwnedFd]>>,
}

/// What waits to be sent on one socket.
#[derive(Default)]
pub(super) struct OutQueue {
    chunks: VecDeque<Chunk>,
    queued: u64,
    written: u64,
}

impl OutQueue {
    /// Appends a part of a frame; descriptors go with its first byte, so they need at least one.
    pub(super) fn push(&mut self, segment: Segment, fds: Option<Arc<[OwnedFd]>>) {
        let len = segment.bytes().len();
        if len > 0 {
            self.queued += len as u64;
            self.chunks.push_back(Chunk { segment, sent: 0, fds: fds.filter(|fds| !fds.is_empty()) });
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Bytes ever queued, and bytes ever written: what was queued at one time has left when the second reaches the
    /// first.
    pub(super) const fn progress(&self) -> (u64, u64) {
        (self.queued, self.written)
    }

    /// Sends what `socket` takes without blocking, up to a limit; what is left goes with a later flush.
    pub(super) fn flush(&mut self, socket: BorrowedFd<'_>) -> Result<(), WireError> {
        let enough = self.written + FLUSH_LIMIT;
        while let Some(first) = self.chunks.front()
            && self.written < enough
        {
            let attached: Vec<BorrowedFd<'_>> =
                first.fds.iter().flat_map(|fds| fds.iter().map(AsFd::as_fd)).collect();
            let mut slices = vec![IoSlice::new(&first.segment.bytes()[first.sent..])];
            // A later chunk's descriptors must go with its own first byte, so it starts a message of its own.
            let more = self.chunks.iter().skip(1).take(15).take_while(|chunk| chunk.fds.is_none());
            slices.extend(more.map(|chunk| IoSlice::new(chunk.segment.bytes())));
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_LIMIT))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !attached.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&attached)) {
                return Err(WireError::TooLong);
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(socket, &slices, &mut control, flags) {
                Ok(sent) => self.advance(sent),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(WireError::Closed),
            }
        }
        Ok(())
    }

    fn advance(&mut self, mut sent: usize) {
        self.written += sent as u64;
        while sent > 0
            && let Some(chunk) = self.chunks.front_mut()
        {
            let taken = sent.min(chunk.segment.bytes().len() - chunk.sent);
            chunk.sent += taken;
            chunk.fds = None;
            sent -= taken;
            if chunk.sent == chunk.segment.bytes().len() {
                self.chunks.pop_front();
            }
        }
    }
}

/// The receiving end of an authenticated connection.
#[derive(Default)]
pub(super) struct Receiver {
    decoder: Decoder,
    /// Frames that have arrived whole, for the owner to take.
    pub(super) frames: VecDeque<Frame>,
    /// Descriptors that have arrived, in the order of the frames that announce them. `None` stands for those of a frame
    /// that were lost, after those of it that were not.
    fds: VecDeque<Option<OwnedFd>>,
}

impl Receiver {
    /// Takes in what has arrived on `socket`, at most a few reads' worth, without blocking.
    pub(super) fn fill(&mut self, socket: BorrowedFd<'_>) -> Result<(), WireError> {
        let mut buffer = [0; READ_SIZE];
        for _ in 0..8 {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_LIMIT))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received =
                rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut buffer)], &mut control, flags);
            let received = match received {
                Ok(received) => received,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(WireError::Closed),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds.map(Some));
                }
            }
            // A read ends at the first message with descriptors, so what was lost belongs to one frame.
            if received.flags.contains(ReturnFlags::CTRUNC) {
                self.fds.push_back(None);
            }
            if received.bytes == 0 {
                return Err(WireError::Closed);
            }
            self.decoder.push(&buffer[..received.bytes], &mut self.frames)?;
            if received.bytes < READ_SIZE {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The descriptors of the next frame that announces any, which are `count`.
    pub(super) fn take_fds(&mut self, count: usize) -> Result<Vec<OwnedFd>, WireError> {
        let mut taken = Vec::new();
        while taken.len() < count {
            taken.push(self.fds.pop_front().ok_or(WireError::Nonsense)?.ok_or(WireError::LostDescriptors)?);
        }
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream_of(frames: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (head, body) in frames {
            bytes.extend_from_slice(&prefix_and_head(head, body.len()).unwrap());
            bytes.extend_from_slice(body);
        }
        bytes
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting_of_the_stream(
            frames in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..64),
                                             prop::collection::vec(any::<u8>(), 0..300)), 0..8),
            cuts in prop::collection::vec(1usize..40, 1..64),
        ) {
            let bytes = stream_of(&frames);
            let (mut decoder, mut out, mut rest) = (Decoder::default(), VecDeque::new(), &bytes[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.push(now, &mut out).unwrap();
                rest = later;
            }
            let got: Vec<_> = out.iter().map(|f| (f.head().to_vec(), f.body().to_vec())).collect();
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn any_bytes_give_frames_or_an_error_and_no_large_allocation(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..16),
        ) {
            let (mut decoder, mut out) = (Decoder::default(), VecDeque::new());
            let mut fed = 0;
            for piece in &pieces {
                fed += piece.len();
                if decoder.push(piece, &mut out).is_err() { break; }
                prop_assert!(decoder.frame.payload.capacity() <= 2 * fed + 64);
            }
        }
    }

    #[test]
    fn a_four_gigabyte_length_is_refused() {
        for prefix in [[0xff; 8], [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], [1, 0, 0x10, 0, 0, 0, 0, 0]] {
            let result = Decoder::default().push(&prefix, &mut VecDeque::new());
            assert_eq!(result, Err(WireError::TooLong));
        }
    }

    #[test]
    fn a_long_frame_takes_memory_only_as_it_arrives() {
        let mut decoder = Decoder::default();
        let prefix = prefix_and_head(b"head", BODY_LIMIT).unwrap();
        decoder.push(&prefix, &mut VecDeque::new()).unwrap();
        assert!(decoder.frame.payload.capacity() < 1024);
    }
}
