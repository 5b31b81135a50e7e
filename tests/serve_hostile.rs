//! `radapt serve` against hostile askers, over sockets: each gets a 4xx or a closed connection, none
//! makes it reach an address or a file, and afterwards it answers as before.
//!
//! What needs a network of its own (redirects, rebinding, broken hosts) is in `intake.rs`.
#![cfg(feature = "engine")]

mod hostile;
mod serving;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hostile::{Case, INSIDE, Input, LIMITS, data_url, pictures};
use serde_json::{Value, json};
use serving::Server;

const CHAT: &str = "/v1/chat/completions";
/// Of a body, as the limits on pictures have it.
const MAX_BODY: usize = 3 << 20;
/// MiB that the server may take on top of what it takes at rest: pictures, bodies, requests in flight.
const BOUND: u64 = 400;

/// A server of the pocket model with limits like those of the cases, and short patience.
struct Target {
    server: Server,
    at_rest: u64,
}

impl Target {
    fn start(extra: &[&str]) -> Self {
        Self::start_with(extra, &[])
    }

    fn start_with(extra: &[&str], variables: &[(&str, String)]) -> Self {
        let (bytes, pixels, memory) =
            (LIMITS.max_bytes.to_string(), LIMITS.max_pixels.to_string(), LIMITS.max_memory.to_string());
        let limits = [
            ["--max-image-bytes", &bytes],
            ["--max-pixels", &pixels],
            ["--max-image-memory", &memory],
            ["--picture-memory", "67108864"],
            ["--header-time", "2"],
            ["--body-time", "3"],
        ];
        Self::run(&[limits.as_flattened(), extra].concat(), variables)
    }

    fn run(flags: &[&str], variables: &[(&str, String)]) -> Self {
        let target = Self { server: Server::start_with(flags, variables), at_rest: 0 };
        target.answers();
        Self { at_rest: target.memory("VmRSS"), ..target }
    }

    /// A good request has its answer, soon.
    fn answers(&self) {
        let start = Instant::now();
        let (status, answer) = self.server.chat(&good());
        assert_eq!(status, 200, "{answer}");
        assert!(answer["choices"][0]["message"]["content"].is_string(), "{answer}");
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    }

    /// MiB of the server's process; zero where the system does not say.
    fn memory(&self, key: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.server.id())).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) >> 10
    }

    /// After everything: it answers, has not panicked, and its memory was bounded.
    fn unharmed(&self, what: &str) {
        self.answers();
        let log = self.server.log();
        assert!(!log.contains("panicked"), "{log}");
        let peak = self.memory("VmHWM");
        println!("{what}: {} MiB at rest, at most {peak} MiB", self.at_rest);
        assert!(peak <= self.at_rest + BOUND, "{what}: {} MiB at rest, at most {peak} MiB", self.at_rest);
    }

    /// Sends bytes and reads until the server closes.
    fn send(&self, bytes: &[u8]) -> Outcome {
        let mut stream = TcpStream::connect(&self.server.address).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        stream.set_write_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        // It may answer and close before it has read all.
        let _ = stream.write_all(bytes);
        read(stream)
    }

    /// Sends all of these, several at a time; what is not turned away is told, with how many there
    /// were of each outcome.
    fn refuses(&self, cases: Vec<(String, Vec<u8>, Expected)>) {
        let (next, cases) = (AtomicUsize::new(0), &cases);
        let counts = Mutex::new(BTreeMap::<String, usize>::new());
        let wrong = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..12 {
                scope.spawn(|| {
                    while let Some((name, bytes, expected)) = cases.get(next.fetch_add(1, Ordering::Relaxed))
                    {
                        let outcome = self.send(bytes);
                        *counts.lock().unwrap().entry(outcome.label()).or_default() += 1;
                        if let Err(reason) = outcome.check(expected) {
                            let start = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
                            wrong.lock().unwrap().push(format!("{name}: {reason}\n    {start:?}"));
                        }
                    }
                });
            }
        });
        println!("{} cases: {:?}", cases.len(), counts.into_inner().unwrap());
        let wrong = wrong.into_inner().unwrap();
        assert!(wrong.is_empty(), "{} went wrong:\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// What came of it.
enum Outcome {
    /// Closed, without a word.
    Closed,
    /// All that was sent back.
    Said(String),
    /// Neither an answer nor an end.
    Open,
}

#[derive(Clone, Copy)]
enum Expected {
    /// Any 4xx in OpenAI's shape.
    Refused,
    /// This status in OpenAI's shape.
    Status(u16),
    /// Any 4xx, or a closed connection: it is no HTTP.
    Ended,
}

fn read(mut stream: TcpStream) -> Outcome {
    let mut found = Vec::new();
    let mut part = [0; 8192];
    loop {
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(n) => found.extend(&part[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Outcome::Open;
            }
            // It had closed while there was more to come.
            Err(_) => break,
        }
    }
    match found.is_empty() {
        true => Outcome::Closed,
        false => Outcome::Said(String::from_utf8_lossy(&found).into_owned()),
    }
}

impl Outcome {
    fn status(&self) -> u16 {
        match self {
            Self::Said(text) => text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0),
            _ => 0,
        }
    }

    fn label(&self) -> String {
        match self {
            Self::Closed => "closed".into(),
            Self::Open => "left open".into(),
            Self::Said(_) => self.status().to_string(),
        }
    }

    fn check(&self, expected: &Expected) -> Result<(), String> {
        let text = match (self, expected) {
            (Self::Open, _) => return Err("neither an answer nor an end".into()),
            (Self::Closed, Expected::Ended) => return Ok(()),
            // Its answer is lost where it closed before all was read.
            (Self::Closed, Expected::Status(413)) => return Ok(()),
            (Self::Closed, _) => return Err("closed without an answer".into()),
            (Self::Said(text), _) => text,
        };
        let short: String = text.chars().take(600).collect();
        let status = self.status();
        if !(400..500).contains(&status) || status == 429 {
            return Err(format!("status {status}: {short}"));
        }
        if text.matches("HTTP/1.1 ").count() != 1 {
            return Err(format!("more than one answer: {short}"));
        }
        match expected {
            Expected::Ended => return Ok(()),
            Expected::Status(code) if *code != status => {
                return Err(format!("status {status} instead of {code}: {short}"));
            }
            _ => {}
        }
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let error = serde_json::from_str::<Value>(body).unwrap_or_default();
        let message = error["error"]["message"].as_str().ok_or_else(|| format!("no error: {short}"))?;
        if message.is_empty() || text.len() > 4000 {
            return Err(format!("{} bytes of an error: {short}", text.len()));
        }
        for inside in ["root:", "os error", "/root/", ".rs:", "thread '", "RUST_BACKTRACE"] {
            if message.contains(inside) {
                return Err(format!("it tells of `{inside}`: {short}"));
            }
        }
        Ok(())
    }
}

