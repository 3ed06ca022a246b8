//! The settings file: `--config FILE`, TOML. Flags win over the environment, the environment over the file, the file over defaults.
//!
//! ```toml
//! cluster = "production"               # for every command that has such a flag
//! etcd = ["http://etcd:2379"]
//!
//! [decode]                             # for one command; wins over the lines above
//! kv-mib = 40960
//! require-rdma = true
//! ```
//!
//! Keys are the long flags. A key that no command has, or a value that its flag refuses, is an error.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};
use toml::{Table, Value};

use crate::args::Cli;

/// Flags that are no settings.
const NO_SETTINGS: &[&str] = &["config", "check-config", "help", "version"];

/// The command line with what the file adds, and where each setting of the command comes from.
pub struct Settings {
    /// Everything, parsed.
    pub cli: Cli,
    /// Flag, value and source of the command's settings, in the order of its help.
    pub effective: Vec<(String, String, String)>,
}

/// Parses; prints help and errors of the command line as clap does, and ends the process then.
pub fn parse(argv: Vec<OsString>) -> anyhow::Result<Settings> {
    let command = Cli::command();
    let Some((file, added)) = from_file(&command, &argv)? else {
        return settings(command, argv, None, &[]).map_err(|error| error.exit());
    };
    let with_file = with(argv, &added);
    settings(command, with_file, Some(&file), &added).map_err(|error| {
        let about = error.to_string();
        let from_file = added.iter().find(|flag| about.contains(flag.split('=').next().unwrap_or_default()));
        if let Some(flag) = from_file {
            let _ = error.print();
            eprintln!("note: {} says {flag}", file.display());
            std::process::exit(2);
        }
        error.exit()
    })
}

fn settings(
    command: Command,
    argv: Vec<OsString>,
    file: Option<&Path>,
    added: &[String],
) -> Result<Settings, clap::Error> {
    let matches = command.clone().try_get_matches_from(argv)?;
    let effective = effective(&command, &matches, file, added);
    Ok(Settings { cli: Cli::from_arg_matches(&matches)?, effective })
}

/// The file that is named, and the flags that it adds to this command line.
fn from_file(command: &Command, argv: &[OsString]) -> anyhow::Result<Option<(PathBuf, Vec<String>)>> {
    // What is wrong with the command line is told by the second, strict parse.
    let seen = command.clone().ignore_errors(true).try_get_matches_from(argv);
    let Ok(seen) = seen else { return Ok(None) };
    let Some((name, of_command)) = seen.subcommand() else { return Ok(None) };
    let Some(file) = of_command.try_get_one::<PathBuf>("config").ok().flatten().cloned() else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(&file)
        .with_context(|| format!("--config: cannot read {}", file.display()))?;
    let table: Table =
        text.parse().map_err(|error| anyhow::anyhow!("--config {}: {error}", file.display()))?;
    let mut built = command.clone();
    built.build();
    check_keys(&built, &table, &file)?;
    let subcommand = built.find_subcommand(name).context("no such command")?;
    let added = flags(subcommand, of_command, &table, name)
        .map_err(|error| anyhow::anyhow!("--config {}: {error}", file.display()))?;
    Ok(Some((file, added)))
}

/// Every key is a flag of some command, or a command with flags of its own.
fn check_keys(command: &Command, table: &Table, file: &Path) -> anyhow::Result<()> {
    for (key, value) in table {
        let unknown = |key: &str, of: &str| {
            anyhow::anyhow!(
                "--config {}: no setting {key:?}{of}; keys are the long flags of `tandem COMMAND --help`",
                file.display()
            )
        };
        match value {
            Value::Table(section) => {
                let Some(subcommand) = command.find_subcommand(key) else {
                    bail!("--config {}: no command {key:?} for section [{key}]", file.display());
                };
                for name in section.keys() {
                    setting(subcommand, name).ok_or_else(|| unknown(name, &format!(" for {key}")))?;
                }
            }
            _ => {
                let known = command.get_subcommands().any(|c| setting(c, key).is_some());
                known.then_some(()).ok_or_else(|| unknown(key, ""))?;
            }
        }
    }
    Ok(())
}

fn setting<'a>(command: &'a Command, key: &str) -> Option<&'a Arg> {
    let is_it = |arg: &&Arg| arg.get_long() == Some(key) && !arg.is_hide_set();
    command.get_arguments().find(is_it).filter(|_| !NO_SETTINGS.contains(&key))
}

/// Flags for what the file says and neither the command line nor the environment does.
fn flags(command: &Command, given: &ArgMatches, table: &Table, name: &str) -> anyhow::Result<Vec<String>> {
    let is_given = |arg: &Arg| {
        let source = given.try_contains_id(arg.get_id().as_str()).ok();
        let source = source.and_then(|_| given.value_source(arg.get_id().as_str()));
        matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable))
    };
    let section = table.get(name).and_then(Value::as_table);
    let mut out = Vec::new();
    for arg in command.get_arguments() {
        let Some(key) = arg.get_long().filter(|key| setting(command, key).is_some()) else { continue };
        let value = section.and_then(|s| s.get(key)).or_else(|| table.get(key).filter(|v| !v.is_table()));
        let Some(value) = value else { continue };
        let conflicts = command.get_arg_conflicts_with(arg);
        if is_given(arg) || conflicts.into_iter().any(is_given) {
            continue;
        }
        flag(arg, key, value, &mut out)?;
    }
    Ok(out)
}

