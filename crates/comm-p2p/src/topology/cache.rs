//! The verdict of the peer-to-peer check, kept on disk: the check is about this driver and these devices.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

/// Whether to check, from `COMM_P2P_CHECK`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Policy {
    /// Unless an earlier check of the same devices passed.
    Cached,
    /// In any case.
    Force,
    /// Not at all.
    Skip,
}

impl Policy {
    /// `skip`, `force`, or unset.
    pub(crate) fn from_name(name: Option<&str>) -> Result<Self, String> {
        match name {
            None | Some("") => Ok(Self::Cached),
            Some("force") => Ok(Self::Force),
            Some("skip") => Ok(Self::Skip),
            Some(other) => Err(format!("COMM_P2P_CHECK = {other:?}; known are skip and force")),
        }
    }
}

/// The file of a verdict. The key is its content, so that a collision of names or a damaged file is no verdict.
#[derive(Clone, Debug)]
pub(crate) struct Verdict {
    path: Option<PathBuf>,
    key: String,
}

impl Verdict {
    /// Of the devices `uuids` under `driver`, in the user's cache folder.
    pub(crate) fn new(driver: &str, uuids: &[String]) -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
        Self::in_folder(folder, driver, uuids)
    }

    fn in_folder(folder: Option<PathBuf>, driver: &str, uuids: &[String]) -> Self {
        let mut sorted = uuids.to_vec();
        sorted.sort();
        let key = format!("peer-to-peer verified\ndriver {driver}\n{}\n", sorted.join("\n"));
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let name = format!("p2p-{:016x}", hasher.finish());
        Self { path: folder.map(|folder| folder.join("comm-p2p").join(name)), key }
    }

    /// Whether a check has passed before.
    pub(crate) fn has_passed(&self) -> bool {
        self.path.as_ref().is_some_and(|path| fs::read_to_string(path).is_ok_and(|text| text == self.key))
    }

    /// Remembers that it passed. That it cannot is no failure: the next communicator checks again.
    pub(crate) fn remember(&self) {
        let Some(path) = &self.path else { return };
        let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| {
            let temporary = path.with_extension(std::process::id().to_string());
            fs::write(&temporary, &self.key)?;
            fs::rename(&temporary, path)
        });
        if let Err(error) = written {
            tracing::debug!(path = %path.display(), %error, "the peer-to-peer verdict is not kept");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_holds_for_its_driver_and_devices_only() {
        let folder = tempfile::tempdir().unwrap();
        let at = Some(folder.path().to_path_buf());
        let (a, b) = ("a".to_owned(), "b".to_owned());
        let verdict = Verdict::in_folder(at.clone(), "580.1", &[a.clone(), b.clone()]);
        assert!(!verdict.has_passed());
        verdict.remember();
        assert!(verdict.has_passed());
        assert!(Verdict::in_folder(at.clone(), "580.1", &[b.clone(), a.clone()]).has_passed());
        assert!(!Verdict::in_folder(at.clone(), "580.2", &[a.clone(), b]).has_passed());
        assert!(!Verdict::in_folder(at, "580.1", &[a]).has_passed());
        let path = verdict.path.clone().unwrap();
        fs::write(path, "damaged").unwrap();
        assert!(!verdict.has_passed());
        let nowhere = Verdict::in_folder(None, "580.1", &[]);
        nowhere.remember();
        assert!(!nowhere.has_passed());
    }

    #[test]
    fn policies_have_names() {
        assert_eq!(Policy::from_name(None), Ok(Policy::Cached));
        assert_eq!(Policy::from_name(Some("force")), Ok(Policy::Force));
        assert!(Policy::from_name(Some("maybe")).is_err());
    }
}
