//! A running `radapt serve` and plain HTTP to it.
#![allow(dead_code, reason = "each test file uses a part of this")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

/// A running server; dropped, it is stopped.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: String,
    log: tempfile::NamedTempFile,
}

impl Server {
    /// Starts `radapt serve` with these flags, on a free port: this build's, or the binary that
    /// `RADAPT_TEST_BINARY` names.
    pub fn start(flags: &[&str]) -> Self {
        Self::start_with(flags, &[])
    }

    /// The same with variables of its environment.
    pub fn start_with(flags: &[&str], variables: &[(&str, String)]) -> Self {
        let log = tempfile::NamedTempFile::new().expect("a file");
        let binary = std::env::var_os("RADAPT_TEST_BINARY").unwrap_or(env!("CARGO_BIN_EXE_radapt").into());
        let mut child = Command::new(binary)
            .args(["serve", "--addr", "127.0.0.1:0", "--json"])
            .args(flags)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .stdout(Stdio::piped())
            .stderr(log.reopen().expect("the file"))
            .spawn()
            .expect("the server starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("its first line");
        let mut server = Self { child, address: String::new(), log };
        let started: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {}", server.log()));
        server.address = started["address"].as_str().expect("an address").to_string();
        server
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has said on stderr.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).expect("its log")
    }

    /// One HTTP/1.1 exchange: status and all behind it.
    pub fn exchange(&self, method: &str, route: &str, kind: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        let length = body.len();
        // It may answer and close before it has read a body that is too large.
        let _ = write!(
            stream,
            "{method} {route} HTTP/1.1\r\nhost: {}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}",
            self.address
        );
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        (status, answer)
    }

    /// One exchange of JSON: status and body.
    pub fn request(&self, method: &str, route: &str, body: &str) -> (u16, String) {
        let (status, answer) = self.exchange(method, route, "application/json", body);
        (status, answer.split_once("\r\n\r\n").map(|(_, body)| body.to_string()).unwrap_or_default())
    }

    pub fn get(&self, route: &str) -> (u16, Value) {
        let (status, text) = self.request("GET", route, "");
        (status, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
    }

    pub fn post(&self, route: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.request("POST", route, &body.to_string());
        (status, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
    }

    pub fn chat(&self, body: &Value) -> (u16, Value) {
        self.post("/v1/chat/completions", body)
    }

    /// The events of a streamed answer as they were sent.
    pub fn events(&self, route: &str, body: &Value) -> Vec<String> {
        let mut body = body.clone();
        body["stream"] = true.into();
        self.event_stream(route, &body)
    }

    /// The events of an answer that is always a stream.
    pub fn event_stream(&self, route: &str, body: &Value) -> Vec<String> {
        let (status, text) = self.request("POST", route, &body.to_string());
        assert_eq!(status, 200, "{text}");
        text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_string).collect()
    }

    /// The chunks of a streamed chat completion, which ends as it should.
    pub fn chunks(&self, body: &Value) -> Vec<Value> {
        let events = self.events("/v1/chat/completions", body);
        assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The Python to use, if it has these packages; otherwise says so.
pub fn python(packages: &str) -> Option<String> {
    let python = std::env::var("RADAPT_PYTHON").unwrap_or_else(|_| "python3".into());
    let there = Command::new(&python)
        .args(["-c", &format!("import {packages}")])
        .output()
        .is_ok_and(|output| output.status.success());
    if there {
        return Some(python);
    }
    eprintln!("SKIPPED: `{python}` cannot import {packages}; set RADAPT_PYTHON to one that can");
    None
}
