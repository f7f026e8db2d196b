//! The handshake by which a rank and the hub prove to each other that they belong to the same job.
//!
//! Four frames of fixed size: the rank's hello with its nonce, the hub's challenge with its nonce and proof, the rank's
//! proof, the hub's verdict. Each proof is an HMAC-SHA256 under the job's token over its sender's role, the protocol's
//! version, the rank, the world size, the job id's hash and both nonces, so none can be replayed or reflected. Nothing
//! here is allocated by what an unauthenticated peer says, and nothing here knows a socket.

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::error::Result;
use crate::host_comm::token::{Token, fill_random};

const MAGIC: [u8; 8] = *b"comm-rdv";
/// Differs between builds whose frames differ.
const VERSION: u32 = 1;

pub(super) const HELLO_LEN: usize = 8 + 4 + 4 + 4 + 32 + 32;
pub(super) const CHALLENGE_LEN: usize = 8 + 4 + 32 + 32;
pub(super) const PROOF_LEN: usize = 32;
pub(super) const VERDICT_LEN: usize = 4 + 32;

type Mac256 = [u8; 32];

/// What both ends of a connection must agree on.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) token: Token,
    pub(super) size: usize,
    pub(super) job: String,
}

impl Identity {
    fn job_hash(&self) -> [u8; 32] {
        Sha256::digest(self.job.as_bytes()).into()
    }

    fn mac(&self, role: &[u8], transcript: &Transcript) -> Hmac<Sha256> {
        // HMAC itself fills a short key up with zeros to its block of 64 bytes; doing so here cannot fail.
        let mut key = [0; 64];
        key[..32].copy_from_slice(self.token.bytes());
        let mut mac = Hmac::<Sha256>::new(&key.into());
        mac.update(role);
        mac.update(&transcript.hello);
        mac.update(&transcript.nonce);
        mac
    }

    fn proof(&self, role: &[u8], transcript: &Transcript) -> Mac256 {
        self.mac(role, transcript).finalize().into_bytes().into()
    }

    fn verdict_proof(&self, verdict: u32, transcript: &Transcript) -> Mac256 {
        let mut mac = self.mac(b"verdict", transcript);
        mac.update(&verdict.to_le_bytes());
        mac.finalize().into_bytes().into()
    }
}

/// The rank's whole hello, which names version, rank, world and job and has its nonce, and the hub's nonce.
#[derive(Clone)]
struct Transcript {
    hello: [u8; HELLO_LEN],
    nonce: [u8; 32],
}

/// The hub's answer to an authenticated rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    Welcome = 0,
    OtherWorldSize = 1,
    OtherJob = 2,
    RankOutOfRange = 3,
    RankTaken = 4,
}

impl Verdict {
    const ALL: [Self; 5] =
        [Self::Welcome, Self::OtherWorldSize, Self::OtherJob, Self::RankOutOfRange, Self::RankTaken];

    pub(super) const fn reason(self) -> &'static str {
        match self {
            Self::Welcome => "welcome",
            Self::OtherWorldSize => "rank 0 was started with another world size",
            Self::OtherJob => "rank 0 belongs to a job with another id",
            Self::RankOutOfRange => "this rank is not below the world size",
            Self::RankTaken => "another process already is this rank",
        }
    }
}

/// A hello, as the hub reads it.
struct Hello {
    rank: u32,
    size: u32,
    job_hash: [u8; 32],
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    if let Some(source) = bytes.get(at..at + N) {
        field.copy_from_slice(source);
    }
    field
}

fn starts_right(frame: &[u8]) -> std::result::Result<(), String> {
    if field::<8>(frame, 0) != MAGIC {
        return Err("it does not speak the rendezvous protocol".into());
    }
    match u32::from_le_bytes(field(frame, 8)) {
        VERSION => Ok(()),
        other => Err(format!(
            "it speaks version {other} of the rendezvous protocol, this process version {VERSION}"
        )),
    }
}

/// A rank's side of a handshake.
pub(super) struct RankSide<'a> {
    identity: &'a Identity,
    transcript: Transcript,
}

