//! Models and data sets from the Hub: downloaded from a server on this machine that answers as the
//! Hub does, then found again without it.

mod fixture;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use fixture::path;
use radapt::data::{LabelledSet, OpenOptions};
use radapt::model::Lookup;
use serde_json::json;

/// What was asked for: the request line and the authorization header.
type Log = Arc<Mutex<Vec<(String, String)>>>;

/// Serves the model `tiny/llava` from the fixture; returns the endpoint and the log.
fn hub() -> (String, Log) {
    serve("models/tiny/llava", path("llava/v4"))
}

/// Serves the repository `models/NAME` or `datasets/NAME` from a folder.
fn serve(repository: &'static str, folder: PathBuf) -> (String, Log) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    let log = Log::default();
    let kept = log.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that goes away early is its own affair.
            let _ = answer(stream, repository, &folder, &kept);
        }
    });
    (endpoint, log)
}

/// The files in a folder and in the folders in it.
fn files(folder: &Path, inner: &str) -> Vec<String> {
    let names = std::fs::read_dir(folder.join(inner)).expect("a folder").flatten();
    let names = names.map(|entry| format!("{inner}{}", entry.file_name().to_string_lossy()));
    let below = |name: String| match folder.join(&name).is_dir() {
        true => files(folder, &format!("{name}/")),
        false => vec![name],
    };
    names.flat_map(below).collect()
}

fn answer(mut stream: TcpStream, repository: &str, folder: &Path, log: &Log) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let (mut authorization, mut first_byte_only, mut start) = (String::new(), false, 0);
    for line in lines.by_ref() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(": ").unwrap_or((&line, ""));
        match name.to_ascii_lowercase().as_str() {
            "authorization" => authorization = value.to_string(),
            "range" => {
                first_byte_only = value == "bytes=0-0";
                start = value
                    .trim_start_matches("bytes=")
                    .split('-')
                    .next()
                    .and_then(|n| n.parse().ok())
                    .unwrap_or(0);
            }
            _ => {}
        }
    }
    log.lock().expect("the log").push((request.clone(), authorization));
    let route = request.split(' ').nth(1).unwrap_or_default();
    if route == format!("/api/{repository}/revision/main") {
        let names = files(folder, "").into_iter().chain(["README.md", "pytorch_model.bin"].map(String::from));
        let siblings: Vec<_> = names.map(|name| json!({ "rfilename": name })).collect();
        let body = json!({ "sha": "0123abcd", "siblings": siblings }).to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
    }
    // Models lie at the root, data sets below their kind.
    let root = format!("/{}/resolve/main/", repository.trim_start_matches("models/"));
    let name = route.strip_prefix(&root).filter(|name| !name.contains(".."));
    let Some(bytes) = name.and_then(|name| std::fs::read(folder.join(name)).ok()) else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    };
    let part = if first_byte_only { &bytes[..1] } else { &bytes[start..] };
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\netag: \"{:x}-{}\"\r\nx-repo-commit: 0123abcd\r\n\
         content-range: bytes {start}-{}/{}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        bytes.len(),
        name.unwrap_or_default().len(),
        start + part.len() - 1,
        bytes.len(),
        part.len()
    )?;
    stream.write_all(part)
}

fn extract(home: &Path, endpoint: &str, extra: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(["anchor", "extract", "--model", "tiny/llava", "--out"])
        .arg(home.join("anchor.safetensors"))
        .args(extra)
        .env_remove("HF_HUB_CACHE")
        .env_remove("HF_HUB_OFFLINE")
        .env("HF_HOME", home)
        .env("HF_ENDPOINT", endpoint)
        .env("HF_TOKEN", "secret")
        .output()
        .expect("the command runs")
}

#[test]
fn a_hub_model_is_downloaded_once_with_the_users_token_and_then_found_offline() {
    let home = tempfile::tempdir().expect("a folder");
    let (endpoint, log) = hub();
    let output = extract(home.path(), &endpoint, &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let asked = log.lock().expect("the log").clone();
    assert!(asked.iter().any(|(request, _)| request.contains("/model.safetensors")), "{asked:?}");
    assert!(asked.iter().all(|(_, authorization)| authorization == "Bearer secret"), "{asked:?}");
    let unwanted = ["README.md", "pytorch_model.bin"];
    assert!(
        !asked.iter().any(|(request, _)| unwanted.iter().any(|name| request.contains(name))),
        "{asked:?}"
    );

    // A second time no file is fetched, and offline nothing is asked at all.
    assert!(extract(home.path(), &endpoint, &[]).status.success());
    let again = log.lock().expect("the log").split_off(asked.len());
    assert!(!again.iter().any(|(request, _)| request.contains("/resolve/")), "{again:?}");
    assert!(extract(home.path(), "http://127.0.0.1:9", &["--offline"]).status.success());
}

#[test]
fn an_openclip_repository_guides_an_anchor() {
    let home = tempfile::tempdir().expect("a folder");
    let (endpoint, log) = serve("models/tiny/fare", path("guide/openclip"));
    let guide = |endpoint: &str, extra: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_radapt"))
            .args(["anchor", "guide", "--from", "tiny/fare", "--json", "--out"])
            .arg(home.path().join("anchor.safetensors"))
            .arg("--model")
            .arg(path("clip/v4"))
            .args(extra)
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_HUB_OFFLINE")
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", endpoint)
            .output()
            .expect("the command runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON")
    };
    let made = guide(&endpoint, &[]);
    let name = made["radapt.guide_model"].as_str().expect("a name");
    assert!(name.starts_with("tiny/fare@0123abcd sha256:"), "{name}");
    let asked = log.lock().expect("the log").clone();
    assert!(asked.iter().any(|(request, _)| request.contains("/open_clip_pytorch_model.bin")), "{asked:?}");
    // A second copy of the weights, in another format or other names, is not fetched.
    assert!(!asked.iter().any(|(request, _)| request.contains("/pytorch_model.bin")), "{asked:?}");
    assert_eq!(guide("http://127.0.0.1:9", &["--offline"])["sha256"], made["sha256"]);
}

