//! Ending daemons, and removing what they leave: our own at the end, and those of dindpools that were killed.
//!
//! Whether something of a daemon is alive is told by a lock that keeper and init hold; whether a pool has an
//! owner, by a lock that its dindpool holds. The kernel drops locks of the dead, so nothing is guessed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use super::network;
use super::plan;
use super::state::{self, Held, Lock, Registration, State};

/// The lock of a pool's owner, in the pool's run directory.
pub(super) const OWNER_LOCK: &str = "owner.lock";
/// The files of ours beside the daemons' directories in the data directory.
pub(super) const DATA_LOCK: &str = "dindpool.lock";
/// The file with the pool's id, which stays the same for the same data.
pub(super) const DATA_ID: &str = "dindpool.id";

/// How long the kernel may take to end what was killed: a process in the middle of a disk write ends after it.
const KILL_PATIENCE: Duration = Duration::from_secs(20);

/// Ends the daemon whose run directory this is, if anything of it is alive, and waits until nothing is.
///
/// # Errors
/// A sentence, when something survives SIGKILL.
pub(super) async fn end(run: &Path, grace: Duration) -> Result<(), String> {
    let path = run.join(state::KEEPER_LOCK);
    let Some(holder) = state::holder(&path) else { return Ok(()) };
    if grace > Duration::ZERO {
        if let Some(keeper) = state::holding_process(&path) {
            keeper.signal(libc::SIGTERM);
        }
        // The keeper kills when the grace is over; a little more, for a keeper that is stopped itself.
        if free(&path, grace + Duration::from_secs(3)).await {
            return Ok(());
        }
    }
    // The keeper's death kills init. An init whose keeper is dead already is on its way.
    let state: Option<State> = state::read(&state::state_file(run));
    let heads = state.iter().flat_map(State::heads).cloned().chain(state::holding_process(&path));
    heads.for_each(|process| process.signal(libc::SIGKILL));
    if free(&path, KILL_PATIENCE).await {
        return Ok(());
    }
    Err(format!("process {holder} cannot be killed ({} is still locked)", path.display()))
}

async fn free(path: &Path, patience: Duration) -> bool {
    let end = Instant::now() + patience;
    while state::holder(path).is_some() {
        if Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    true
}

/// Ends a daemon and removes what is outside its namespaces: cable, rules, cgroups. Its directories stay.
///
/// # Errors
/// As [`end`].
pub(super) async fn daemon(
    run: &Path,
    pool: &str,
    id: &str,
    veth: &str,
    grace: Duration,
) -> Result<(), String> {
    end(run, grace).await?;
    let veth = veth.to_string();
    blocking(move || network::disconnect(&veth)).await;
    remove_cgroups(&plan::cgroup(pool, id)).await;
    Ok(())
}

/// Removes the cgroups of a daemon's containers under every controller. One whose last process has just been
/// killed is busy for a moment.
async fn remove_cgroups(path: &str) {
    let end = Instant::now() + Duration::from_secs(5);
    for root in cgroup_roots() {
        let top = root.join(path);
        while !remove_cgroup_tree(&top) && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // The pool's and dindpool's own go with the last that uses them.
        for parent in top.ancestors().skip(1).take(2) {
            let _ = fs::remove_dir(parent);
        }
    }
}

/// Where cgroups are: the root of version 2, and each controller of version 1.
fn cgroup_roots() -> Vec<PathBuf> {
    let root = PathBuf::from("/sys/fs/cgroup");
    let below = fs::read_dir(&root).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut roots: Vec<PathBuf> = below.filter(|path| path.join("dindpool").is_dir()).collect();
    if root.join("dindpool").is_dir() {
        roots.push(root);
    }
    roots
}

/// Whether it is gone.
fn remove_cgroup_tree(dir: &Path) -> bool {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup_tree(&entry.path());
        }
    }
    fs::remove_dir(dir).is_ok() || !dir.exists()
}

