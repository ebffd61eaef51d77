//! From the user's options to a pool that is decided upon and locked. Whatever speaks against it is found
//! here, all of it at once, before anything is started.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc};

use super::address::{self, Subnet};
use super::namespace::PRIVATE;
use super::plan::{self, Features, Launch, Link, Resolver};
use super::state::{self, Held, Lock, Registration};
use super::supervise::say;
use super::{Faults, Options, cleanup, network};
use crate::provision::MAX_SOCKET_PATH;

/// Where systemd-resolved names the resolvers behind its stub.
const SYSTEMD_UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";
/// So many daemons have names that fit an interface's.
const MOST_DAEMONS: usize = 1000;
/// How long another dindpool may hold the register.
const REGISTER_PATIENCE: Duration = Duration::from_secs(60);

/// A binary that was found to work.
struct Binary {
    path: PathBuf,
    shown: String,
    version: (u32, u32),
    docker_proxy: bool,
}

/// What every daemon of a pool is made from: checked and locked.
pub(super) struct Site {
    /// The pool's id.
    pub pool: String,
    /// Where the register is.
    pub run_dir: PathBuf,
    /// Whether there may be more and fewer daemons.
    pub scales: bool,
    /// Its entry in the register.
    pub registration: Mutex<Registration>,
    /// See [`Options`].
    pub ready_deadline: Duration,
    /// See [`Options`].
    pub self_exe: PathBuf,
    /// See [`Options`].
    pub progress: Option<mpsc::UnboundedSender<String>>,
    binaries: Vec<Binary>,
    extra_args: Vec<String>,
    stop_grace: Duration,
    network: Option<(Ipv4Addr, u8)>,
    mtu: u32,
    resolv: Option<PathBuf>,
    /// Held until everything is removed.
    _locks: [Lock; 2],
}

/// A site, the daemons that there are at first, and what the operator should know for as long as the pool runs.
pub(super) struct Prepared {
    pub site: Arc<Site>,
    pub first: Vec<(usize, Launch)>,
    pub problems: Vec<String>,
}

