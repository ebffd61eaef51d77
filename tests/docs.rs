//! The documents say what the code says: metrics, settings, commands, messages, links.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use dindpool::cli::Cli;
use dindpool::config::{Faults, Raw, duration};

/// Those with flags.
const COMMANDS: [&str; 10] =
    ["serve", "up", "status", "events", "why", "session", "certs", "cordon", "uncordon", "drain"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The README and everything in docs/, by path.
fn documents() -> BTreeMap<String, String> {
    let mut paths = vec!["README.md".to_string(), "CHANGELOG.md".to_string()];
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "md") {
            paths.push(format!("docs/{}", path.file_name().unwrap().to_str().unwrap()));
        }
    }
    paths.into_iter().map(|p| (p.clone(), read(&p))).collect()
}

/// The cells of a table's rows, without heads and rules.
fn rows(document: &str) -> impl Iterator<Item = Vec<&str>> {
    document.lines().filter(|l| l.starts_with("| `")).map(|l| {
        let inner = l.trim_end().trim_start_matches('|').trim_end_matches('|');
        inner.split('|').map(str::trim).collect()
    })
}

/// All Rust source, with strings that go over a line's end joined.
fn source() -> String {
    fn walk(dir: &Path, out: &mut String) {
        let mut entries: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push_str(&fs::read_to_string(path).unwrap());
            }
        }
    }
    let mut all = String::new();
    walk(&root().join("src"), &mut all);
    let mut joined = String::new();
    for (i, part) in all.split("\\\n").enumerate() {
        joined.push_str(if i == 0 { part } else { part.trim_start() });
    }
    joined
}

#[test]
fn the_tables_of_metrics_are_what_the_list_of_names_makes() {
    const BEGIN: &str = "<!-- made from src/metrics/names.rs -->";
    const END: &str = "<!-- the end of what is made -->";
    let document = read("docs/metrics.md");
    let (before, rest) = document.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let made = format!("{before}{BEGIN}\n\n{}\n{END}{after}", dindpool::metrics::document::tables());
    if std::env::var_os("UPDATE").is_some() {
        fs::write(root().join("docs/metrics.md"), made).unwrap();
    } else {
        assert!(
            document == made,
            "docs/metrics.md is not what the code says: UPDATE=1 cargo test --test docs"
        );
    }
}

/// What an error message lists after `known are`.
fn known(toml: &str) -> Vec<String> {
    let Faults(faults) = Raw::from_toml(toml).unwrap_err();
    let list = faults[0].split("known are ").nth(1).expect("a list of known keys");
    list.split(", ").map(str::to_string).collect()
}

#[test]
fn every_key_of_the_file_is_documented_and_no_other() {
    let document = read("docs/configuration.md");
    let mut documented: BTreeSet<String> = BTreeSet::new();
    for row in rows(&document).filter(|r| r.len() == 5) {
        if !row[2].is_empty() {
            documented.insert(row[2].trim_matches('`').to_string());
        }
    }
    assert_eq!(documented, known("no_such_key = 1").into_iter().collect());
    for key in known("listen = [{ no_such_key = 1 }]") {
        assert!(document.contains(&format!("\n| `{key}` |")), "the key {key} of a listener");
    }
}

#[test]
fn the_example_file_is_valid_and_has_every_key() {
    let path = root().join("deploy/dindpool.example.toml");
    let raw = Raw::from_file(&path).unwrap_or_else(|e| panic!("{e}"));
    raw.validate(true).unwrap_or_else(|e| panic!("{e}"));
    let text = read("deploy/dindpool.example.toml");
    for key in known("no_such_key = 1") {
        // One whose file must be there is only shown.
        let there = text.contains(&format!("\n{key} = ")) || text.contains(&format!("\n# {key} = "));
        assert!(there, "{key}");
    }
}

