//! An error as bytes of bounded length, so that a rank can leave it where its peers find it.
//!
//! Owns what is given up when the place is too small: the tails of texts and lists, never the type of the error.

use std::borrow::Cow;

use crate::error::{CallSite, CommError};

/// Letters per text that are tried in turn.
const LETTERS: [usize; 7] = [usize::MAX, 400, 200, 100, 40, 10, 0];

/// `error` in at most `room` bytes, with its texts shortened as far as that takes.
pub(super) fn encode(error: &CommError, room: usize) -> Vec<u8> {
    LETTERS
        .into_iter()
        .filter_map(|letters| match letters {
            usize::MAX => postcard::to_stdvec(error).ok(),
            _ => postcard::to_stdvec(&shortened(error, letters)).ok(),
        })
        .find(|bytes| bytes.len() <= room)
        .unwrap_or_default()
}

/// What [`encode`] made.
pub(super) fn decode(bytes: &[u8]) -> Option<CommError> {
    postcard::from_bytes(bytes).ok()
}

fn text(text: &str, letters: usize) -> String {
    match text.char_indices().nth(letters) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

fn name(name: &str, letters: usize) -> Cow<'static, str> {
    text(name, letters).into()
}

fn site(at: &CallSite, letters: usize) -> CallSite {
    CallSite { comm: text(&at.comm, letters), ..at.clone() }
}

fn shortened(error: &CommError, n: usize) -> CommError {
    use CommError as E;
    match error {
        E::Unsupported { op, backend, reason } => {
            E::Unsupported { op: *op, backend: name(backend, n), reason: text(reason, n) }
        }
        E::InvalidArgument { argument, reason } => {
            E::InvalidArgument { argument: name(argument, n), reason: text(reason, n) }
        }
        E::Timeout { at, missing, waited } => {
            let missing = missing.iter().copied().take(n.max(1)).collect();
            E::Timeout { at: site(at, n), missing, waited: *waited }
        }
        E::PeerDied { at, rank } => E::PeerDied { at: site(at, n), rank: *rank },
        E::PeerFailed { at, rank, cause } => {
            E::PeerFailed { at: site(at, n), rank: *rank, cause: Box::new(shortened(cause, n)) }
        }
        E::Mismatch { at, rank, expected, found } => {
            E::Mismatch { at: site(at, n), rank: *rank, expected: text(expected, n), found: text(found, n) }
        }
        E::StaleHandle { handle, reason } => {
            E::StaleHandle { handle: text(handle, n), reason: text(reason, n) }
        }
        E::Cuda { call, code, message } => {
            E::Cuda { call: name(call, n), code: *code, message: text(message, n) }
        }
        E::Backend { backend, call, code, message } => E::Backend {
            backend: name(backend, n),
            call: name(call, n),
            code: *code,
            message: text(message, n),
        },
        E::Library { library, reason } => E::Library { library: name(library, n), reason: text(reason, n) },
        E::CreationFailed { backend, rank, cause } => {
            E::CreationFailed { backend: name(backend, n), rank: *rank, cause: Box::new(shortened(cause, n)) }
        }
        E::AddrInUse { addr, reason } => E::AddrInUse { addr: text(addr, n), reason: text(reason, n) },
        E::BadHandshake { peer, reason } => E::BadHandshake { peer: text(peer, n), reason: text(reason, n) },
        E::Aborted { at } => E::Aborted { at: site(at, n) },
        E::Closed { comm } => E::Closed { comm: text(comm, n) },
        E::Io { context, message } => E::Io { context: text(context, n), message: text(message, n) },
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::OpKind;

    #[test]
    fn long_causes_lose_text_but_not_their_type() {
        let long = || "\u{e9}".repeat(5000);
        let io = CommError::Io { context: "reading".into(), message: long() };
        let at = CallSite::new(long(), OpKind::AllReduce, 7);
        let missing = (0..1023).collect();
        let waited = std::time::Duration::from_secs(3);
        let nested = CommError::PeerFailed { at: at.clone(), rank: 3, cause: Box::new(io.clone()) };
        for error in [io, nested, CommError::Timeout { at, missing, waited }] {
            let bytes = encode(&error, 1008);
            assert!((100..=1008).contains(&bytes.len()), "{}", bytes.len());
            let found = decode(&bytes).unwrap();
            assert_eq!(std::mem::discriminant(&found), std::mem::discriminant(&error));
            assert_eq!(found.to_string().get(..3), error.to_string().get(..3));
        }
        let short = CommError::invalid("count", "too large");
        assert_eq!(decode(&encode(&short, 1008)), Some(short));
    }
}
