//! `dindpool cordon`, `uncordon` and `drain`.

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use http_body_util::BodyExt;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::admin::Change;
use crate::engine::model::{Drained, Remaining};
use crate::pool::cordon::Progress;

/// How a drain exits that had to cut something.
const CUT: u8 = 3;

#[derive(Debug, Args)]
pub struct Cordon {
    /// The daemon's name, as dindpool status shows it
    daemon: String,
    #[command(flatten)]
    change: Change,
}

#[derive(Debug, Args)]
pub struct Uncordon {
    /// The daemon's name, as dindpool status shows it
    daemon: String,
    #[command(flatten)]
    change: Change,
}

#[derive(Debug, Args)]
pub struct Drain {
    /// The daemon's name, as dindpool status shows it
    daemon: String,
    /// When the work that is left is cut
    #[arg(long, default_value = "10m", value_name = "TIME")]
    deadline: String,
    #[command(flatten)]
    change: Change,
}

impl Cordon {
    pub async fn run(self) -> anyhow::Result<()> {
        self.change.post(&path(&self.daemon, "cordon")).await?;
        println!("{} takes no new sessions", self.daemon);
        Ok(())
    }
}

impl Uncordon {
    pub async fn run(self) -> anyhow::Result<()> {
        self.change.post(&path(&self.daemon, "uncordon")).await?;
        println!("{} takes sessions", self.daemon);
        Ok(())
    }
}

impl Drain {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        let deadline = utf8_percent_encode(&self.deadline, NON_ALPHANUMERIC);
        let path = format!("{}?deadline={deadline}", path(&self.daemon, "drain"));
        let mut body = self.change.post(&path).await?.into_body();
        let mut line = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.context("the pool has gone; the drain with it")?;
            line.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            while let Some(end) = line.iter().position(|b| *b == b'\n') {
                let progress: Progress =
                    serde_json::from_slice(&line[..end]).context("what answers there is no dindpool")?;
                line.drain(..=end);
                match progress {
                    Progress::Draining { deadline, remaining } => {
                        eprintln!("{} has work left, {:.0} s to the deadline:", self.daemon, deadline);
                        remaining.iter().for_each(|r| eprintln!("  {}", describe(r)));
                    }
                    Progress::Drained(drained) => return Ok(self.ended(&drained)),
                    Progress::Uncordoned => anyhow::bail!("{} was uncordoned", self.daemon),
                    Progress::Gone => anyhow::bail!("{} has gone", self.daemon),
                }
            }
        }
        anyhow::bail!("the pool has gone; the drain with it")
    }

    fn ended(&self, drained: &Drained) -> ExitCode {
        let left = &drained.left;
        if !left.images.is_empty() {
            println!("images that were not pushed: {}", left.images.join(", "));
        }
        if !left.containers.is_empty() {
            println!("stopped containers: {}", left.containers.join(", "));
        }
        if drained.cut.is_empty() {
            println!("{} is drained", self.daemon);
            return ExitCode::SUCCESS;
        }
        println!("{} is drained; at the deadline this was cut:", self.daemon);
        drained.cut.iter().for_each(|r| println!("  {}", describe(r)));
        ExitCode::from(CUT)
    }
}

fn path(daemon: &str, verb: &str) -> String {
    format!("/daemons/{}/{verb}", utf8_percent_encode(daemon, NON_ALPHANUMERIC))
}

/// `posix:812@44190: 1 build, 2 open requests, containers db, web`
fn describe(remaining: &Remaining) -> String {
    let count = |n: u32, one: &str| (n > 0).then(|| format!("{n} {one}{}", if n == 1 { "" } else { "s" }));
    let names = (!remaining.containers.is_empty())
        .then(|| format!("running containers {}", remaining.containers.join(", ")));
    let what: Vec<String> = [
        count(remaining.builds, "build"),
        count(remaining.open, "open request"),
        count(remaining.waiting, "waiting request"),
        names,
    ]
    .into_iter()
    .flatten()
    .collect();
    let whose = remaining.key.as_ref().map_or("no session of this pool", |key| key.as_str());
    format!("{whose}: {}", what.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_in_words() {
        let remaining = Remaining {
            key: Some("ip:1".into()),
            open: 2,
            builds: 1,
            containers: vec!["db".into()],
            waiting: 0,
        };
        assert_eq!(describe(&remaining), "ip:1: 1 build, 2 open requests, running containers db");
        assert_eq!(path("dind/a:1", "drain"), "/daemons/dind%2Fa%3A1/drain");
    }
}
