//! `radapt serve` by flags, environment and file, and `--check`.
#![cfg(feature = "engine")]

mod fixture;

use std::process::{Command, Output};

use fixture::path;
use serde_json::Value;

/// `radapt serve --check --json` with these flags and variables.
fn check(flags: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(["serve", "--check", "--json"])
        .args(flags)
        .envs(variables.iter().copied())
        .output()
        .expect("radapt runs")
}

fn said(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{e}: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// A file with this text.
fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), text).expect("written");
    file
}

#[test]
fn a_flag_comes_before_the_environment_and_that_before_the_file() {
    let config = file(
        "name = \"file\"\nmax-tokens = 7\nno-gif = true\noffline = false\nalpha = 1.5\naddr = \"127.0.0.1:4321\"\n",
    );
    let config = config.path().to_str().expect("a path");
    let name = |flags: &[&str], variables: &[(&str, &str)]| {
        let output = check(flags, variables);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        said(&output)
    };
    let by_file = name(&["--config", config], &[]);
    assert_eq!(
        (&by_file["ok"], &by_file["model"], &by_file["address"]),
        (&true.into(), &"file".into(), &"127.0.0.1:4321".into())
    );
    assert_eq!(by_file["defense"]["alpha"], 1.5);
    assert_eq!(by_file["defense"]["cutoff"], Value::Null, "{by_file}");
    // The file may be named by a variable too.
    let by_variable =
        name(&[], &[("RADAPT_CONFIG", config), ("RADAPT_NAME", "variable"), ("RADAPT_ALPHA", "1.25")]);
    assert_eq!((&by_variable["model"], &by_variable["defense"]["alpha"]), (&"variable".into(), &1.25.into()));
    let by_flag = name(&["--config", config, "--name", "flag"], &[("RADAPT_NAME", "variable")]);
    assert_eq!(by_flag["model"], "flag");
    let by_default = name(&[], &[("RADAPT_NO_GIF", "yes")]);
    assert_eq!((&by_default["model"], &by_default["defense"]["cutoff"]), (&"pocket".into(), &Value::Null));
}

#[test]
fn every_flag_is_a_key() {
    let help =
        Command::new(env!("CARGO_BIN_EXE_radapt")).args(["serve", "--help"]).output().expect("radapt runs");
    let help = String::from_utf8(help.stdout).expect("text");
    let flags: Vec<&str> = help
        .lines()
        .filter_map(|line| {
            line.trim_start()
                .split_once("--")
                .filter(|(before, _)| before.is_empty() || before.ends_with(", "))
        })
        .filter_map(|(_, rest)| rest.split([' ', '.', '[']).next())
        .filter(|flag| !["config", "check", "help", "version"].contains(flag))
        .collect();
    assert!(help.contains("[env: RADAPT_MAX_TOKENS=]") && help.contains("[env: RADAPT_ADDR=]"), "{help}");
    assert!(flags.len() > 20 && flags.contains(&"max-tokens") && flags.contains(&"seed"), "{flags:?}");
    for flag in flags {
        // No flag takes a table.
        let config = file(&format!("[{flag}]\n"));
        let output = Command::new(env!("CARGO_BIN_EXE_radapt"))
            .args(["serve", "--check", "--config"])
            .arg(config.path())
            .output()
            .expect("radapt runs");
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flag}: {error}");
        assert!(error.contains(flag) && !error.contains("unknown"), "{flag}: {error}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn what_is_wrong_in_a_file_is_named() {
    for (text, says) in [
        ("nme = 1", "nme: expected a key that is a flag of `radapt serve`, found an unknown key"),
        ("max_tokens = 1", "max_tokens: expected the key `max-tokens`"),
        ("config = \"x\"", "config: expected a key"),
        ("max-tokens = \"many\"", "invalid value 'many' for '--max-tokens"),
        ("max-tokens = [1]", "max-tokens: expected a text, a number, true or false, found array"),
        ("no-gif = 1", "no-gif: expected true or false, found integer"),
        ("addr = \"nowhere\"", "invalid value 'nowhere' for '--addr"),
        ("name = \"a\"\nname = ", "line 2"),
        ("max-tokens = 0", "--max-tokens: expected at least 1"),
    ] {
        let config = file(text);
        let output = check(&["--config", config.path().to_str().expect("a path")], &[]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{text}: {error}");
        assert!(error.contains(says), "{text}: {error}");
    }
    let output = check(&["--config", "/nowhere/radapt.toml"], &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nowhere/radapt.toml"));
    assert_eq!(check(&[], &[("RADAPT_MAX_TOKENS", "many")]).status.code(), Some(2));
}

#[test]
fn check_tells_what_does_not_fit() {
    let model = path("llava/v4").display().to_string();
    let fits = check(&["--model", &model, "--contract", "llava-crop"], &[]);
    assert_eq!(fits.status.code(), Some(0), "{}", String::from_utf8_lossy(&fits.stderr));
    // An anchor of the pocket's tower.
    let anchor = check(&["--model", &model, "--contract", "llava-crop", "--anchor", "pocket-8-static"], &[]);
    assert_eq!(anchor.status.code(), Some(1), "{}", String::from_utf8_lossy(&anchor.stderr));
    assert_eq!(said(&anchor)["ok"], false);
    assert!(
        said(&anchor)["reason"].as_str().is_some_and(|reason| reason.contains("anchor")),
        "{}",
        said(&anchor)
    );
    let missing = check(&["--model", "/nowhere/model"], &[]);
    assert_eq!((missing.status.code(), &said(&missing)["ok"]), (Some(1), &Value::Bool(false)));
}
