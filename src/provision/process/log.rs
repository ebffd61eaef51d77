//! What a daemon says about itself, and what of it is worth telling.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

/// A daemon's log is moved aside when it is larger than this.
const LOG_LIMIT: u64 = 16 << 20;
/// A daemon's log file, and where in it this life begins.
pub(super) struct Log {
    path: PathBuf,
    /// Opened to append.
    pub file: File,
    begin: usize,
}

impl Log {
    /// Opens it at the start of a life.
    pub fn open(path: PathBuf) -> std::io::Result<Log> {
        move_aside(&path)?;
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let begin = usize::try_from(file.metadata()?.len()).unwrap_or(0);
        Ok(Log { path, file, begin })
    }

    /// What was written in this life.
    pub fn since(&self) -> String {
        let all = fs::read(&self.path).unwrap_or_default();
        String::from_utf8_lossy(all.get(self.begin..).unwrap_or_default()).into_owned()
    }
}

/// Keeps one former log. Copied and emptied instead of renamed: the daemon goes on writing to the same file (at
/// its end, wherever that is then).
pub(super) fn move_aside(log: &Path) -> std::io::Result<()> {
    if fs::metadata(log).is_ok_and(|meta| meta.len() > LOG_LIMIT) {
        fs::copy(log, log.with_extension("log.old"))?;
        OpenOptions::new().write(true).truncate(true).open(log)?;
    }
    Ok(())
}

/// The last few KiB of a file.
pub(super) fn tail(path: &Path) -> String {
    let read = || {
        let mut file = File::open(path).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(4096))).ok()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}

/// What init says in the log about dockerd's end (`dockerd was killed by SIGKILL`).
pub(super) fn end_line(log: &str) -> Option<String> {
    let ours = log.lines().rev().filter_map(|line| line.strip_prefix("dindpool: "));
    ours.filter(|text| text.starts_with("dockerd ")).map(str::to_string).next()
}

/// The line of a daemon's log that tells best why it did not start: the last one that is an error or comes
/// without logging dress (`failed to start daemon: …`), else the last one.
pub(in crate::provision) fn telling_line(log: &str) -> Option<String> {
    let mut last = None;
    let mut telling = None;
    for line in log.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if end_line(line).is_some() {
            continue;
        }
        let level = line.split_whitespace().find_map(|word| word.strip_prefix("level="));
        if matches!(level, None | Some("error" | "fatal" | "panic")) {
            telling = Some(line);
        }
        last = Some(line);
    }
    telling.or(last).map(message).or_else(|| end_line(log))
}

/// The message of a log line in logfmt, or the line.
fn message(line: &str) -> String {
    let text = match line.split_once(" msg=\"") {
        Some((_, rest)) => {
            let mut out = String::new();
            let mut chars = rest.chars();
            while let Some(c) = chars.next() {
                match c {
                    '"' => break,
                    '\\' => out.extend(chars.next()),
                    c => out.push(c),
                }
            }
            match line.split_once(" error=\"") {
                Some((_, error)) => format!("{out}: {}", error.trim_end_matches('"')),
                None => out,
            }
        }
        None => line.to_string(),
    };
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_tells_of_this_life_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dockerd.log");
        fs::write(&path, "before\n").unwrap();
        let log = Log::open(path.clone()).unwrap();
        fs::write(&path, "before\nnow\n").unwrap();
        assert_eq!(log.since(), "now\n");
        assert_eq!(tail(&path), "before\nnow\n");
    }

    #[test]
    fn a_long_log_is_moved_aside_while_the_daemon_writes_on() {
        use std::io::Write as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dockerd.log");
        let mut log = Log::open(path.clone()).unwrap();
        log.file.set_len(LOG_LIMIT + 1).unwrap();
        move_aside(&path).unwrap();
        log.file.write_all(b"on\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"on\n");
        assert_eq!(fs::metadata(dir.path().join("dockerd.log.old")).unwrap().len(), LOG_LIMIT + 1);
        move_aside(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"on\n", "short enough");
    }

    #[test]
    fn the_telling_line_is_the_last_error() {
        let log = "time=\"t\" level=info msg=\"Starting up\"\n\
            time=\"t\" level=error msg=\"bad \\\"thing\\\"\" error=\"no such file\"\n\
            time=\"t\" level=info msg=\"stopping\"\n";
        assert_eq!(telling_line(log).unwrap(), "bad \"thing\": no such file");
        let plain = "time=\"t\" level=info msg=\"x\"\nfailed to start daemon: no\n\n";
        assert_eq!(telling_line(plain).unwrap(), "failed to start daemon: no");
        assert_eq!(telling_line("time=\"t\" level=info msg=\"only this\"\n").unwrap(), "only this");
        let ended = format!("{plain}dindpool: dockerd exited with status 1\n");
        assert_eq!(telling_line(&ended), telling_line(plain), "its own word, not ours");
        assert_eq!(end_line(&ended).unwrap(), "dockerd exited with status 1");
        assert_eq!(
            telling_line("dindpool: dockerd was killed by SIGKILL\n"),
            end_line("dindpool: dockerd was killed by SIGKILL")
        );
        assert_eq!(telling_line("\n"), None);
        assert_eq!(telling_line("a\u{1b}[31mb").unwrap(), "a[31mb", "no control characters");
    }
}
