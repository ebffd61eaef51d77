//! What a daemon sees of the machine: its mount namespace, and its host name.
//!
//! Everything here runs in the new namespaces. No mount made here, or later by the daemon, reaches the
//! machine, and all of them go with the namespace, so there is nothing to unmount afterwards.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use super::plan::Launch;

/// Paths at which daemons of one machine would meet, and the directory that each sees there instead:
/// - `/etc/docker`: 20.10 keeps its identity in `key.json` there, whatever its data root, so that two daemons
///   would be one; and every version reads the machine's `daemon.json` there.
/// - `/run/containerd`: where dockerd finds a `containerd.sock` it uses that containerd, with all others, in
///   the namespace `moby`. Where it finds none it starts its own. The shims' sockets are there too. (Separate
///   names, `--containerd-namespace`, would keep the containers apart, but with a containerd that neither is
///   of the daemon's version nor ends with it.)
/// - `/run/docker`: the default exec root, and the sockets of plugins.
pub(super) const PRIVATE: [&str; 3] = ["/etc/docker", "/run/containerd", "/run/docker"];

/// Certificates of registries belong to the machine, and are used by all.
const CERTS: &str = "/etc/docker/certs.d";

/// The directories behind [`PRIVATE`].
pub(super) fn private_dirs(launch: &Launch) -> [std::path::PathBuf; 3] {
    [launch.data.join("etc-docker"), launch.run.join("containerd"), launch.run.join("exec")]
}

/// Makes the view. The caller has unshared the mount and UTS namespaces.
pub(super) fn enter(launch: &Launch) -> Result<(), String> {
    // `docker info` tells which daemon answered, as it would from a pod.
    nix::unistd::sethostname(&launch.id).map_err(|errno| format!("sethostname: {errno}"))?;

    // Slave: what the machine mounts and unmounts later is seen here, so nothing there stays busy because of
    // us. Then shared: `-v /x:/x:rshared` asks for that, and a mount then spreads to this namespace only.
    for flags in [MsFlags::MS_SLAVE, MsFlags::MS_SHARED] {
        let flags = flags | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
            .map_err(|errno| format!("cannot set the propagation of mounts: {errno}"))?;
    }

    // The numbers in /proc must be those of our PID namespace, or dockerd looks for its children among
    // strangers.
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>)
        .map_err(|errno| format!("cannot mount /proc: {errno}"))?;

    let dirs = private_dirs(launch);
    if Path::new(CERTS).is_dir() {
        let inside = dirs[0].join("certs.d");
        create(&inside)?;
        bind(Path::new(CERTS), &inside)?;
    }
    for (place, dir) in PRIVATE.iter().zip(&dirs) {
        create(Path::new(place))?;
        bind(dir, Path::new(place))?;
    }
    if let Some(resolv) = &launch.resolv {
        bind(resolv, Path::new("/etc/resolv.conf"))?;
    }
    Ok(())
}

/// Creates what a dockerd start needs. All that is in the exec root and beside it belongs to processes that
/// are dead by now, and would mislead the next dockerd: their numbers, in its pidfiles, are others' today.
pub(super) fn prepare_directories(launch: &Launch) -> io::Result<()> {
    let [etc, containerd, exec] = private_dirs(launch);
    for stale in [&containerd, &exec] {
        match fs::remove_dir_all(stale) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => fs::create_dir_all(stale)?,
        }
    }
    for stale in [launch.socket(), launch.run.join("docker.pid"), super::state::state_file(&launch.run)] {
        match fs::remove_file(&stale) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::create_dir_all(etc)?;
    fs::create_dir_all(launch.data.join("root"))?;
    fs::write(launch.run.join("daemon.json"), "{}\n")
}

fn create(dir: &Path) -> Result<(), String> {
    fs::create_dir_all(dir).map_err(|error| format!("cannot create {}: {error}", dir.display()))
}

fn bind(from: &Path, to: &Path) -> Result<(), String> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(|errno| format!("cannot show {} at {}: {errno}", from.display(), to.display()))
}
