//! Repositories on the Hub: their files in its cache, downloaded where they are not there.

use std::path::{Path, PathBuf};

use hf_hub::{Cache, Repo, RepoType};

use crate::model::Lookup;

/// `organisation/name`, each of the letters the Hub allows.
pub(crate) fn is_id(name: &str) -> bool {
    let part = |s: &str| {
        !s.is_empty()
            && !s.starts_with('.')
            && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    name.split_once('/').is_some_and(|(organisation, model)| part(organisation) && part(model))
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn is_offline(lookup: &Lookup) -> bool {
    lookup.offline
        || env("HF_HUB_OFFLINE")
            .is_some_and(|v| matches!(v.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true"))
}

fn hf_home() -> PathBuf {
    let home = || PathBuf::from(env("HOME").or_else(|| env("USERPROFILE")).unwrap_or_default());
    let default =
        || env("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from).join("huggingface");
    env("HF_HOME").map_or_else(default, PathBuf::from)
}

fn token() -> Option<String> {
    let path = env("HF_TOKEN_PATH").map_or_else(|| hf_home().join("token"), PathBuf::from);
    let stored = || {
        std::fs::read_to_string(path).ok().map(|text| text.trim().to_string()).filter(|text| !text.is_empty())
    };
    env("HF_TOKEN").or_else(stored)
}

/// The snapshot folder of a repository with the files that are `wanted`, given all there are, of
/// which one of `needed` must be one; downloaded first where they are not cached. What is wrong
/// otherwise is told in words that follow the repository's name.
pub(crate) fn folder(
    name: &str,
    kind: RepoType,
    lookup: &Lookup,
    wanted: impl Fn(&str, &[&str]) -> bool,
    needed: &[&str],
) -> Result<PathBuf, String> {
    let revision = lookup.revision.clone().unwrap_or_else(|| "main".into());
    let repo = Repo::with_revision(name.into(), kind, revision.clone());
    let path = env("HF_HUB_CACHE").map_or_else(|| hf_home().join("hub"), PathBuf::from);
    let cache = Cache::new(path.clone());
    let snapshot = |file: PathBuf| {
        file.parent().map(Path::to_path_buf).ok_or_else(|| "has an empty path in the cache".to_string())
    };
    if is_offline(lookup) {
        let repo = cache.repo(repo);
        let cached = needed.iter().find_map(|needed| repo.get(needed));
        return snapshot(cached.ok_or_else(|| {
            let needed = needed.join("` or `");
            format!("`{needed}` of revision `{revision}` is not in the cache `{}`, and offline mode forbids downloading it", path.display())
        })?);
    }
    let mut builder = hf_hub::api::sync::ApiBuilder::from_cache(cache).with_token(token());
    if let Some(endpoint) = env("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint);
    }
    let api = builder.build().map_err(|e| e.to_string())?.repo(repo);
    let info = api.info().map_err(|e| format!("cannot be looked up on the Hub: {e}"))?;
    let all: Vec<&str> = info.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
    let mut files = all.clone();
    files.retain(|file| wanted(file, &all));
    // A data set's tars last: the number of them tells later whether all came.
    files.sort_by_key(|file| file.ends_with(".tar"));
    let mut found = None;
    for file in files {
        let path = api.get(file).map_err(|e| format!("cannot download `{file}`: {e}"))?;
        if needed.contains(&file) {
            found = Some(path);
        }
    }
    snapshot(found.ok_or_else(|| format!("has no `{}`", needed.join("` or `")))?)
}
