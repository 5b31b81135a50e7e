//! Models from the Hub: downloaded from a server on this machine that answers as the Hub does,
//! then found again without it.

mod fixture;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use fixture::path;
use serde_json::json;

/// What was asked for: the request line and the authorization header.
type Log = Arc<Mutex<Vec<(String, String)>>>;

/// Serves `tiny/llava` from the fixture; returns the endpoint and the log.
fn hub() -> (String, Log) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    let log = Log::default();
    let kept = log.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A client that goes away early is its own affair.
            let _ = answer(stream, &kept);
        }
    });
    (endpoint, log)
}

fn answer(mut stream: TcpStream, log: &Log) -> std::io::Result<()> {
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
    if route == "/api/models/tiny/llava/revision/main" {
        let names = std::fs::read_dir(path("llava/v4"))?
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned());
        let names = names.chain(["README.md", "pytorch_model.bin"].map(String::from));
        let siblings: Vec<_> = names.map(|name| json!({ "rfilename": name })).collect();
        let body = json!({ "sha": "0123abcd", "siblings": siblings }).to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let name = route
        .strip_prefix("/tiny/llava/resolve/main/")
        .filter(|name| Path::new(name).components().count() == 1);
    let Some(bytes) = name.and_then(|name| std::fs::read(path("llava/v4").join(name)).ok()) else {
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