/// Flag, variable and default, as `--help` has them.
fn flags(command: &str) -> Vec<(String, Option<String>, Option<String>)> {
    let cli = Cli::command();
    let command = cli.find_subcommand(command).unwrap();
    let flag = |arg: &clap::Arg| {
        let name = format!("--{}", arg.get_long()?);
        let variable = arg.get_env().map(|v| v.to_str().unwrap().to_string());
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let told = help.split("[default: ").nth(1).map(|d| d.trim_end_matches(']').to_string());
        let typed = arg.get_default_values().first().map(|v| v.to_str().unwrap().to_string());
        Some((name, variable, typed.or(told)))
    };
    command
        .get_arguments()
        .filter(|a| !a.is_positional())
        .filter_map(flag)
        .filter(|(name, ..)| name != "--help")
        .collect()
}

#[test]
fn every_flag_is_documented_with_its_variable_and_default() {
    let document = read("docs/configuration.md");
    for command in COMMANDS {
        for (flag, variable, default) in flags(command) {
            let name = |row: &Vec<&str>| row[0].trim_matches('`').split(' ').next() == Some(flag.as_str());
            let row =
                rows(&document).find(name).unwrap_or_else(|| panic!("{command} {flag} is not documented"));
            let cell = variable.map(|v| format!("`{v}`")).unwrap_or_default();
            assert_eq!(row[1], cell, "the variable of {command} {flag}");
            // What help tells in words ("from its processors and memory") is told in other words there.
            if let Some(default) = default.filter(|d| !d.contains(" from ") && !d.starts_with("from ")) {
                assert!(row.concat().contains(&default), "the default {default} of {command} {flag}");
            }
        }
    }
    let all: BTreeSet<String> = COMMANDS.into_iter().flat_map(flags).map(|(flag, ..)| flag).collect();
    for row in rows(&document).filter(|r| r[0].starts_with("`--")) {
        let flag = row[0].trim_matches('`').split(' ').next().unwrap();
        assert!(all.contains(flag), "{flag} is documented and does not exist");
    }
}

#[test]
fn the_durations_in_help_are_the_ones_that_apply() {
    let settings = Raw::default().validate(false).unwrap();
    let pool = &settings.pool;
    for (flag, applies) in [
        ("--session-grace", pool.engine.grace),
        ("--slot-linger", pool.engine.linger),
        ("--queue-wait", pool.engine.max_wait),
        ("--probe-interval", pool.probe_interval),
        ("--probe-deadline", pool.probe_deadline),
        ("--deep-probe-interval", pool.engine.deep_probe_interval),
        ("--connect-deadline", pool.connect_deadline),
        ("--shutdown-grace", settings.shutdown_grace),
    ] {
        let (_, _, told) = flags("serve").into_iter().find(|(name, ..)| name == flag).unwrap();
        assert_eq!(duration(&told.unwrap()), Some(applies), "{flag}");
    }
}

/// The code of a document: its fenced lines (continued ones joined) and its inline spans.
fn code(document: &str) -> Vec<String> {
    let mut code = Vec::new();
    for (i, part) in document.split("```").enumerate() {
        if i % 2 == 1 {
            code.extend(part.replace("\\\n", " ").lines().skip(1).map(str::to_string));
        } else {
            code.extend(part.split('`').skip(1).step_by(2).map(|span| span.replace('\n', " ")));
        }
    }
    code
}

