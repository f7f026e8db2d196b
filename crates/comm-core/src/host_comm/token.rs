//! The secret that the ranks of a job share.

use std::fmt;
use std::io::{Read, Write};
use std::path::Path;
use std::str::FromStr;

use rustix::fs::{Mode, OFlags};
use subtle::ConstantTimeEq;

use crate::error::{CommError, Result};

/// A 32-byte secret by which the ranks of a job prove to each other that they belong to it.
///
/// It travels in a file of mode 0600, an environment variable or an inherited descriptor; never in a command line,
/// which any user of the machine can read. Its `Debug` output does not show it.
#[derive(Clone)]
pub struct Token([u8; 32]);

impl Token {
    /// A fresh token from the system's random generator.
    ///
    /// # Errors
    /// [`CommError::Io`] when the system has none.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 32];
        fill_random(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// A token from its bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// A token from 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`], which does not repeat the digits.
    pub fn from_hex(digits: &str) -> Result<Self> {
        let wrong = || CommError::invalid("token", "a token is 64 hexadecimal digits");
        let digits = digits.trim().as_bytes();
        if digits.len() != 64 {
            return Err(wrong());
        }
        let digit = |c: u8| char::from(c).to_digit(16).map(|d| d as u8).ok_or_else(wrong);
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(Self(bytes))
    }

    /// Reads a token from a file: 64 hexadecimal digits, white space around them ignored.
    ///
    /// # Errors
    /// [`CommError::InvalidArgument`] when the file does not belong to this user, when anyone else may read or write
    /// it, or when it holds something else; [`CommError::Io`] when it cannot be read.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_hex(&read_private(path.as_ref())?)
    }

    /// Writes the token to a new file that only this user can read (mode 0600).
    ///
    /// # Errors
    /// [`CommError::Io`] when the file exists or cannot be written.
    pub fn to_file_0600(&self, path: impl AsRef<Path>) -> Result<()> {
        write_private(path.as_ref(), &format!("{}\n", hex(&self.0)))
    }

    /// The token as 64 hexadecimal digits, to hand it on in an environment variable.
    #[must_use]
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }

    pub(super) const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Token {}

impl FromStr for Token {
    type Err = CommError;

    fn from_str(digits: &str) -> Result<Self> {
        Self::from_hex(digits)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

pub(super) fn fill_random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|error| CommError::Io {
        context: "asking the system for random bytes".into(),
        message: error.to_string(),
    })
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads a short text file that must be this user's and closed to all others.
pub(super) fn read_private(path: &Path) -> Result<String> {
    let io =
        |error: std::io::Error| CommError::io(format!("reading the token file {}", path.display()), &error);
    // Not following links and looking at the open file itself leaves no moment in which it could be exchanged.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| io(e.into()))?;
    let stat = rustix::fs::fstat(&file).map_err(|e| io(e.into()))?;
    let refuse =
        |reason: String| Err(CommError::invalid("token file", format!("{}: {reason}", path.display())));
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return refuse(format!("it belongs to user {}, not to this process's user", stat.st_uid));
    }
    if stat.st_mode & 0o077 != 0 {
        return refuse(format!("its mode {:o} lets others in; chmod 600 it", stat.st_mode & 0o777));
    }
    let mut text = String::new();
    std::fs::File::from(file).take(1024).read_to_string(&mut text).map_err(io)?;
    Ok(text)
}

/// Writes a new file of mode 0600.
pub(super) fn write_private(path: &Path, text: &str) -> Result<()> {
    let io =
        |error: std::io::Error| CommError::io(format!("writing the token file {}", path.display()), &error);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|e| io(e.into()))?;
    std::fs::File::from(file).write_all(text.as_bytes()).map_err(io)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_open_to_others_and_wrong_contents_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let token = Token::random().unwrap();
        token.to_file_0600(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Token::from_file(&path).unwrap(), token);
        assert!(
            matches!(token.to_file_0600(&path), Err(CommError::Io { .. })),
            "a second write replaced the file"
        );
        for mode in [0o640, 0o604, 0o620] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            let message = Token::from_file(&path).unwrap_err().to_string();
            assert!(message.contains("chmod 600"), "{message}");
        }
        let link = dir.path().join("link");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Token::from_file(&link).is_err(), "a symbolic link was followed");
    }

    #[test]
    fn no_output_shows_the_secret() {
        let token = Token::from_bytes([0xab; 32]);
        assert!(!format!("{token:?}").contains("ab"));
        let wrong = format!("{}zz", "ab".repeat(31));
        assert!(!Token::from_hex(&wrong).unwrap_err().to_string().contains("abab"));
        assert_eq!(Token::from_hex(&token.to_hex()).unwrap(), token);
    }
}
