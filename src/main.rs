//! The `dindpool` command.

fn main() {
    // Before anything that could start a thread: unshare(2) and fork(2) want a single-threaded process.
    let args: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if args.get(1).is_some_and(|arg| arg == dindpool::provision::process::EXEC_DAEMON) {
        dindpool::provision::process::launch::exec_daemon(&args[2..]);
    }
}
