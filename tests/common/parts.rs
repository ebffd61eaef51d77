//! Where the real parts are: dockerd, clients and registry of known versions, installed by `tests/parts`.

use std::path::{Path, PathBuf};

/// The folder with the parts.
pub fn dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("DINDPOOL_PARTS") {
        return dir.into();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    cache.unwrap_or_else(|| "/var/cache".into()).join("dindpool/parts")
}

/// One part by its path below the folder, or what to do about its absence.
pub fn part(path: &str) -> Result<PathBuf, String> {
    let full = dir().join(path);
    if full.exists() {
        Ok(full)
    } else {
        Err(format!("{} is missing (tests/parts/install brings it)", full.display()))
    }
}

/// All of these parts, or the first that is missing.
pub fn all(paths: &[&str]) -> Result<(), String> {
    super::root()?;
    paths.iter().try_for_each(|path| part(path).map(|_| ()))
}

/// The dockerd of a version.
pub fn dockerd(version: &str) -> Result<PathBuf, String> {
    super::root()?;
    part(&format!("docker-{version}/bin/dockerd"))
}

/// The static busybox, and the root file system that is made of it.
pub fn busybox(file: &str) -> PathBuf {
    dir().join("busybox").join(file)
}
