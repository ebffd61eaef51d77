//! The `dindpool` command.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use dindpool::cli::{self, Cli};
use dindpool::provision::process::{self, EXEC_DAEMON};
use dindpool::telemetry;

fn main() -> ExitCode {
    // Before any thread exists: this enters namespaces and becomes dockerd.
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|a| a == EXEC_DAEMON) {
        process::launch::exec_daemon(&arguments[2..]);
    }
    let result = cli::run(Cli::parse());
    telemetry::flush();
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("dindpool: {error:#}");
            ExitCode::FAILURE
        }
    }
}
