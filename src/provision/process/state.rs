//! Files by which a dindpool finds what an earlier one left: who holds a directory, which processes belong to
//! a daemon, which names a pool has given away.
//!
//! A process is never known by its number alone: numbers are reused. Its start time (in ticks since boot) and
//! the boot's id go with it, and a signal is sent through a pidfd that was opened before these were compared,
//! so the number cannot change hands in between.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::address::Subnet;
use super::plan::Link;

/// A process, beyond the reuse of its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub started: u64,
}

impl Process {
    /// The process that has this number now, unless it is dead already.
    pub fn of(pid: i32) -> Option<Process> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Some(Process { pid, started: start_time(&stat)? })
    }

    /// Whether it still runs.
    pub fn alive(&self) -> bool {
        Process::of(self.pid).as_ref() == Some(self)
    }

    /// A handle on it, if it still runs.
    fn pidfd(&self) -> Option<io::Result<OwnedFd>> {
        // SAFETY: a system call without pointers; its result is checked.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        let fd = match i32::try_from(fd) {
            // SAFETY: the kernel has just given us this descriptor.
            Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        };
        self.alive().then_some(fd)
    }

    /// Sends a signal, unless the process is gone.
    pub fn signal(&self, signal: i32) {
        match self.pidfd() {
            None => {}
            Some(Ok(fd)) => {
                // SAFETY: a null siginfo means the default one; the descriptor is ours.
                unsafe {
                    libc::syscall(
                        libc::SYS_pidfd_send_signal,
                        fd.as_raw_fd(),
                        signal,
                        std::ptr::null::<libc::siginfo_t>(),
                        0,
                    );
                }
            }
            // A kernel before 5.3: checked a moment ago, which must do.
            // SAFETY: a system call without pointers.
            Some(Err(_)) => unsafe {
                libc::kill(self.pid, signal);
            },
        }
    }

    /// Completes when the process is dead.
    pub async fn dead(&self) {
        let fd = match self.pidfd() {
            None => return,
            // SAFETY: an OwnedFd is always the same descriptor, and open until the AsyncFd that has it ends.
            Some(fd) => fd.and_then(|fd| Ok(unsafe { tokio::io::unix::AsyncFd::register(fd) }?)),
        };
        if let Ok(fd) = fd {
            let _ = fd.readable().await;
            return;
        }
        while self.alive() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Field 22 of /proc/PID/stat, unless the process is dead. The second field is the command in brackets, which
/// may itself contain blanks and brackets.
fn start_time(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// This boot: start times of another one mean nothing.
pub(super) fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_string()
}

/// The processes of a running daemon, as they are numbered outside its PID namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// The boot in which they run.
    pub boot: String,
    /// Our process beside it: its end is the daemon's.
    pub keeper: Process,
    /// Our process at the head of its PID namespace: its end is that of everything inside.
    pub init: Process,
    /// dockerd.
    pub dockerd: Process,
}

impl State {
    /// Whether the daemon runs.
    pub fn alive(&self) -> bool {
        self.boot == boot() && self.keeper.alive() && self.init.alive()
    }

    /// The two processes whose end is that of all others, if they can still be those.
    pub fn heads(&self) -> Vec<&Process> {
        if self.boot == boot() { vec![&self.keeper, &self.init] } else { Vec::new() }
    }
}

/// A pool's entry in the register of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registration {
    /// The pool's id.
    pub pool: String,
    /// Its data.
    pub data: PathBuf,
    /// Whether the data is temporary: nobody will come back for it.
    pub remove_data: bool,
    /// The daemons that it has or may have, by name.
    pub daemons: Vec<(String, Link)>,
}

impl Registration {
    /// The addresses that it has given away.
    pub fn subnets(&self) -> impl Iterator<Item = Subnet> + '_ {
        self.daemons.iter().map(|(_, link)| link.subnet)
    }
}

/// The file in a daemon's run directory that is locked while anything of it is alive.
pub(super) const KEEPER_LOCK: &str = "keeper.lock";

/// The file with what a daemon was started as, a [`super::plan::Launch`].
pub(super) fn launch_file(run: &Path) -> PathBuf {
    run.join("launch.json")
}

/// The file with a running daemon's [`State`].
pub(super) fn state_file(run: &Path) -> PathBuf {
    run.join("state.json")
}

/// The file with a pool's [`Registration`].
pub(super) fn registration_file(run_dir: &Path, pool: &str) -> PathBuf {
    run_dir.join(format!("{pool}.json"))
}

/// All pools in the register.
pub(super) fn registrations(run_dir: &Path) -> Vec<Registration> {
    let Ok(entries) = fs::read_dir(run_dir) else { return Vec::new() };
    let files = entries.flatten().map(|entry| entry.path());
    files.filter(|path| path.extension().is_some_and(|ext| ext == "json")).filter_map(|p| read(&p)).collect()
}

/// What is in a file, if it is there and whole.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Replaces a file at once: whoever reads it sees the old or the new.
pub(super) fn write<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, serde_json::to_vec_pretty(value)?)?;
    fs::rename(temporary, path)
}

/// An exclusive lock on a file; it ends with its owner, however that ends.
pub(super) struct Lock(Flock<File>);