impl<'a> RankSide<'a> {
    /// Begins; [`hello`](Self::hello) is to be sent.
    pub(super) fn new(identity: &'a Identity, rank: usize) -> Result<Self> {
        let mut hello = [0; HELLO_LEN];
        hello[..8].copy_from_slice(&MAGIC);
        hello[8..12].copy_from_slice(&VERSION.to_le_bytes());
        // A rank or size that does not fit becomes one that no hub accepts.
        hello[12..16].copy_from_slice(&u32::try_from(rank).unwrap_or(u32::MAX).to_le_bytes());
        hello[16..20].copy_from_slice(&u32::try_from(identity.size).unwrap_or(u32::MAX).to_le_bytes());
        hello[20..52].copy_from_slice(&identity.job_hash());
        fill_random(&mut hello[52..])?;
        Ok(Self { identity, transcript: Transcript { hello, nonce: [0; 32] } })
    }

    pub(super) const fn hello(&self) -> &[u8; HELLO_LEN] {
        &self.transcript.hello
    }

    /// Checks the hub's challenge and gives the proof to send, or says why this is not the job's hub.
    pub(super) fn prove(
        &mut self,
        challenge: &[u8; CHALLENGE_LEN],
    ) -> std::result::Result<[u8; PROOF_LEN], String> {
        starts_right(challenge)?;
        self.transcript.nonce = field(challenge, 12);
        let expected = self.identity.proof(b"hub", &self.transcript);
        if !bool::from(expected.ct_eq(&field::<32>(challenge, 44))) {
            return Err("it does not know this job's token".into());
        }
        Ok(self.identity.proof(b"rank", &self.transcript))
    }

    /// Reads the hub's verdict.
    pub(super) fn verdict(&self, frame: &[u8; VERDICT_LEN]) -> std::result::Result<(), String> {
        let code = u32::from_le_bytes(field(frame, 0));
        let expected = self.identity.verdict_proof(code, &self.transcript);
        if !bool::from(expected.ct_eq(&field::<32>(frame, 4))) {
            return Err("its verdict is not authentic".into());
        }
        match Verdict::ALL.into_iter().find(|verdict| *verdict as u32 == code) {
            Some(Verdict::Welcome) => Ok(()),
            Some(refusal) => Err(refusal.reason().into()),
            None => Err(format!("its verdict {code} is unknown")),
        }
    }
}

/// The hub's side of a handshake: a fixed buffer and what is expected in it.
pub(super) struct HubSide {
    buffer: [u8; HELLO_LEN],
    filled: usize,
    transcript: Option<Transcript>,
}

/// What the hub is to do after a step.
pub(super) enum Step {
    /// Wait for more bytes.
    More,
    /// Send this and wait for more bytes.
    Challenge([u8; CHALLENGE_LEN]),
    /// The peer knows the token. It claims this rank unless the verdict is a refusal, which is to be sent.
    Authentic { rank: usize, verdict: Verdict },
}

impl HubSide {
    pub(super) const fn new() -> Self {
        Self { buffer: [0; HELLO_LEN], filled: 0, transcript: None }
    }

    /// The free part of the buffer: exactly what the next frame still lacks.
    pub(super) fn space(&mut self) -> &mut [u8] {
        let expected = if self.transcript.is_some() { PROOF_LEN } else { HELLO_LEN };
        &mut self.buffer[self.filled..expected]
    }

    /// `count` bytes were put into [`space`](Self::space).
    pub(super) fn advance(&mut self, count: usize, identity: &Identity) -> std::result::Result<Step, String> {
        self.filled += count;
        if !self.space().is_empty() {
            return Ok(Step::More);
        }
        self.filled = 0;
        match &self.transcript {
            None => {
                starts_right(&self.buffer)?;
                let mut transcript = Transcript { hello: self.buffer, nonce: [0; 32] };
                fill_random(&mut transcript.nonce).map_err(|error| error.to_string())?;
                let mut challenge = [0; CHALLENGE_LEN];
                challenge[..8].copy_from_slice(&MAGIC);
                challenge[8..12].copy_from_slice(&VERSION.to_le_bytes());
                challenge[12..44].copy_from_slice(&transcript.nonce);
                challenge[44..].copy_from_slice(&identity.proof(b"hub", &transcript));
                self.transcript = Some(transcript);
                Ok(Step::Challenge(challenge))
            }
            Some(transcript) => {
                let expected = identity.proof(b"rank", transcript);
                if !bool::from(expected.ct_eq(&self.buffer[..PROOF_LEN])) {
                    return Err("it does not know this job's token".into());
                }
                let hello = Hello {
                    rank: u32::from_le_bytes(field(&transcript.hello, 12)),
                    size: u32::from_le_bytes(field(&transcript.hello, 16)),
                    job_hash: field(&transcript.hello, 20),
                };
                let rank = hello.rank as usize;
                let verdict = if hello.job_hash != identity.job_hash() {
                    Verdict::OtherJob
                } else if hello.size as usize != identity.size {
                    Verdict::OtherWorldSize
                } else if rank >= identity.size {
                    Verdict::RankOutOfRange
                } else {
                    Verdict::Welcome
                };
                Ok(Step::Authentic { rank, verdict })
            }
        }
    }