/// Checks, reaps, locks, adopts names, decides.
pub(super) async fn prepare(mut options: Options) -> Result<Prepared, Faults> {
    let mut faults = Vec::new();
    for path in [&mut options.data, &mut options.run_dir, &mut options.self_exe] {
        match std::path::absolute(&*path) {
            Ok(absolute) => *path = absolute,
            Err(error) => faults.push(format!("{}: {error}", path.display())),
        }
    }
    faults.extend(check_options(&options));
    faults.extend(check_rights(&fs::read_to_string("/proc/self/status").unwrap_or_default()));
    let wanted = options.dockerd.clone();
    let tools = cleanup::blocking(move || check_programs(&wanted)).await;
    let (binaries, missing) = tools.unwrap_or_default();
    faults.extend(missing);
    if !faults.is_empty() {
        return Err(Faults(faults));
    }

    create_private(&options.data)?;
    create_private(&options.run_dir)?;
    // Through no symbolic link, so that one place has one name: /var/run/docker is in /run/docker.
    for path in [&mut options.data, &mut options.run_dir] {
        *path = path.canonicalize().map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let hidden = check_places(&options);
    if !hidden.is_empty() {
        return Err(Faults(hidden));
    }
    let in_use = |held: Held| match held {
        Held::By(pid) => format!(
            "{} is in use by another dindpool (process {pid}): stop it, or choose another --data",
            options.data.display()
        ),
        Held::Fault(error) => format!("cannot lock {}: {error}", options.data.display()),
    };
    let data_lock = Lock::try_take(&options.data.join(cleanup::DATA_LOCK)).map_err(in_use)?;
    let data = options.data.clone();
    cleanup::blocking(move || cleanup::finish_removals(&data)).await;

    // From here to the registration no other dindpool chooses names or addresses, or reaps.
    let register_lock = lock_register(&options.run_dir).await?;
    let id = pool_id(&options)?;
    cleanup::reap(&options.run_dir, &id).await;
    let run = options.run_dir.join(&id);
    create_private(&run)?;
    let owner_lock = Lock::try_take(&run.join(cleanup::OWNER_LOCK)).map_err(in_use)?;

    let former: Option<Registration> = state::read(&state::registration_file(&options.run_dir, &id));
    let wanted = at_first(&options, &run, former.as_ref());
    let mtu = cleanup::blocking(network::uplink_mtu).await.unwrap_or(1500);
    let registration = Registration {
        pool: id.clone(),
        data: options.data.clone(),
        remove_data: options.remove_data,
        // A former cable is kept: a daemon that still runs hangs on it.
        daemons: former
            .iter()
            .flat_map(|former| former.daemons.iter())
            .filter(|(name, _)| index(name).is_some_and(|index| wanted.contains(&index)))
            .cloned()
            .collect(),
    };
    let mut problems = Vec::new();
    let conf = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let resolv = match plan::resolver(&conf, Path::new(SYSTEMD_UPSTREAM).exists()) {
        Resolver::AsIs => None,
        Resolver::Systemd => Some(PathBuf::from(SYSTEMD_UPSTREAM)),
        Resolver::LoopbackOnly => {
            problems.push(
                "/etc/resolv.conf names resolvers on loopback only, which the daemons cannot reach: they will \
                 not find any registry by name; name a resolver that the network can reach"
                    .to_string(),
            );
            None
        }
    };
    problems.iter().for_each(|problem| say(options.progress.as_ref(), problem));
    let site = Site {
        pool: id.clone(),
        run_dir: options.run_dir.clone(),
        scales: options.most.is_some(),
        registration: Mutex::new(registration),
        ready_deadline: options.ready_deadline,
        self_exe: options.self_exe.clone(),
        progress: options.progress.clone(),
        binaries,
        extra_args: options.extra_args.clone(),
        stop_grace: options.stop_grace,
        network: options.network,
        mtu,
        resolv,
        _locks: [data_lock, owner_lock],
    };
    let launches = site.register_locked(&wanted).await?;
    drop(register_lock);
    end_surplus(&options, &id, former.as_ref(), &wanted).await;
    let first = wanted.into_iter().zip(launches).collect();
    Ok(Prepared { site: Arc::new(site), first, problems })
}

/// While it is held no other dindpool chooses names or addresses, or reaps.
async fn lock_register(run_dir: &Path) -> Result<Lock, String> {
    let register = run_dir.join("register.lock");
    let taken = Lock::take(&register, REGISTER_PATIENCE).await;
    taken.map_err(|held| format!("cannot lock {}: {held}", register.display()))
}

impl Site {
    /// Gives further daemons a cable and a place.
    pub async fn register(&self, indices: &[usize]) -> Result<Vec<Launch>, String> {
        if let Some(index) = indices.iter().find(|index| **index >= MOST_DAEMONS) {
            return Err(format!("{index} daemons: {MOST_DAEMONS} is the most"));
        }
        let _lock = lock_register(&self.run_dir).await?;
        self.register_locked(indices).await
    }

    /// The same under the register's lock: a former cable, or one that touches nothing; written down before anything
    /// is made.
    async fn register_locked(&self, indices: &[usize]) -> Result<Vec<Launch>, String> {
        let mut registration = self.registration.lock().await;
        let known = |index: &&usize| registration.daemons.iter().any(|(id, _)| *id == name(**index));
        let missing: Vec<usize> = indices.iter().filter(|index| !known(index)).copied().collect();
        let mut taken = match cleanup::blocking(network::taken).await {
            Some(taken) => taken?,
            None => return Err("cannot look at the machine's networks".to_string()),
        };
        for other in state::registrations(&self.run_dir) {
            taken.extend(other.subnets());
        }
        taken.extend(registration.subnets());
        let networks: Vec<Subnet> = match self.network {
            Some((address, prefix)) => vec![Subnet::around(address, prefix)],
            None => address::NETWORKS.to_vec(),
        };
        let seed = u32::from_str_radix(&self.pool, 16).unwrap_or(0);
        let chosen = address::choose(&networks, &taken, seed, missing.len()).ok_or_else(|| {
            let tried: Vec<String> = networks.iter().map(ToString::to_string).collect();
            format!(
                "no free network for {} daemons in {}: this machine uses them; name another one",
                missing.len(),
                tried.join(", ")
            )
        })?;
        let mut new = registration.clone();
        for (index, subnet) in missing.into_iter().zip(chosen) {
            let veth = plan::veth(&self.pool, index);
            new.daemons.push((name(index), Link { veth, subnet, mtu: self.mtu }));
        }
        new.daemons.sort_by_key(|(name, _)| index(name));
        self.write(&new)?;
        *registration = new;
        let link = |index: &usize| {
            let (_, link) = registration.daemons.iter().find(|(id, _)| *id == name(*index))?;
            Some(self.launch(*index, link, &registration))
        };
        Ok(indices.iter().filter_map(link).collect())
    }

    /// A daemon is no more.
    pub async fn unregister(&self, index: usize) {
        let mut registration = self.registration.lock().await;
        registration.daemons.retain(|(id, _)| *id != name(index));
        // At worst a later dindpool looks for something that is not there.
        if let Err(fault) = self.write(&registration) {
            tracing::warn!("{fault}");
        }
    }

    fn write(&self, registration: &Registration) -> Result<(), String> {
        let file = state::registration_file(&self.run_dir, &self.pool);
        state::write(&file, registration).map_err(|error| format!("{}: {error}", file.display()))
    }

    fn launch(&self, index: usize, link: &Link, registration: &Registration) -> Launch {
        let (name, binary) = (name(index), &self.binaries[index % self.binaries.len()]);
        let (data, run) = (registration.data.join(&name), self.run_dir.join(&self.pool).join(&name));
        let features = Features { version: binary.version, docker_proxy: binary.docker_proxy, mtu: link.mtu };
        Launch {
            pool: self.pool.clone(),
            dockerd: binary.path.clone(),
            args: plan::arguments(&self.pool, &name, &data, &run, features, &self.extra_args),
            id: name,
            data,
            run,
            link: link.clone(),
            resolv: self.resolv.clone(),
            die_with_owner: registration.remove_data,
            stop_grace: self.stop_grace,
        }
    }

    /// The version of its dockerd, to show.
    pub fn version(&self, launch: &Launch) -> &str {
        let binary = self.binaries.iter().find(|binary| binary.path == launch.dockerd);
        binary.map_or("", |binary| &binary.shown)
    }
}

/// Which daemons there are at first. A fixed pool has the first so many. One that scales takes back whoever still runs,
/// and whoever has data (it was not scaled down, so something may be on it) up to its maximum; the autoscaler takes away
/// what is not needed.
fn at_first(options: &Options, run: &Path, former: Option<&Registration>) -> Vec<usize> {
    let Some(most) = options.most else { return (0..options.daemons).collect() };
    let names = former.into_iter().flat_map(|former| former.daemons.iter().map(|(name, _)| name));
    let runs = |name: &&String| state::holder(&run.join(name).join(state::KEEPER_LOCK)).is_some();
    let mut first: BTreeSet<usize> = names.filter(runs).filter_map(|name| index(name)).collect();
    let entries = fs::read_dir(&options.data).into_iter().flatten().flatten();
    let with_data = entries.filter(|entry| entry.path().join("root").is_dir());
    let with_data: BTreeSet<usize> = with_data
        .filter_map(|entry| index(entry.file_name().to_str()?))
        .filter(|i| *i < MOST_DAEMONS)
        .collect();
    for index in with_data {
        if first.len() < most {
            first.insert(index);
        }
    }
    for index in 0.. {
        if first.len() >= options.daemons {
            break;
        }
        first.insert(index);
    }
    first.into_iter().collect()
}

fn name(index: usize) -> String {
    format!("dind-{index}")
}

/// The number in a name.
fn index(name: &str) -> Option<usize> {
    let number: usize = name.strip_prefix("dind-")?.parse().ok()?;
    (self::name(number) == name).then_some(number)
}

/// Daemons of a former, larger pool on the same data.
async fn end_surplus(options: &Options, pool: &str, former: Option<&Registration>, wanted: &[usize]) {
    let former = former.into_iter().flat_map(|former| former.daemons.iter());
    for (id, link) in former.filter(|(id, _)| index(id).is_none_or(|index| !wanted.contains(&index))) {
        let run = options.run_dir.join(pool).join(id);
        let ended = cleanup::daemon(&run, pool, id, &link.veth, options.stop_grace).await;
        let text = ended.map_or_else(|fault| fault, |()| "stopped: the pool is smaller now".to_string());
        say(options.progress.as_ref(), &format!("{id}: {text}"));
    }
}

/// The id that belongs to the data, or a new one. A copied data directory brings its original's id along:
/// where the register knows that for another place, the copy gets its own.
fn pool_id(options: &Options) -> Result<String, String> {
    let file = options.data.join(cleanup::DATA_ID);
    let known = fs::read_to_string(&file).unwrap_or_default().trim().to_string();
    let well_formed = known.len() == 8 && known.bytes().all(|byte| byte.is_ascii_hexdigit());
    let registered: Option<Registration> =
        well_formed.then(|| state::read(&state::registration_file(&options.run_dir, &known))).flatten();
    if well_formed && registered.is_none_or(|entry| entry.data == options.data) {
        return Ok(known);
    }
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(|error| error.to_string())?;
    let id = uuid.get(..8).unwrap_or("00000000").to_string();
    fs::write(&file, format!("{id}\n")).map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(id)
}

/// A directory for root alone: whoever reaches a daemon's socket is root on this machine.
pub(super) fn create_private(dir: &Path) -> Result<(), String> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| format!("cannot create {}: {error}", dir.display()))
}