impl Lock {
    /// Takes the lock and leaves our number in the file.
    ///
    /// # Errors
    /// The number that the holder left, or the file system's fault.
    pub fn try_take(path: &Path) -> Result<Lock, Held> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                lock.set_len(0)?;
                lock.rewind()?;
                writeln!(lock, "{}", std::process::id())?;
                Ok(Lock(lock))
            }
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                Err(Held::By(holder.trim().to_string()))
            }
            Err((_, errno)) => Err(Held::Fault(errno.into())),
        }
    }

    /// Waits for the lock.
    pub async fn take(path: &Path, patience: Duration) -> Result<Lock, Held> {
        let end = tokio::time::Instant::now() + patience;
        loop {
            match Lock::try_take(path) {
                Err(Held::By(_)) if tokio::time::Instant::now() < end => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                result => return result,
            }
        }
    }
}

/// Who holds a lock: the number in its file; `None` when nobody does.
pub(super) fn holder(path: &Path) -> Option<String> {
    let file = File::open(path).ok()?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            Some(pid.trim().to_string())
        }
        Ok(_) | Err(_) => None,
    }
}

/// The holder of a lock as a process. The number in the file is believed only when that process has the file
/// open: the lock may live on in a child of whoever wrote the number, and the number in a stranger.
pub(super) fn holding_process(path: &Path) -> Option<Process> {
    use std::os::unix::fs::MetadataExt as _;
    let process = Process::of(holder(path)?.parse().ok()?)?;
    let wanted = fs::metadata(path).ok()?;
    let descriptors = fs::read_dir(format!("/proc/{}/fd", process.pid)).ok()?.flatten();
    let mut open = descriptors.filter_map(|entry| fs::metadata(entry.path()).ok());
    open.any(|file| (file.dev(), file.ino()) == (wanted.dev(), wanted.ino())).then_some(process)
}

impl Drop for Lock {
    fn drop(&mut self) {
        // The file stays: removing it would let two owners lock two files of the same name.
        let _ = self.0.set_len(0);
    }
}

/// Why a lock could not be taken.
#[derive(Debug)]
pub(super) enum Held {
    /// Another process has it.
    By(String),
    /// The file system says no.
    Fault(io::Error),
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Held::By(pid) if pid.is_empty() => f.write_str("held by another process"),
            Held::By(pid) => write!(f, "held by process {pid}"),
            Held::Fault(error) => error.fmt(f),
        }
    }
}

impl From<io::Error> for Held {
    fn from(error: io::Error) -> Held {
        Held::Fault(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_time_is_found_behind_the_strangest_command() {
        let rest = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(start_time(&format!("7 (a) b (c) S {rest}")), Some(4242));
        assert_eq!(start_time(&format!("7 (x) Z {rest}")), None, "a zombie is dead");
        assert_eq!(start_time("7 (x"), None);
    }

    #[test]
    fn a_reused_number_is_another_process() {
        let me = Process::of(std::process::id().try_into().unwrap()).unwrap();
        assert!(me.alive());
        let earlier = Process { started: me.started - 1, ..me.clone() };
        assert!(!earlier.alive());
        earlier.signal(libc::SIGKILL); // must not end this test
    }

    #[test]
    fn another_boot_leaves_nothing_alive() {
        let me = Process::of(std::process::id().try_into().unwrap()).unwrap();
        let state = State { boot: boot(), keeper: me.clone(), init: me.clone(), dockerd: me };
        assert!(state.alive());
        assert_eq!(state.heads().len(), 2);
        let other = State { boot: "another".into(), ..state };
        assert!(!other.alive());
        assert!(other.heads().is_empty());
    }

    #[tokio::test]
    async fn the_death_of_a_process_is_noticed() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::of(child.id().try_into().unwrap()).unwrap();
        process.signal(libc::SIGKILL);
        tokio::time::timeout(Duration::from_secs(10), process.dead()).await.unwrap();
        assert!(!process.alive(), "even before it is reaped");
        child.wait().unwrap();
        process.dead().await;
    }

    #[test]
    fn a_lock_has_one_holder_and_tells_who() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = Lock::try_take(&path).unwrap_or_else(|held| panic!("{held:?}"));
        let second = Lock::try_take(&path);
        assert!(matches!(second, Err(Held::By(pid)) if pid == std::process::id().to_string()));
        assert_eq!(holder(&path).unwrap(), std::process::id().to_string());
        assert_eq!(holding_process(&path).unwrap().pid, std::process::id().cast_signed());
        // A stranger that has got the number of a dead holder.
        fs::write(&path, "1\n").unwrap();
        assert_eq!(holder(&path).unwrap(), "1");
        assert_eq!(holding_process(&path), None);
        drop(first);
        assert_eq!(holder(&path), None);
        assert!(Lock::try_take(&path).is_ok());
    }

    #[test]
    fn the_register_skips_what_it_cannot_read() {
        let dir = tempfile::tempdir().unwrap();
        let one =
            Registration { pool: "a".into(), data: "/d".into(), remove_data: true, daemons: Vec::new() };
        write(&registration_file(dir.path(), "a"), &one).unwrap();
        fs::write(dir.path().join("b.json"), "{").unwrap();
        assert_eq!(registrations(dir.path()), [one]);
        assert!(registrations(&dir.path().join("absent")).is_empty());
    }
}