fn flag(arg: &Arg, key: &str, value: &Value, out: &mut Vec<String>) -> anyhow::Result<()> {
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        match value {
            Value::Boolean(true) => out.push(format!("--{key}")),
            Value::Boolean(false) => {}
            other => bail!("{key}: true or false, not {other}"),
        }
        return Ok(());
    }
    match value {
        Value::Array(values) if matches!(arg.get_action(), ArgAction::Append) => {
            for value in values {
                out.push(format!("--{key}={}", plain(key, value)?));
            }
        }
        value => out.push(format!("--{key}={}", plain(key, value)?)),
    }
    Ok(())
}

fn plain(key: &str, value: &Value) -> anyhow::Result<String> {
    Ok(match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Boolean(is) => is.to_string(),
        other => bail!("{key}: a string or a number, not {other}"),
    })
}

/// Before a `--`, behind which nothing is a flag.
fn with(mut argv: Vec<OsString>, added: &[String]) -> Vec<OsString> {
    let end = argv.iter().position(|a| a == "--").unwrap_or(argv.len());
    argv.splice(end..end, added.iter().map(OsString::from));
    argv
}

fn effective(
    command: &Command,
    matches: &ArgMatches,
    file: Option<&Path>,
    added: &[String],
) -> Vec<(String, String, String)> {
    let mut built = command.clone();
    built.build();
    let Some((name, given)) = matches.subcommand() else { return Vec::new() };
    let Some(subcommand) = built.find_subcommand(name) else { return Vec::new() };
    let one = |arg: &Arg| {
        let key = arg.get_long().filter(|key| setting(subcommand, key).is_some())?;
        let id = arg.get_id().as_str();
        let values = given.try_get_raw(id).ok().flatten()?;
        let values: Vec<String> = values.map(|v| v.to_string_lossy().into_owned()).collect();
        let is_of_file = |flag: &String| {
            flag.strip_prefix("--")
                .is_some_and(|f| f == key || f.strip_prefix(key).is_some_and(|v| v.starts_with('=')))
        };
        let source = match (given.value_source(id)?, file) {
            (ValueSource::CommandLine, Some(file)) if added.iter().any(is_of_file) => {
                file.display().to_string()
            }
            (ValueSource::CommandLine, _) => "flag".to_owned(),
            (ValueSource::EnvVariable, _) => "environment".to_owned(),
            _ => "default".to_owned(),
        };
        Some((key.to_owned(), values.join(","), source))
    };
    subcommand.get_arguments().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::args;

    fn argv(words: &str) -> Vec<OsString> {
        words.split(' ').map(OsString::from).collect()
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn added(command_line: &str, text: &str) -> anyhow::Result<Vec<String>> {
        let file = file(text);
        let line = format!("{command_line} --config {}", file.path().display());
        Ok(from_file(&Cli::command(), &argv(&line))?.unwrap().1)
    }

    const FILE: &str = r#"
        cluster = "blue"
        etcd = ["http://a:2379", "http://b:2379"]
        log-json = true
        [decode]
        kv-mib = 77
        cluster = "green"
        require-rdma = true
        no-graphs = false
        [router]
        slo-ttft-ms = 5
    "#;

    #[test]
    fn a_commands_own_section_wins_and_flags_win_over_both() {
        let got = added("tandem decode", FILE).unwrap();
        let want = [
            "--etcd=http://a:2379",
            "--etcd=http://b:2379",
            "--cluster=green",
            "--kv-mib=77",
            "--require-rdma",
            "--log-json",
        ];
        for flag in want {
            assert!(got.iter().any(|g| g == flag), "{flag} of {got:?}");
        }
        assert_eq!(got.len(), want.len(), "{got:?}");
        let got = added("tandem decode --kv-mib 5 --cluster=x", FILE).unwrap();
        assert!(!got.iter().any(|g| g.starts_with("--kv-mib") || g.starts_with("--cluster")), "{got:?}");
        // A flag that cannot go with one of the file's replaces it.
        let got = added("tandem decode --registry 127.0.0.1:1", FILE).unwrap();
        assert!(!got.iter().any(|g| g.starts_with("--etcd")), "{got:?}");
    }

    #[test]
    fn what_is_effective_and_why() {
        let file = file(FILE);
        let line = format!("tandem router --max-running 9 --config {}", file.path().display());
        let settings = parse(argv(&line)).unwrap();
        let args::Command::Router(router) = settings.cli.command else { panic!("another command") };
        assert_eq!((router.cluster.as_str(), router.placement.slo_ttft_ms), ("blue", 5));
        assert_eq!(router.etcd.len(), 2);
        let source = |key: &str| {
            let found = settings.effective.iter().find(|(flag, ..)| flag == key).unwrap();
            (found.1.clone(), found.2.clone())
        };
        assert_eq!(source("max-running"), ("9".into(), "flag".into()));
        assert_eq!(source("slo-ttft-ms"), ("5".into(), file.path().display().to_string()));
        assert_eq!(source("max-queued"), ("1024".into(), "default".into()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |text: &str, words: &str| {
            let error = added("tandem router", text).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        };
        wrong("clutser = 'x'", "no setting \"clutser\"");
        wrong("[router]\nkv-mib = 3", "no setting \"kv-mib\" for router");
        wrong("[ruoter]\ncluster = 'x'", "no command \"ruoter\"");
        wrong("log-json = 3", "true or false, not 3");
        wrong("etcd = [[1]]", "a string or a number");
        wrong("= 3", "--config");
        wrong("stop-with-parent = true", "no setting");
    }
}