    /// The frame that tells the peer the verdict.
    pub(super) fn verdict(&self, verdict: Verdict, identity: &Identity) -> Option<[u8; VERDICT_LEN]> {
        let transcript = self.transcript.as_ref()?;
        let mut frame = [0; VERDICT_LEN];
        frame[..4].copy_from_slice(&(verdict as u32).to_le_bytes());
        frame[4..].copy_from_slice(&identity.verdict_proof(verdict as u32, transcript));
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn identity(token: u8, size: usize, job: &str) -> Identity {
        Identity { token: Token::from_bytes([token; 32]), size, job: job.into() }
    }

    fn feed(hub: &mut HubSide, bytes: &[u8], identity: &Identity) -> std::result::Result<Step, String> {
        hub.space().copy_from_slice(bytes);
        hub.advance(bytes.len(), identity)
    }

    /// Runs a handshake; the error is the one the rank's side reports, or else the hub's.
    fn shake(rank_id: &Identity, rank: usize, hub_id: &Identity) -> std::result::Result<usize, String> {
        let mut rank_side = RankSide::new(rank_id, rank).unwrap();
        let mut hub = HubSide::new();
        let Step::Challenge(challenge) = feed(&mut hub, rank_side.hello(), hub_id)? else {
            return Err("no challenge".into());
        };
        let proof = rank_side.prove(&challenge)?;
        let Step::Authentic { rank, verdict } = feed(&mut hub, &proof, hub_id)? else {
            return Err("no verdict".into());
        };
        rank_side.verdict(&hub.verdict(verdict, hub_id).unwrap())?;
        Ok(rank)
    }

    #[test]
    fn only_a_rank_of_the_same_job_is_welcome() {
        let hub = identity(1, 4, "a");
        assert_eq!(shake(&identity(1, 4, "a"), 3, &hub), Ok(3));
        for (rank_id, rank, part) in [
            (identity(2, 4, "a"), 1, "token"),
            (identity(1, 4, "b"), 1, "job"),
            (identity(1, 5, "a"), 1, "world size"),
            (identity(1, 4, "a"), 4, "below"),
        ] {
            let reason = shake(&rank_id, rank, &hub).unwrap_err();
            assert!(reason.contains(part), "{reason}");
        }
    }

    #[test]
    fn the_hub_refuses_a_proof_made_without_the_token_or_for_another_nonce() {
        let hub_id = identity(1, 4, "a");
        let mut rank_side = RankSide::new(&hub_id, 1).unwrap();
        let mut proofs = Vec::new();
        for _ in 0..2 {
            let mut hub = HubSide::new();
            let Ok(Step::Challenge(challenge)) = feed(&mut hub, rank_side.hello(), &hub_id) else { panic!() };
            // The hub's own proof sent back is no proof of a rank.
            let reflected: [u8; 32] = field(&challenge, 44);
            proofs.push(rank_side.prove(&challenge).unwrap());
            assert!(feed(&mut hub, &reflected, &hub_id).is_err());
        }
        let mut hub = HubSide::new();
        let Ok(Step::Challenge(_)) = feed(&mut hub, rank_side.hello(), &hub_id) else { panic!() };
        assert!(feed(&mut hub, &proofs[0], &hub_id).is_err(), "a replayed proof was accepted");
    }

    proptest! {
        #[test]
        fn garbage_is_refused_and_never_panics(bytes in prop::collection::vec(any::<u8>(), HELLO_LEN)) {
            let id = identity(1, 4, "a");
            prop_assert!(feed(&mut HubSide::new(), &bytes, &id).is_err());
            let mut rank_side = RankSide::new(&id, 1).unwrap();
            prop_assert!(rank_side.prove(&field(&bytes, 0)).is_err());
            prop_assert!(rank_side.verdict(&field(&bytes, 0)).is_err());
        }
    }
}