fn check_options(options: &Options) -> Vec<String> {
    let mut faults = Vec::new();
    let most = options.most.unwrap_or(options.daemons);
    if most == 0 || most > MOST_DAEMONS {
        faults.push(format!("{most} daemons: expected 1 to {MOST_DAEMONS}"));
    }
    if options.dockerd.is_empty() {
        faults.push("no dockerd named".to_string());
    }
    for arg in plan::forbidden(&options.extra_args) {
        faults.push(format!("`{arg}`: dindpool sets this itself, for each daemon another"));
    }
    let longest = options.run_dir.join("00000000").join(name(most)).join("docker.sock");
    let length = longest.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        faults.push(format!(
            "{} is too deep: the daemons' sockets would have paths of {length} bytes, {MAX_SOCKET_PATH} is the \
             most; choose a run directory with a shorter path",
            options.run_dir.display()
        ));
    }
    faults.extend(check_places(options));
    if !options.self_exe.exists() {
        faults.push(format!("{}: the dindpool binary is not there", options.self_exe.display()));
    }
    faults
}

fn check_places(options: &Options) -> Vec<String> {
    let mut faults = Vec::new();
    for (what, path) in [("data", &options.data), ("run", &options.run_dir)] {
        if path.to_str().is_none_or(|text| text.chars().any(char::is_control)) {
            faults.push(format!("{}: the {what} directory's path is not plain text", path.display()));
        }
        if let Some(place) = PRIVATE.iter().find(|place| path.starts_with(place)) {
            faults.push(format!(
                "{}: the {what} directory must not be in {place}, which each daemon has for itself",
                path.display()
            ));
        }
    }
    faults
}