#[test]
fn a_hub_that_does_not_answer_is_one_clear_line() {
    let home = tempfile::tempdir().expect("a folder");
    let (endpoint, _) = hub();
    for (endpoint, revision) in [("http://127.0.0.1:9", "main"), (&endpoint, "no-such-branch")] {
        let output = extract(home.path(), endpoint, &["--revision", revision]);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.starts_with("error: model `tiny/llava`: cannot be looked up on the Hub"), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

// --- Data sets -----------------------------------------------------------------------------------

/// What a call of the test below by itself is to find; the Hub's variables are a process's own.
const FIND: &str = "RADAPT_TEST_FIND";

#[test]
fn a_data_set_is_downloaded_whole_and_then_found_offline() {
    if let Ok(name) = std::env::var(FIND) {
        match LabelledSet::find(&name, &OpenOptions::default(), &Lookup::default()) {
            Ok(set) => println!("FOUND {} {} {:?}", set.name(), set.items().len(), set.classes()),
            Err(error) => println!("ERROR {error}"),
        }
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir_all(folder.path().join("train")).expect("a folder");
    let put = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).expect("written");
    std::fs::create_dir_all(folder.path().join("test")).expect("a folder");
    put("classnames.txt", b"cat\ndog\n");
    put("train/0.tar", b"another split");
    put("test/nshards.txt", b"2");
    for (name, label) in [("test/0.tar", "0"), ("test/1.tar", "1")] {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, bytes) in [("s0.webp", "a picture"), ("s0.cls", label)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, name, bytes.as_bytes()).expect("written");
        }
        put(name, &tar.into_inner().expect("written"));
    }
    let home = tempfile::tempdir().expect("a folder");
    let (endpoint, log) = serve("datasets/tiny/wds_toy", folder.path().to_path_buf());
    let find = |name: &str, offline: &str| {
        let output = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "a_data_set_is_downloaded_whole_and_then_found_offline", "--nocapture"])
            .env_remove("HF_HUB_CACHE")
            .env(FIND, name)
            .env("HF_HUB_OFFLINE", offline)
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", &endpoint)
            .output()
            .expect("it runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let found = "FOUND wds_toy 2 [\"cat\", \"dog\"]";
    let first = find("tiny/wds_toy", "1");
    assert!(
        first.contains("ERROR data `tiny/wds_toy`: `classnames.txt` of revision `main` is not in"),
        "{first}"
    );
    let first = find("tiny/wds_toy", "");
    assert!(first.contains(found), "{first}");
    let asked = log.lock().expect("the log").clone();
    let about = |part: &str| asked.iter().any(|(request, _)| request.contains(part));
    assert!(about("/test/0.tar") && !about("/train/") && !about("README"), "{asked:?}");
    let offline = find("tiny/wds_toy", "1");
    assert!(offline.contains(found), "{offline}");
    assert_eq!(log.lock().expect("the log").len(), asked.len());

    // A download that did not come to its end is told from a whole one.
    let missing =
        files(home.path(), "").into_iter().find(|file| file.ends_with("test/1.tar")).expect("it came");
    std::fs::remove_file(home.path().join(missing)).expect("removed");
    let cut = find("tiny/wds_toy", "1");
    assert!(cut.contains("has 1 tars, but `nshards.txt` says 2"), "{cut}");
    for (name, part) in [
        ("tiny/other", "ERROR data `tiny/other`: cannot be looked up on the Hub"),
        ("caltech256", "ERROR data `caltech256`: no WebDataset of Caltech-256 is known"),
        ("nothing", "ERROR data `nothing`: no such file or folder, no registered set"),
    ] {
        let stdout = find(name, "");
        assert!(stdout.contains(part), "{stdout}");
    }
}