#[test]
fn every_command_and_flag_in_a_document_exists() {
    let commands: Vec<String> = Cli::command().get_subcommands().map(|c| c.get_name().to_string()).collect();
    let mut seen = 0;
    for (path, document) in documents() {
        for code in code(&document) {
            let words: Vec<&str> = code.split_whitespace().take_while(|w| !w.starts_with('#')).collect();
            let allowed: BTreeSet<String> = match words.iter().position(|w| w.ends_with("dindpool")) {
                Some(at) if at == 0 || words[at - 1] == "sudo" => {
                    // A path, or a message (`dindpool is shutting down`), is no command.
                    let word = |w: &&&str| w.bytes().all(|b| b.is_ascii_lowercase()) && **w != "is";
                    let Some(command) = words.get(at + 1).filter(word) else {
                        continue;
                    };
                    assert!(commands.iter().any(|c| c == command), "{path}: `{code}`: no command {command}");
                    flags(command).into_iter().map(|(flag, ..)| flag).collect()
                }
                // A flag alone is one of ours.
                _ if words.first().is_some_and(|w| w.starts_with("--")) => {
                    COMMANDS.into_iter().flat_map(flags).map(|(flag, ..)| flag).collect()
                }
                _ => continue,
            };
            for flag in words.iter().filter(|w| w.starts_with("--")) {
                let flag = flag.split('=').next().unwrap();
                assert!(allowed.contains(flag), "{path}: `{code}`: no flag {flag}");
                seen += 1;
            }
        }
    }
    assert!(seen > 30, "the documents are no longer read");
}

#[test]
fn every_message_in_troubleshooting_is_in_the_source() {
    let source = source();
    let document = read("docs/troubleshooting.md");
    let own = document.split("Messages that are the daemon's own").next().unwrap();
    let start = document.split("## When `dindpool` does not start").nth(1).unwrap();
    let start = start.split("\n## ").next().unwrap();
    let mut seen = 0;
    for row in rows(own).chain(rows(start)) {
        let message = row[0].trim_matches('`');
        for fragment in message.split('…').map(|f| f.trim_matches([' ', ':', '.'])) {
            if fragment.len() >= 6 {
                assert!(source.contains(fragment), "no source says {fragment:?} of {message:?}");
                seen += 1;
            }
        }
    }
    assert!(seen > 25, "the document is no longer read");
}

#[test]
fn every_link_between_documents_leads_somewhere() {
    for (path, document) in documents() {
        let dir = root().join(&path).parent().unwrap().to_path_buf();
        for link in document.split("](").skip(1).map(|l| l.split(')').next().unwrap()) {
            if link.contains("://") || link.starts_with('#') {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = fs::read(dir.join(file)).unwrap_or_else(|e| panic!("{path}: {link}: {e}"));
            // A picture has no headings.
            let target = String::from_utf8_lossy(&target);
            let heading = |l: &str| l.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
            let there =
                anchor.is_empty() || target.lines().any(|l| l.starts_with('#') && heading(l) == anchor);
            assert!(there, "{path}: {link}: no such heading");
        }
    }
}

/// The names of tests in a document: `path.rs::function`.
fn named_tests(document: &str) -> Vec<(&str, &str)> {
    let spans = document.split('`').skip(1).step_by(2);
    spans.filter_map(|s| s.split_once("::")).filter(|(path, _)| path.ends_with(".rs")).collect()
}

#[test]
fn the_failure_matrix_is_whole_and_names_tests_that_exist() {
    let document = read("docs/reliability.md");
    let numbers: Vec<usize> =
        document.lines().filter_map(|l| l.strip_prefix("| ")?.split(' ').next()?.parse().ok()).collect();
    assert_eq!(numbers, (1..=47).collect::<Vec<_>>(), "rows of docs/reliability.md");
    let named = named_tests(&document);
    assert!(named.len() > 20, "the document is no longer read");
    for (path, function) in &named {
        assert!(read(path).contains(&format!("fn {function}(")), "{path} has no {function}");
    }
    // And the other way: a test that carries a row's number is in that row.
    for entry in fs::read_dir(root().join("tests/failures")).unwrap() {
        let path = format!("tests/failures/{}", entry.unwrap().file_name().to_str().unwrap());
        for function in read(&path).split("fn row_").skip(1).map(|f| f.split('(').next().unwrap()) {
            let number: usize = function.split('_').next().unwrap().parse().unwrap();
            let name = format!("`{path}::row_{function}`");
            let row = document.lines().find(|l| l.starts_with(&format!("| {number} |")));
            assert!(row.is_some_and(|r| r.contains(&name)), "row {number} does not name {name}");
        }
    }
}