fn good() -> Value {
    let dot = data_url(&pictures::png(1, 1, 0, &[pictures::dot()]));
    question(&[&dot])
}

fn question(urls: &[&str]) -> Value {
    let pictures = urls.iter().map(|url| json!({ "type": "image_url", "image_url": { "url": url } }));
    let text = json!({ "type": "text", "text": "What is it?" });
    let parts: Vec<Value> = pictures.chain([text]).collect();
    json!({ "model": "pocket", "max_tokens": 4, "messages": [{ "role": "user", "content": parts }] })
}

/// The same for the responses API.
fn input(url: &str) -> Value {
    let parts =
        json!([{ "type": "input_image", "image_url": url }, { "type": "input_text", "text": "What?" }]);
    json!({ "model": "pocket", "max_output_tokens": 4, "input": [{ "role": "user", "content": parts }] })
}

fn post(route: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST {route} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// A request of each case, in either API.
fn requests(cases: Vec<Case>) -> Vec<(String, Vec<u8>, Expected)> {
    let requests = cases.into_iter().enumerate().map(|(i, case)| {
        let url = match case.input {
            Input::Url(url) => url,
            Input::Bytes(bytes) => data_url(&bytes),
        };
        let body = match i % 4 {
            0 => input(&url),
            _ => question(&[&url]),
        };
        let (route, body) = (if i % 4 == 0 { "/v1/responses" } else { CHAT }, body.to_string());
        let status = if body.len() > MAX_BODY { 413 } else { case.expected.status() };
        (case.name, post(route, body.as_bytes()), Expected::Status(status))
    });
    requests.collect()
}

#[test]
fn hostile_pictures_and_urls_are_refused() {
    let target = Target::start(&[]);
    target.refuses(requests(hostile::files()));
    target.refuses(requests(hostile::data_urls()));
    target.refuses(requests(hostile::schemes()));
    // Nothing is fetched where no host is allowed.
    let closed = INSIDE.split_whitespace().map(|host| {
        let body = question(&[&format!("https://{host}/a.png")]).to_string();
        (host.to_string(), post(CHAT, body.as_bytes()), Expected::Status(400))
    });
    target.refuses(closed.collect());
    target.unharmed("pictures");
}

/// A picture that is there, by every way to write its path; what is said of it is said of one that is
/// not there.
#[test]
fn no_file_is_read() {
    let target = Target::start(&["--fetch", "*"]);
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("there.png");
    std::fs::write(&there, pictures::png(1, 1, 0, &[pictures::dot()])).unwrap();
    let here = std::env::current_dir().unwrap();
    let up = "../".repeat(here.components().count() + 2);
    let answers = |path: &str| -> Vec<(String, u16, String)> {
        let forms = [
            path.to_string(),
            format!("file://{path}"),
            format!("file:{path}"),
            format!("FILE://localhost{path}"),
            format!("file://127.0.0.1{path}"),
            format!("file:///%2e%2e{path}"),
            format!("{up}{path}"),
            format!("./{path}"),
            format!("//localhost{path}"),
            format!("{path}\0.png"),
            format!("{path}%00"),
            format!("https://{path}"),
            format!("https:{path}"),
            format!("https://localhost{path}"),
            format!("https://file{path}"),
            format!("data:{path}"),
            format!("data:image/png;base64,{path}"),
            format!("data:image/png;base64,file://{path}"),
            format!("data:,@{path}"),
            format!("@{path}"),
            format!("|cat {path}"),
            format!("$(cat {path})"),
            format!("/proc/self/root{path}"),
            format!("/dev/fd/0{path}"),
            format!("local:{path}"),
            format!("mmap:{path}"),
            format!("\\\\?\\{path}"),
            format!("~{path}"),
        ];
        let ask = |form: String| {
            let (status, answer) = target.server.chat(&question(&[&form]));
            (form, status, answer["error"]["message"].as_str().unwrap_or_default().to_string())
        };
        forms.into_iter().map(ask).collect()
    };
    let (there, absent) =
        (there.display().to_string(), folder.path().join("after.png").display().to_string());
    for ((form, status, message), (_, other, absent)) in answers(&there).into_iter().zip(answers(&absent)) {
        assert!((400..500).contains(&status) && !message.is_empty(), "{form:?}: {status} {message}");
        assert_eq!((status, message), (other, absent), "{form:?}");
    }
    target.unharmed("paths");
}

/// A listener that nobody should come to.
struct Trap(Arc<AtomicUsize>, u16);

impl Trap {
    fn set(address: &str) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let (count, port) = (Arc::new(AtomicUsize::new(0)), listener.local_addr()?.port());
        let counted = count.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                counted.fetch_add(1, Ordering::SeqCst);
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        Ok(Self(count, port))
    }

    fn caught(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

#[test]
fn no_address_inside_is_reached() {
    let trap = Trap::set("127.0.0.1:0").unwrap();
    // The port that is asked for where a URL names none; not everybody may listen there.
    let privileged: Vec<_> = ["127.0.0.1:443", "[::1]:443"].map(Trap::set).into_iter().flatten().collect();
    if privileged.is_empty() {
        eprintln!("SKIPPED: no trap on port 443, where this user may not listen; other ports are watched");
    }
    let proxy = format!("http://127.0.0.1:{}", trap.1);
    let names = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"];
    let variables: Vec<_> = names.iter().map(|name| (*name, proxy.clone())).collect();

    let open = Target::start_with(&["--fetch", "*"], &variables);
    let mut urls: Vec<String> = Vec::new();
    for host in INSIDE.split_whitespace().chain(["localhost", "LOCALHOST.", "localhost.localdomain"]) {
        for rest in ["/a.png".to_string(), format!(":{}/a.png", trap.1), ":443/a.png".to_string()] {
            urls.push(format!("https://{host}{rest}"));
        }
        urls.push(format!("https://example.org@{host}/a.png"));
        urls.push(format!("https://example.org:443@{host}:{}/", trap.1));
        urls.push(format!("http://{host}:{}/", trap.1));
        urls.push(format!("//{host}:{}/", trap.1));
    }
    let cases = urls
        .iter()
        .map(|url| (url.clone(), post(CHAT, question(&[url]).to_string().as_bytes()), Expected::Status(400)));
    open.refuses(cases.collect());
    open.refuses(requests(hostile::urls()));
    open.refuses(requests(hostile::schemes()));
    let (_, metrics) = open.server.request("GET", "/metrics", "");
    let private = metrics.lines().find(|line| line.contains("reason=\"private_address\"")).unwrap();
    let count: usize = private.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(count >= 2 * INSIDE.split_whitespace().count(), "{private}");
    open.unharmed("addresses");

    let listed = Target::start_with(&["--fetch", "pics.example.org,*.example.org"], &variables);
    let hosts = INSIDE.split_whitespace().chain([
        "evil.test",
        "pics.example.org.evil.test",
        "evilexample.org",
        "localhost",
        "8.8.8.8",
    ]);
    let cases = hosts.map(|host| {
        let body = question(&[&format!("https://{host}/a.png")]).to_string();
        (host.to_string(), post(CHAT, body.as_bytes()), Expected::Status(400))
    });
    listed.refuses(cases.collect());
    listed.unharmed("hosts");

    assert_eq!(trap.caught(), 0, "somebody came");
    assert_eq!(privileged.iter().map(Trap::caught).sum::<usize>(), 0, "somebody came");
}

/// Bodies that are no request, or too much of one.
fn bodies() -> Vec<(String, Vec<u8>, Expected)> {
    use Expected::{Refused, Status};
    let mut cases: Vec<(String, Vec<u8>, Expected)> = Vec::new();
    let dot = data_url(&pictures::png(1, 1, 0, &[pictures::dot()]));
    let deep = |open: &str, close: &str, n: usize| format!("{}{}", open.repeat(n), close.repeat(n));
    let with = |field: &str, value: &str| {
        format!(
            r#"{{"model":"pocket","max_tokens":4,"messages":[{{"role":"user","content":"x"}}],"{field}":{value}}}"#
        )
    };
    let text = |value: &str| {
        format!(r#"{{"model":"pocket","max_tokens":4,"messages":[{{"role":"user","content":{value}}}]}}"#)
    };
    for (name, body) in [
        ("nothing", String::new()),
        ("white space", " ".repeat(1 << 20)),
        ("null", "null".into()),
        ("a number", "1e999999".into()),
        ("a text", "\"model\"".into()),
        ("an empty list", "[]".into()),
        ("an empty object", "{}".into()),
        ("half an object", "{\"model\":\"pocket\"".into()),
        ("two objects", format!("{0}{0}", with("n", "1"))),
        ("a comment", format!("/* */{}", with("n", "1"))),
        ("a trailing comma", r#"{"model":"pocket",}"#.into()),
        ("single quotes", "{'model':'pocket'}".into()),
        ("a byte order mark", format!("\u{feff}{}", with("n", "1"))),
        ("nested lists", deep("[", "]", 500_000)),
        ("nested lists that do not end", "[".repeat(1 << 20)),
        ("nested objects", deep("{\"a\":", "}", 200_000)),
        ("nested content", text(&deep("[", "]", 200_000))),
        ("nested parts", text(&deep("[{\"type\":", "}]", 1000))),
        ("nested metadata", with("metadata", &deep("{\"a\":", "}", 1000))),
        ("a long key", with(&"k".repeat(1 << 20), "1")),
        (
            "many keys",
            format!("{{{}\"z\":1}}", (0..200_000).map(|i| format!("\"{i}\":1,")).collect::<String>()),
        ),
        ("the same key twice", with("model", "\"pocket\"")),
        ("a long model", format!(r#"{{"model":"{}","messages":[]}}"#, "m".repeat(1 << 20))),
        (
            "a model of line feeds",
            r#"{"model":"\r\nx: y\r\n","messages":[{"role":"user","content":"x"}]}"#.into(),
        ),
        (
            "a model that is a path",
            r#"{"model":"../../etc/passwd","messages":[{"role":"user","content":"x"}]}"#.into(),
        ),
        (
            "a long role",
            format!(
                r#"{{"model":"pocket","messages":[{{"role":"{}","content":"x"}}]}}"#,
                "r".repeat(1 << 20)
            ),
        ),
        ("half a pair of surrogates", text(r#""\ud800""#)),
        ("a zero as it is", text("\"\0\"")),
        ("a tab as it is", text("\"\t\n\"")),
        ("an escape that is none", text(r#""\x41""#)),
        ("a text beyond the model", text(&format!("\"{}\"", "word ".repeat(200_000)))),
        ("100,000 empty texts", text(&format!("[{}]", vec![r#"{"type":"text"}"#; 100_000].join(",")))),
        ("an empty list of parts", text("[]")),
        ("a picture that is a number", text(r#"[{"type":"image_url","image_url":{"url":7}}]"#)),
        ("a picture that is a list", text(r#"[{"type":"image_url","image_url":["a"]}]"#)),
        (
            "a picture within a picture",
            text(r#"[{"type":"image_url","image_url":{"url":{"url":"data:,"}}}]"#),
        ),
        (
            "a picture by two names",
            text(&format!(r#"[{{"type":"image_url","image_url":{{"url":"{dot}","file":"/etc/passwd"}}}}]"#)),
        ),
        ("a file", text(r#"[{"type":"file","file":{"file_id":"/etc/passwd"}}]"#)),
        ("a sound", text(r#"[{"type":"input_audio","input_audio":{"data":"AAAA","format":"wav"}}]"#)),
        ("a video", text(r#"[{"type":"video_url","video_url":{"url":"file:///etc/passwd"}}]"#)),
    ] {
        cases.push((format!("body of {name}"), post(CHAT, body.as_bytes()), Refused));
    }
    for (field, values) in [
        ("max_tokens", &["-1", "0", "1e99", "18446744073709551616", "1.5", "\"4\"", "[4]", "1000000"][..]),
        ("n", &["0", "-1", "1000000000", "1e400", "true"]),
        ("temperature", &["-1", "2.1", "1e308", "1e999", "NaN", "Infinity", "\"hot\""]),
        ("top_p", &["0", "-1", "1.1", "null0"]),
        ("seed", &["1.5", "9223372036854775808", "\"x\""]),
        ("stop", &["[\"\"]", "[\"a\",\"b\",\"c\",\"d\",\"e\"]", "7", "[[\"a\"]]"]),
        ("logit_bias", &["{\"a\":1}", "{\"1\":1e9}", "{\"-1\":1}", "{\"4294967296\":1}", "[1]"]),
        ("top_logprobs", &["21", "-1", "1000000", "5"]),
        ("metadata", &["{\"a\":{}}", "[]"]),
        ("service_tier", &["\"priority\"", "7"]),
        ("store", &["true", "\"no\""]),
        ("stream", &["\"yes\"", "2"]),
        ("stream_options", &["{\"include_usage\":true}", "7"]),
        ("audio", &["{\"voice\":\"x\"}"]),
        ("functions", &["[{\"name\":\"x\"}]"]),
        ("modalities", &["[\"audio\"]"]),
        ("web_search_options", &["{}"]),
        ("prediction", &["{\"type\":\"content\"}"]),
        ("tool_choice", &["\"required\"", "{\"type\":\"function\"}"]),
        ("__proto__", &["{\"admin\":true}"]),
    ] {
        for value in values {
            let short: String = value.chars().take(24).collect();
            cases.push((format!("{field} of {short}"), post(CHAT, with(field, value).as_bytes()), Refused));
        }
    }
    let schema = |schema: &str| {
        with(
            "response_format",
            &format!(r#"{{"type":"json_schema","json_schema":{{"name":"x","schema":{schema}}}}}"#),
        )
    };
    for (name, body) in [
        ("a kind that is none", schema(r#"{"type":"nothing"}"#)),
        ("a reference outside", schema(r#"{"$ref":"https://127.0.0.1/x"}"#)),
        ("a reference to a file", schema(r#"{"$ref":"file:///etc/passwd"}"#)),
        ("a reference to itself", schema(r##"{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/a"}}}"##)),
        (
            "100,000 words",
            schema(&format!(
                "{{\"enum\":[{}]}}",
                (0..100_000).map(|i| format!("\"{i}\"")).collect::<Vec<_>>().join(",")
            )),
        ),
        (
            "a deep schema",
            schema(&format!("{}{{}}{}", r#"{"type":"array","items":"#.repeat(5000), "}".repeat(5000))),
        ),
        ("a pattern that is none", schema(r#"{"type":"string","pattern":"((("}"#)),
        ("no name", with("response_format", r#"{"type":"json_schema","json_schema":{"schema":{}}}"#)),
        ("a schema that is a list", schema("[]")),
        (
            "129 tools",
            with(
                "tools",
                &format!(
                    "[{}]",
                    (0..129)
                        .map(|i| format!(r#"{{"type":"function","function":{{"name":"f{i}"}}}}"#))
                        .collect::<Vec<_>>()
                        .join(",")
                ),
            ),
        ),
        (
            "a tool of a long name",
            with(
                "tools",
                &format!(r#"[{{"type":"function","function":{{"name":"{}"}}}}]"#, "f".repeat(1 << 20)),
            ),
        ),
    ] {
        cases.push((format!("schema of {name}"), post(CHAT, body.as_bytes()), Refused));
    }
    // Pictures without number.
    let part = json!({ "type": "image_url", "image_url": { "url": dot } });
    let many = |messages: Vec<Value>| {
        json!({ "model": "pocket", "max_tokens": 4, "messages": messages }).to_string()
    };
    let user = |parts: Vec<Value>| json!({ "role": "user", "content": parts });
    let answer = json!({ "role": "assistant", "content": "A dot." });
    let spread: Vec<Value> = (0..9).flat_map(|_| [user(vec![part.clone()]), answer.clone()]).collect();
    for (name, body) in [
        ("9 pictures", many(vec![user(vec![part.clone(); 9])])),
        ("10,000 pictures", many(vec![user(vec![part.clone(); 10_000])])),
        (
            "9 pictures over 9 messages",
            many([spread, vec![user(vec![json!({ "type": "text", "text": "?" })])]].concat()),
        ),
        ("5,000 pictures over 5,000 messages", many(vec![user(vec![part.clone()]); 5000])),
        (
            "a picture of the assistant's",
            many(vec![json!({ "role": "assistant", "content": [part.clone()] }), user(vec![part.clone()])]),
        ),
        (
            "a picture of the system's",
            many(vec![json!({ "role": "system", "content": [part.clone()] }), user(vec![part])]),
        ),
    ] {
        cases.push((name.into(), post(CHAT, body.as_bytes()), Refused));
    }
    let tiny = json!({ "type": "input_image", "image_url": dot });
    let items = json!({ "model": "pocket", "input": [{ "role": "user", "content": vec![tiny; 10_000] }] });
    cases.push((
        "10,000 pictures of a response".into(),
        post("/v1/responses", items.to_string().as_bytes()),
        Refused,
    ));
    // Bytes that are no text.
    for (name, bytes) in [
        ("a stray byte", &b"\xff"[..]),
        ("an overlong slash", b"\xc0\xaf"),
        ("a surrogate in UTF-8", b"\xed\xa0\x80"),
        ("half a character", b"\xe2\x82"),
        ("a character beyond the last", b"\xf4\x90\x80\x80"),
    ] {
        let body =
            [&b"{\"model\":\"pocket\",\"messages\":[{\"role\":\"user\",\"content\":\""[..], bytes, b"\"}]}"]
                .concat();
        cases.push((format!("text with {name}"), post(CHAT, &body), Refused));
        cases.push((format!("nothing but {name}"), post(CHAT, bytes), Refused));
    }
    let wide: Vec<u8> = with("n", "1").encode_utf16().flat_map(u16::to_le_bytes).collect();
    cases.push(("a body in UTF-16".into(), post(CHAT, &wide), Refused));
    cases.push(("a body in gzip".into(), post(CHAT, &pictures::gzip(with("n", "1").as_bytes())), Refused));
    cases.push(("a body of zeros".into(), post(CHAT, &[0; 4096]), Refused));
    cases.push(("a body over the limit".into(), post(CHAT, &vec![b' '; MAX_BODY + 1]), Status(413)));
    cases.push((
        "a body of base64 over the limit".into(),
        post(CHAT, STANDARD.encode(vec![0; MAX_BODY]).as_bytes()),
        Status(413),
    ));
    cases
}

#[test]
fn hostile_bodies_are_refused() {
    let target = Target::start(&[]);
    target.refuses(bodies());
    // Of what no answer was begun for, nothing is counted.
    let (_, metrics) = target.server.request("GET", "/metrics", "");
    assert!(metrics.contains("radapt_in_flight 0") && metrics.contains("radapt_waiting 0"), "{metrics}");
    target.unharmed("bodies");
}

/// Of a few bytes each, which take a hundred times that once they are read.
#[test]
fn values_without_number_take_no_memory() {
    // As it comes, it takes bodies of 65 MB.
    let target = Target::run(&[], &[]);
    let start = r#"{"model":"pocket","messages":[{"role":"user","content":"x"}],"x":["#;
    let part = r#"{"model":"pocket","messages":[{"role":"user","content":["#;
    let message = r#"{"model":"pocket","messages":["#;
    let bodies =
        [(start, "1,"), (start, "[],"), (part, "{\"type\":\"\"},"), (message, "{\"role\":\"user\"},")];
    let cases = bodies.map(|(start, value)| {
        let body = start.to_string() + &value.repeat((24 << 20) / value.len());
        (format!("many of {value}"), post(CHAT, body.as_bytes()), Expected::Status(413))
    });
    target.refuses(cases.into());
    target.unharmed("values");
}

/// Bytes that are no HTTP, or HTTP to trick somebody with.
fn messages() -> Vec<(String, Vec<u8>, Expected)> {
    use Expected::{Ended, Refused, Status};
    let mut cases: Vec<(String, Vec<u8>, Expected)> = Vec::new();
    let mut add =
        |name: &str, bytes: &[u8], expected| cases.push((name.to_string(), bytes.to_vec(), expected));
    let body = good().to_string();
    let n = body.len();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n");
    let inner = "GET /metrics HTTP/1.1\r\nhost: h\r\n\r\n";

    // Other protocols.
    let mut hello = vec![0x16, 3, 1, 0, 0xa5, 1, 0, 0, 0xa1, 3, 3];
    hello.extend([7; 154]);
    for (name, bytes) in [
        ("tls", &hello[..]),
        ("old ssl", b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10"),
        ("http/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
        ("http/0.9", b"GET /health\r\n\r\n"),
        ("http/3.0", b"GET /health HTTP/3.0\r\nhost: h\r\n\r\n"),
        ("http/1.10", b"GET /health HTTP/1.10\r\nhost: h\r\n\r\n"),
        ("http in small letters", b"GET /health http/1.1\r\nhost: h\r\n\r\n"),
        ("a proxy's first line", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\nGET /health HTTP/1.1\r\n\r\n"),
        ("a proxy's binary line", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\x01\x7f\0\0\x01\0\x01\0\x02"),
        ("ssh", b"SSH-2.0-OpenSSH_9.9\r\n\r\n"),
        ("socks 5", b"\x05\x01\x00\x05\x01\x00\x01\x7f\0\0\x01\0\x50\r\n\r\n"),
        ("redis", b"*1\r\n$8\r\nFLUSHALL\r\n\r\n"),
        ("memcached", b"stats\r\n\r\n"),
        ("smtp", b"EHLO h\r\nMAIL FROM:<a@b>\r\n\r\n"),
        ("zeros", &[0; 512]),
        ("ones", &[0xff; 512]),
        ("a picture", &pictures::png(1, 1, 0, &[pictures::dot()])),
        ("json without http", body.as_bytes()),
        ("an answer", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
    ] {
        add(name, bytes, Ended);
    }

    // Lengths that do not agree, so that two readers see two requests.
    for (name, fields) in [
        ("two lengths", format!("content-length: {n}\r\ncontent-length: 5\r\n")),
        ("two lengths in one", format!("content-length: {n}, 5\r\n")),
        ("a length of a sign", format!("content-length: +{n}\r\n")),
        ("a length below zero", "content-length: -1\r\n".into()),
        ("a length in hex", format!("content-length: 0x{n:x}\r\n")),
        ("a length of words", "content-length: many\r\n".into()),
        ("a length with a space inside", format!("content-length: 1 {n}\r\n")),
        ("a length beyond numbers", "content-length: 99999999999999999999999\r\n".into()),
        ("an empty length", "content-length:\r\n".into()),
        ("a space before the colon", format!("content-length : {n}\r\n")),
        ("an encoding that is none", format!("transfer-encoding: xchunked\r\ncontent-length: {n}\r\n")),
        ("an encoding after chunked", "transfer-encoding: chunked, identity\r\n".into()),
        ("an encoding twice", "transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n".into()),
        ("a gzip that is not chunked", "transfer-encoding: gzip\r\n".into()),
        ("a name with a space", format!("x y: z\r\ncontent-length: {n}\r\n")),
        ("a name of nothing", format!(": z\r\ncontent-length: {n}\r\n")),
        ("a name in another script", format!("ñ: z\r\ncontent-length: {n}\r\n")),
        ("a line without a colon", format!("nonsense\r\ncontent-length: {n}\r\n")),
        ("a folded line", format!("x: y\r\n z\r\ncontent-length: {n}\r\n")),
        ("a first line that is folded", format!(" x: y\r\ncontent-length: {n}\r\n")),
        ("a zero in a value", format!("x: y\0z\r\ncontent-length: {n}\r\n")),
        ("a return in a value", format!("x: y\rz\r\ncontent-length: {n}\r\n")),
        ("an escape in a value", format!("x: \x1b[2J\r\ncontent-length: {n}\r\n")),
    ] {
        add(name, format!("{head}{fields}\r\n{body}{inner}").as_bytes(), Ended);
    }
    // What is chunked is not counted too, whoever says so.
    let both = format!(
        "{head}content-length: {n}\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n0\r\n\r\n{inner}"
    );
    add("chunks and a length", both.as_bytes(), Ended);
    let other = format!(
        "{head}transfer-encoding: chunked\r\ncontent-length: 4\r\nconnection: close\r\n\r\n5c\r\n{inner}"
    );
    add("chunks and a short length", other.as_bytes(), Ended);
    let get = format!(
        "GET /v1/nothing HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{inner}",
        inner.len()
    );
    add("a request in the body of a GET", get.as_bytes(), Status(404));

    // Chunks.
    for (name, chunks) in [
        ("a chunk of no number", "zz\r\nabc\r\n0\r\n\r\n".to_string()),
        ("a chunk below zero", "-1\r\nabc\r\n0\r\n\r\n".into()),
        ("a chunk beyond numbers", "fffffffffffffffff\r\nabc".into()),
        ("a chunk of 2^64-1", "ffffffffffffffff\r\nabc\r\n".into()),
        ("a chunk with a prefix", "0x5\r\nabcde\r\n0\r\n\r\n".into()),
        ("a chunk that is longer than it says", "3\r\nabcdef\r\n0\r\n\r\n".into()),
        ("a chunk with line feeds alone", "3\nabc\n0\n\n".into()),
        ("a chunk of nothing and then more", format!("0\r\n\r\n{inner}")),
        ("a long extension", format!("3;{}\r\nabc\r\n0\r\n\r\n", "x".repeat(1 << 20))),
        (
            "many extensions",
            format!("{}0\r\n\r\n", "1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\na\r\n".repeat(20_000)),
        ),
        ("many trailers", format!("3\r\nabc\r\n0\r\n{}\r\n", "x: y\r\n".repeat(5000))),
        ("a long trailer", format!("3\r\nabc\r\n0\r\nx: {}\r\n\r\n", "y".repeat(1 << 20))),
        (
            "chunks over the limit",
            format!("{}0\r\n\r\n", format!("10000\r\n{}\r\n", " ".repeat(1 << 16)).repeat(64)),
        ),
        ("chunks of a byte each", format!("{}0\r\n\r\n", "1\r\n \r\n".repeat(100_000))),
    ] {
        add(
            name,
            format!("{head}transfer-encoding: chunked\r\nconnection: close\r\n\r\n{chunks}").as_bytes(),
            Ended,
        );
    }

    // Heads without end.
    let close = "connection: close\r\n";
    for (name, text) in [
        ("65 headers", format!("GET /health HTTP/1.1\r\n{}{close}\r\n", "x: y\r\n".repeat(65))),
        ("100,000 headers", format!("GET /health HTTP/1.1\r\n{}{close}\r\n", "x: y\r\n".repeat(100_000))),
        ("a long header", format!("GET /health HTTP/1.1\r\nx: {}\r\n{close}\r\n", "y".repeat(1 << 20))),
        ("a long name", format!("GET /health HTTP/1.1\r\n{}: y\r\n{close}\r\n", "x".repeat(1 << 20))),
        ("a long path", format!("GET /{} HTTP/1.1\r\n{close}\r\n", "a".repeat(1 << 20))),
        ("a long query", format!("GET /health?{} HTTP/1.1\r\n{close}\r\n", "a".repeat(1 << 20))),
        ("a long method", format!("{} /health HTTP/1.1\r\n{close}\r\n", "A".repeat(1 << 20))),
        ("empty lines", "\r\n".repeat(100_000)),
        ("a path with a space", format!("GET /health x HTTP/1.1\r\n{close}\r\n")),
        ("a path with a zero", format!("GET /health\0 HTTP/1.1\r\n{close}\r\n")),
        ("a method of nothing", format!(" /health HTTP/1.1\r\n{close}\r\n")),
        ("a path of nothing", format!("GET  HTTP/1.1\r\n{close}\r\n")),
    ] {
        add(name, text.as_bytes(), Ended);
    }

    // Routes that are not there, methods that are not theirs, and heads that ask for something else.
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
    for path in [
        "/../../../../etc/passwd",
        "/..%2f..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/.%00./etc/passwd",
        "//etc/passwd",
        "/docs/../../etc/passwd",
        "/docs%2f..%2f..%2fetc%2fpasswd",
        "/openapi.json%00.html",
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2fetc%2fpasswd",
        "/v1/models/%00",
        "/v1/models/%ff%fe",
        "/v1/models/%zz",
        "/v1/models/pocket%0d%0aset-cookie:%20a=b",
        "/v1//models",
        "/V1/models",
        "/health/",
        "/health%20",
        "/.env",
        "/.git/config",
        "/cgi-bin/%%32%65%%32%65/bin/sh",
        "/\\..\\..\\windows\\win.ini",
        "http://127.0.0.1:22/inside",
        "http://169.254.169.254/latest/meta-data/",
        "/v1/chat/completions",
    ] {
        add(&format!("path {path}"), get(path).as_bytes(), Ended);
    }
    for method in ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "PROPFIND", "DEBUG", "get"] {
        let text = format!("{method} {CHAT} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
        add(&format!("method {method}"), text.as_bytes(), Refused);
    }
    add("method CONNECT", b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n", Ended);
    let upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
    add("a websocket", format!("GET {CHAT} HTTP/1.1\r\nhost: h\r\n{upgrade}\r\n").as_bytes(), Ended);
    add("http/2 by upgrade", format!("GET {CHAT} HTTP/1.1\r\nhost: h\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\n").as_bytes(), Ended);
    for (name, fields) in [
        ("no content type", ""),
        ("a form", "content-type: multipart/form-data; boundary=x\r\n"),
        ("a form of names", "content-type: application/x-www-form-urlencoded\r\n"),
        ("plain text", "content-type: text/plain\r\n"),
        ("a picture", "content-type: image/png\r\n"),
        ("a content type that is none", "content-type: \x7f\r\n"),
    ] {
        let text = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: h\r\n{fields}connection: close\r\ncontent-length: {n}\r\n\r\n{body}"
        );
        add(&format!("type of {name}"), text.as_bytes(), Ended);
    }
    let encoded = pictures::gzip(body.as_bytes());
    let gzip = format!(
        "{head}content-encoding: gzip\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        encoded.len()
    );
    add("an encoded body", &[gzip.as_bytes(), &encoded].concat(), Refused);
    add(
        "a promise of gigabytes",
        format!("{head}content-length: 10000000000\r\nexpect: 100-continue\r\n\r\n").as_bytes(),
        Status(413),
    );
    cases
}

#[test]
fn hostile_messages_end() {
    let target = Target::start(&[]);
    target.refuses(messages());
    target.unharmed("messages");
}

/// A connection that takes its time, and how long until the server ended it.
fn slow(target: &Target, first: &str, again: &str, until: Duration) -> (Outcome, Duration) {
    let start = Instant::now();
    let mut stream = TcpStream::connect(&target.server.address).expect("a connection");
    let _ = stream.write_all(first.as_bytes());
    stream.set_read_timeout(Some(Duration::from_millis(250))).expect("a timeout");
    let mut part = [0; 4096];
    let mut found = Vec::new();
    while start.elapsed() < until {
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(n) => found.extend(&part[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                let _ = stream.write_all(again.as_bytes());
            }
            Err(_) => break,
        }
    }
    let outcome = match (start.elapsed() < until, found.is_empty()) {
        (false, _) => Outcome::Open,
        (true, true) => Outcome::Closed,
        (true, false) => Outcome::Said(String::from_utf8_lossy(&found).into_owned()),
    };
    (outcome, start.elapsed())
}

#[test]
fn slow_askers_are_ended_and_hold_up_nobody() {
    // As it comes, bodies of 65 MB may be announced.
    let target = Target::run(&["--header-time", "8", "--body-time", "8"], &[]);
    let post = format!("POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n");
    let kinds: [(&str, String, &str); 8] = [
        ("says nothing", String::new(), ""),
        ("sends its head byte by byte", "GET /health HTT".into(), "x"),
        ("sends header after header", "GET /health HTTP/1.1\r\nhost: h\r\n".into(), "x: y\r\n"),
        ("sends empty lines", String::new(), "\r\n"),
        ("sends its body byte by byte", format!("{post}content-length: 60000000\r\n\r\n{{"), " "),
        ("sends no body", format!("{post}content-length: 60000000\r\n\r\n"), ""),
        ("sends chunks of a byte", format!("{post}transfer-encoding: chunked\r\n\r\n"), "1\r\n \r\n"),
        (
            "waits to be told to go on",
            format!("{post}content-length: 100\r\nexpect: 100-continue\r\n\r\n"),
            "",
        ),
    ];
    let left = AtomicUsize::new(8 * kinds.len());
    std::thread::scope(|scope| {
        let (target, left) = (&target, &left);
        for (what, first, again) in &kinds {
            for _ in 0..8 {
                scope.spawn(move || {
                    let (outcome, took) = slow(target, first, again, Duration::from_secs(30));
                    left.fetch_sub(1, Ordering::SeqCst);
                    let end = match &outcome {
                        // After the word to go on.
                        Outcome::Said(text) => {
                            Outcome::Said(text.replace("HTTP/1.1 100 Continue\r\n\r\n", ""))
                        }
                        other => Outcome::Said(other.label()),
                    };
                    match outcome {
                        Outcome::Closed => {}
                        Outcome::Open => panic!("{what}: still open after {took:?}"),
                        Outcome::Said(_) => assert_eq!(end.status(), 408, "{what}"),
                    }
                });
            }
        }
        // While all of them are there, others get their answers.
        std::thread::sleep(Duration::from_millis(500));
        let there = left.load(Ordering::SeqCst);
        let start = Instant::now();
        target.answers();
        let took = start.elapsed();
        println!("with {there} slow askers: {took:?}");
        assert_eq!(there, 8 * kinds.len(), "the slow ones were there");
        assert!(took < Duration::from_secs(4), "{took:?}");
    });
    target.unharmed("slow askers");
}

/// More connections than there may be: those beyond wait, and are answered when the idle ones are
/// ended.
#[test]
fn idle_connections_make_room() {
    let target = Target::start(&["--connections", "64"]);
    let idle: Vec<TcpStream> =
        (0..200).map(|_| TcpStream::connect(&target.server.address).expect("a connection")).collect();
    let start = Instant::now();
    target.answers();
    println!("behind 200 idle connections: {:?}", start.elapsed());
    drop(idle);
    target.unharmed("idle connections");
}
