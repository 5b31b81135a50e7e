//! `radapt serve` by flags, environment and file: every flag has a variable `RADAPT_FLAG` and a key of
//! the same name in the file of `--config`. A flag comes before the variable, that before the file.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::builder::BoolishValueParser;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use radapt::{Error, Result};
use toml::Value;

use super::options::argument;

/// The command of that name with a variable for every flag.
pub fn with_environment(command: Command, name: &str) -> Command {
    command.mut_subcommand(name, |serve| {
        serve.mut_args(|arg| {
            let Some(long) = arg.get_long().filter(|long| *long != "check") else { return arg };
            let variable = format!("RADAPT_{}", long.to_uppercase().replace('-', "_"));
            // Once in a process; clap takes names that live as long as it does.
            let arg =
                if arg.get_env().is_none() { arg.env(&*Box::leak(variable.into_boxed_str())) } else { arg };
            match arg.get_action() {
                ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
                _ => arg,
            }
        })
    })
}

/// The file of `--config`, if one is named.
pub fn file(serve: &ArgMatches) -> Option<&PathBuf> {
    serve.get_one::<PathBuf>("config")
}

/// What the file says and neither a flag nor a variable does, as flags.
///
/// # Errors
/// If the file cannot be read, is no TOML, or has a key that is no flag or a value that fits none.
pub fn flags(path: &Path, serve: &ArgMatches, command: &Command, name: &str) -> Result<Vec<OsString>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|e| argument("--config", "a file that can be read", &format!("{shown}: {e}")))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
        let at = e.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
        argument(&format!("`{shown}`"), "TOML", &format!("line {at}: {}", e.message()))
    })?;
    let known: Vec<&Arg> = command
        .find_subcommand(name)
        .into_iter()
        .flat_map(Command::get_arguments)
        .chain(command.get_arguments().filter(|arg| arg.is_global_set()))
        .filter(|arg| !["config", "check", "help", "version"].contains(&arg.get_id().as_str()))
        .collect();
    let mut flags = Vec::new();
    for (key, value) in &table {
        let what = format!("`{shown}`: {key}");
        let Some(arg) = known.iter().find(|arg| arg.get_long() == Some(key)) else {
            let meant = key.replace('_', "-");
            let expected = match known.iter().any(|arg| arg.get_long() == Some(&meant)) {
                true => format!("the key `{meant}`"),
                false => "a key that is a flag of `radapt serve`".to_string(),
            };
            return Err(argument(&what, &expected, "an unknown key"));
        };
        let given = serve.value_source(arg.get_id().as_str());
        if matches!(given, Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
            continue;
        }
        match (arg.get_action(), value) {
            (ArgAction::SetTrue, Value::Boolean(true)) => flags.push(format!("--{key}").into()),
            (ArgAction::SetTrue, Value::Boolean(false)) => {}
            (ArgAction::SetTrue, other) => return Err(argument(&what, "true or false", other.type_str())),
            (ArgAction::Count, Value::Integer(n @ 0..=9)) => {
                flags.extend((0..*n).map(|_| OsString::from(format!("--{key}"))));
            }
            (ArgAction::Count, other) => return Err(argument(&what, "a number up to 9", &other.to_string())),
            (ArgAction::Append, Value::Array(values)) => {
                for value in values {
                    flags.push(flag(key, value, &what)?);
                }
            }
            (_, value) => flags.push(flag(key, value, &what)?),
        }
    }
    Ok(flags)
}

fn flag(key: &str, value: &Value, what: &str) -> Result<OsString> {
    let value = match value {
        Value::String(text) => text.clone(),
        Value::Integer(_) | Value::Float(_) | Value::Boolean(_) => value.to_string(),
        other => return Err(argument(what, "a text, a number, true or false", other.type_str())),
    };
    Ok(format!("--{key}={value}").into())
}

/// clap's complaint about a value of the file.
pub fn complaint(path: &Path, error: &clap::Error) -> Error {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    argument(
        &format!("`{}`", path.display()),
        "values that its flags take",
        line.trim_start_matches("error: "),
    )
}