/// Faults of our rights, as /proc/self/status tells them.
fn check_rights(status: &str) -> Vec<String> {
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    let effective_user = field("Uid:").split_whitespace().nth(1).unwrap_or_default();
    if effective_user != "0" {
        return vec![
            "local daemons need root: run dindpool with sudo (a pool of daemons that run elsewhere, \
             `dindpool serve --daemon tcp://…`, does not)"
                .to_string(),
        ];
    }
    let capabilities = u64::from_str_radix(field("CapEff:"), 16).unwrap_or(u64::MAX);
    let wanted = [("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21)];
    let missing: Vec<&str> =
        wanted.iter().filter(|(_, bit)| capabilities >> bit & 1 == 0).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Vec::new();
    }
    vec![format!("root here lacks {}: run the container with --privileged", missing.join(" and "))]
}

/// Looks for every program that is needed, and asks each dockerd for its version.
fn check_programs(dockerds: &[PathBuf]) -> (Vec<Binary>, Vec<String>) {
    let mut faults = Vec::new();
    let machine = network::search_path(None);
    for (program, package) in [("ip", "iproute2"), ("iptables", "iptables")] {
        if network::find(Path::new(program), &machine).is_none() {
            faults.push(format!("`{program}` not found: apt-get install {package}"));
        }
    }
    let mut binaries = Vec::new();
    for wanted in dockerds {
        match check_dockerd(wanted, &machine) {
            Ok(binary) => binaries.push(binary),
            Err(more) => faults.extend(more),
        }
    }
    (binaries, faults)
}

fn check_dockerd(wanted: &Path, machine: &str) -> Result<Binary, Vec<String>> {
    let shown = wanted.display();
    let Some(path) = network::find(wanted, machine) else {
        return Err(vec![format!(
            "`{shown}` not found: apt-get install docker.io iptables iproute2, or name one with --dockerd"
        )]);
    };
    let search = network::search_path(path.parent());
    let mut faults = Vec::new();
    for program in ["containerd", "containerd-shim-runc-v2", "runc"] {
        if network::find(Path::new(program), &search).is_none() {
            faults.push(format!(
                "`{program}` not found, neither beside {} nor in PATH: apt-get install containerd runc",
                path.display()
            ));
        }
    }
    let output = Command::new(&path).arg("--version").output();
    let version = match &output {
        Ok(output) => plan::version(&String::from_utf8_lossy(&output.stdout))
            .ok_or_else(|| String::from_utf8_lossy(&output.stderr).trim().to_string()),
        Err(error) => Err(error.to_string()),
    };
    match version {
        Err(words) => faults.push(format!("`{} --version` tells no version: {words}", path.display())),
        Ok((shown, version)) if faults.is_empty() => {
            let docker_proxy = network::find(Path::new("docker-proxy"), &search).is_some();
            return Ok(Binary { path, shown, version, docker_proxy });
        }
        Ok(_) => {}
    }
    Err(faults)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_faults_of_the_options_are_told_at_once() {
        let mut options = Options::new("/run/docker/data");
        options.daemons = 0;
        options.dockerd.clear();
        options.extra_args = vec!["-H".into()];
        options.run_dir = Path::new("/run").join("x".repeat(100));
        options.self_exe = "/no/such/file".into();
        let faults = check_options(&options);
        for word in
            ["0 daemons", "no dockerd", "`-H`", "is too deep", "must not be in /run/docker", "/no/such"]
        {
            assert!(faults.iter().any(|fault| fault.contains(word)), "{word}: {faults:#?}");
        }
        assert_eq!(faults.len(), 6);
        assert_eq!(check_options(&Options::new("/var/lib/dindpool")), Vec::<String>::new());
    }

    #[test]
    fn a_pool_that_scales_takes_back_what_has_data_up_to_its_maximum() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["dind-1/root", "dind-3/root", "dind-4/root", "dind-2.going/root", "dind-05/root", "thesis/root"]
        {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let first = |daemons: usize, most: Option<usize>| {
            at_first(&Options { daemons, most, ..Options::new(dir.path()) }, dir.path(), None)
        };
        assert_eq!(first(2, None), [0, 1], "a fixed pool has the first");
        assert_eq!(first(0, Some(8)), [1, 3, 4]);
        assert_eq!(first(0, Some(2)), [1, 3]);
        assert_eq!(first(5, Some(8)), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn rights_are_judged_by_user_and_capabilities() {
        let status = |uid, caps| format!("Name:\tx\nUid:\t1\t{uid}\t1\t1\nCapEff:\t{caps}\n");
        assert!(check_rights(&status(1000, "000001ffffffffff"))[0].contains("need root"));
        assert!(check_rights(&status(0, "00000000a80425fb"))[0].contains("CAP_NET_ADMIN and CAP_SYS_ADMIN"));
        assert!(check_rights(&status(0, "000001fffeffffff")).is_empty());
    }

    #[test]
    fn missing_programs_are_told_with_the_package_that_has_them() {
        let faults = check_dockerd(Path::new("/no/dockerd"), "").err().unwrap();
        assert!(faults[0].contains("apt-get install docker.io"), "{faults:?}");
        let dir = tempfile::tempdir().unwrap();
        let fake = dir.path().join("dockerd");
        std::os::unix::fs::symlink("/bin/false", &fake).unwrap();
        let faults = check_dockerd(&fake, "").err().unwrap();
        assert!(faults.iter().any(|fault| fault.contains("--version` tells no version")), "{faults:?}");
    }

    #[test]
    fn the_id_stays_with_the_data_but_not_with_a_copy() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = Options::new(dir.path().join("one"));
        options.run_dir = dir.path().join("run");
        for made in [&options.data, &options.run_dir, &dir.path().join("two")] {
            fs::create_dir(made).unwrap();
        }
        let id = pool_id(&options).unwrap();
        assert_eq!(pool_id(&options).unwrap(), id);
        let entry = Registration {
            pool: id.clone(),
            data: options.data.clone(),
            remove_data: false,
            daemons: Vec::new(),
        };
        state::write(&state::registration_file(&options.run_dir, &id), &entry).unwrap();
        assert_eq!(pool_id(&options).unwrap(), id, "its own registration");
        fs::copy(dir.path().join("one/dindpool.id"), dir.path().join("two/dindpool.id")).unwrap();
        options.data = dir.path().join("two");
        assert_ne!(pool_id(&options).unwrap(), id);
    }
}