/// Looks after pools whose owner was killed: those with temporary data are ended and removed, and so are those
/// whose data is gone, because nobody can come back for them. Of the others only dead daemons' cables and rules
/// are removed: living ones wait for a dindpool on the same data, and dead ones' data is the user's. The caller holds the register's lock.
pub(super) async fn reap(run_dir: &Path, own: &str) {
    for pool in state::registrations(run_dir).into_iter().filter(|pool| pool.pool != own) {
        let run = run_dir.join(&pool.pool);
        let _owner = match Lock::try_take(&run.join(OWNER_LOCK)) {
            Ok(lock) => lock,
            Err(Held::By(_)) => continue,
            Err(Held::Fault(_)) if run.exists() => continue,
            // The register knows it, but it never came to anything.
            Err(Held::Fault(_)) => {
                forget(run_dir, &pool).await;
                continue;
            }
        };
        let alive = pool
            .daemons
            .iter()
            .any(|(id, _)| state::holder(&run.join(id).join(state::KEEPER_LOCK)).is_some());
        let id = fs::read_to_string(pool.data.join(DATA_ID)).unwrap_or_default();
        if alive && !pool.remove_data && id.trim() == pool.pool {
            continue;
        }
        tracing::info!(pool = pool.pool, data = %pool.data.display(), "removing what a killed dindpool left");
        let mut gone = true;
        for (id, link) in &pool.daemons {
            let end = daemon(&run.join(id), &pool.pool, id, &link.veth, Duration::ZERO).await;
            gone &= end.inspect_err(|fault| tracing::warn!("{id}: {fault}")).is_ok();
        }
        if gone {
            forget(run_dir, &pool).await;
        }
    }
}

/// The name that a daemon's directory has while it is being removed: a start that finds half of it would be worse than
/// one that finds nothing.
pub(super) const GOING: &str = "going";

/// Removes a daemon's data for good.
///
/// # Errors
/// What the file system says. The next dindpool on the same data tries again.
pub(super) fn remove_data(data: &Path) -> Result<(), String> {
    let going = data.with_extension(GOING);
    let fault = |error: std::io::Error| format!("{} cannot be removed: {error}", data.display());
    if going.exists() {
        fs::remove_dir_all(&going).map_err(fault)?;
    }
    fs::rename(data, &going).map_err(fault)?;
    fs::remove_dir_all(&going).map_err(fault)
}

/// Removes what was being removed when a dindpool was killed.
pub(super) fn finish_removals(data: &Path) {
    for entry in fs::read_dir(data).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == GOING)
            && let Err(error) = fs::remove_dir_all(&path)
        {
            tracing::warn!("{} cannot be removed: {error}", path.display());
        }
    }
}

/// Removes a pool's run directory and registration, and its data if that is temporary: of that directory only
/// what is ours, so that a careless `--data /home` costs nobody's home.
pub(super) async fn forget(run_dir: &Path, pool: &Registration) {
    let (run_dir, pool) = (run_dir.to_path_buf(), pool.clone());
    blocking(move || {
        if pool.remove_data {
            for (id, _) in &pool.daemons {
                let _ = fs::remove_dir_all(pool.data.join(id));
                let _ = fs::remove_dir_all(pool.data.join(id).with_extension(GOING));
            }
            for file in [DATA_ID, DATA_LOCK] {
                let _ = fs::remove_file(pool.data.join(file));
            }
            let _ = fs::remove_dir(&pool.data);
        }
        let _ = fs::remove_dir_all(run_dir.join(&pool.pool));
        let _ = fs::remove_file(state::registration_file(&run_dir, &pool.pool));
    })
    .await;
}

/// Runs what blocks for milliseconds (programs of the machine, many files) beside the runtime's threads.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lock_that_nobody_holds_means_that_nothing_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        end(dir.path(), Duration::from_secs(100)).await.unwrap();
        fs::write(dir.path().join(state::KEEPER_LOCK), "1\n").unwrap();
        end(dir.path(), Duration::from_secs(100)).await.unwrap(); // process 1 has not got it
    }

    #[test]
    fn what_was_half_removed_is_removed_by_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let (one, half) = (dir.path().join("dind-1"), dir.path().join("dind-2.going"));
        fs::create_dir_all(one.join("root")).unwrap();
        fs::create_dir_all(half.join("root")).unwrap();
        remove_data(&one).unwrap();
        assert!(!one.exists() && half.exists());
        fs::create_dir_all(dir.path().join("dind-3")).unwrap();
        finish_removals(dir.path());
        assert!(!half.exists() && dir.path().join("dind-3").exists());
    }

    #[tokio::test]
    async fn temporary_data_is_removed_but_not_what_somebody_else_put_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let (data, run) = (dir.path().join("data"), dir.path().join("run"));
        for made in [data.join("dind-0/root"), run.join("aa")] {
            fs::create_dir_all(made).unwrap();
        }
        fs::write(data.join("thesis"), "").unwrap();
        let link = plan::Link {
            veth: "dpaa-0".into(),
            subnet: crate::provision::process::address::NETWORKS[0],
            mtu: 1500,
        };
        let daemons = vec![("dind-0".to_string(), link)];
        let mut pool = Registration { pool: "aa".into(), data: data.clone(), remove_data: false, daemons };
        forget(&run, &pool).await;
        assert!(!run.join("aa").exists() && data.join("dind-0").exists(), "the user's data stays");
        pool.remove_data = true;
        forget(&run, &pool).await;
        assert!(data.join("thesis").exists() && !data.join("dind-0").exists());
    }
}
