//! The gate and the sockets before a server's routes, over real connections.
#![cfg(feature = "server")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use futures::StreamExt;
use radapt::server::gate::{Gate, GateOptions, Streamed, gate};
use radapt::server::keys::{KeyLimits, Keys};
use radapt::server::listen::{ListenOptions, listen};
use tokio::sync::oneshot;

/// A server with routes that take the time they are told to.
struct Server {
    address: SocketAddr,
    gate: Arc<Gate>,
    stop: Option<oneshot::Sender<()>>,
    ended: std::sync::mpsc::Receiver<bool>,
}

const KEYS: &str = "[[key]]\nname = \"team\"\nkey = \"sk-0123456789abcdef\"\n[[key]]\nname = \"slow\"\nkey = \
                    \"sk-slow-slow-slow-slow\"\nrequests_per_minute = 2\nconcurrent = 1\n";

impl Server {
    fn start(options: GateOptions, keys: Option<Keys>, sockets: ListenOptions) -> Self {
        let own = Arc::new(Gate::new(options, keys));
        let routes = Router::new()
            .route("/health", get(|| async { "alive" }))
            .route("/v1/models", get(|| async { "models" }))
            .route("/v1/echo", post(|body: Bytes| async move { format!("{} bytes", body.len()) }))
            .route(
                "/v1/slow",
                post(|body: String| async move {
                    tokio::time::sleep(Duration::from_millis(body.parse().unwrap_or(0))).await;
                    "done"
                }),
            )
            .route(
                "/v1/stream",
                post(|| async {
                    let pieces = futures::stream::iter(0..5).then(|i| async move {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        Ok::<_, std::io::Error>(Bytes::from(format!("{i};")))
                    });
                    let mut response = Response::new(Body::from_stream(pieces));
                    response.extensions_mut().insert(Streamed);
                    response
                }),
            )
            .fallback(|| async { StatusCode::NOT_FOUND });
        let router = routes.layer(axum::middleware::from_fn_with_state(own.clone(), gate));
        let (stop, stopped) = oneshot::channel();
        let (ready, address) = std::sync::mpsc::channel();
        let (ending, ended) = std::sync::mpsc::channel();
        let shared = own.clone();
        std::thread::spawn(move || {
            tokio::runtime::Runtime::new().unwrap().block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                ready.send(listener.local_addr().unwrap()).unwrap();
                let wait = async {
                    let _ = stopped.await;
                };
                let _ = ending.send(listen(listener, router, shared, sockets, wait).await);
            });
        });
        Self { address: address.recv().unwrap(), gate: own, stop: Some(stop), ended }
    }

    fn open(options: GateOptions) -> Self {
        Self::start(options, None, ListenOptions { linger: Duration::from_millis(300), ..Default::default() })
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    fn send(&self, request: &str) -> TcpStream {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    fn post(&self, path: &str, headers: &str, body: &str) -> TcpStream {
        let length = body.len();
        self.send(&format!(
            "POST {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
        ))
    }

    fn get(&self, path: &str, headers: &str) -> String {
        answer(self.send(&format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{headers}\r\n")))
    }
}

fn answer(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[track_caller]
fn status(answer: &str, expected: u16) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {expected}")), "expected {expected}: {answer}");
}

#[test]
fn keys_are_asked_for_and_their_limits_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.toml");
    std::fs::write(&path, KEYS).unwrap();
    let keys = Keys::open(&path, KeyLimits::default()).unwrap();
    let server = Server::start(GateOptions::default(), Some(keys), ListenOptions::default());
    status(&server.get("/health", ""), 200);
    for headers in [
        "",
        "authorization: Bearer sk-0123456789abcdeX\r\n",
        "authorization: Basic sk-0123456789abcdef\r\n",
        "authorization: sk-0123456789abcdef\r\n",
    ] {
        let found = server.get("/v1/models", headers);
        status(&found, 401);
        assert!(found.contains("www-authenticate: Bearer") && found.contains("invalid_api_key"), "{found}");
    }
    // Nor does a path that is not there tell strangers anything.
    status(&server.get("/nothing", ""), 401);
    let team = "authorization: bearer sk-0123456789abcdef\r\n";
    status(&server.get("/v1/models", team), 200);
    status(&server.get("/nothing", team), 404);
    let slow = "authorization: Bearer sk-slow-slow-slow-slow\r\n";
    let first = server.post("/v1/slow", slow, "500");
    std::thread::sleep(Duration::from_millis(150));
    let second = answer(server.post("/v1/slow", slow, "0"));
    status(&second, 429);
    assert!(second.contains("too many requests at a time") && second.contains("retry-after: 1"), "{second}");
    status(&answer(first), 200);
    let third = answer(server.post("/v1/slow", slow, "0"));
    status(&third, 429);
    assert!(third.contains("rate_limit_exceeded") && third.contains("within a minute"), "{third}");
    let wait: u64 = third.split("retry-after: ").nth(1).unwrap().split('\r').next().unwrap().parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    // A key that is taken away stops working without a restart.
    std::fs::write(&path, KEYS.replace("sk-0123456789abcdef", "sk-another-key-entirely")).unwrap();
    let until = Instant::now() + Duration::from_secs(8);
    while !server.get("/v1/models", team).starts_with("HTTP/1.1 401") {
        assert!(Instant::now() < until, "the keys are not read again");
        std::thread::sleep(Duration::from_millis(200));
    }
    let text = server.gate.metrics.text();
    assert!(
        text.contains("key=\"slow\"") && text.contains("radapt_turned_away_total{reason=\"rate\"} 1"),
        "{text}"
    );
    assert!(!text.contains("sk-"));
}

#[test]
fn places_are_few_and_waiting_is_bounded() {
    let server = Server::open(GateOptions {
        in_flight: 1,
        queue: 1,
        queue_time: Duration::from_millis(700),
        ..GateOptions::default()
    });
    let first = server.post("/v1/slow", "", "400");
    std::thread::sleep(Duration::from_millis(100));
    let second = server.post("/v1/slow", "", "0");
    std::thread::sleep(Duration::from_millis(100));
    let third = answer(server.post("/v1/slow", "", "0"));
    status(&third, 429);
    assert!(third.contains("server_busy") && third.contains("retry-after: "), "{third}");
    // Whoever waits gets the place, and what costs nothing needs none.
    status(&server.get("/v1/models", ""), 200);
    status(&answer(first), 200);
    status(&answer(second), 200);
    // Waiting has an end too.
    let long = server.post("/v1/slow", "", "2000");
    std::thread::sleep(Duration::from_millis(100));
    let start = Instant::now();
    status(&answer(server.post("/v1/slow", "", "0")), 429);
    assert!(start.elapsed() > Duration::from_millis(500) && start.elapsed() < Duration::from_millis(1900));
    // An asker that goes away leaves its place at once.
    drop(long);
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    status(&answer(server.post("/v1/slow", "", "0")), 200);
    assert!(start.elapsed() < Duration::from_millis(600), "{:?}", start.elapsed());
    let text = server.gate.metrics.text();
    assert!(text.contains("radapt_in_flight 0") && text.contains("radapt_waiting 0"), "{text}");
}

#[test]
fn bodies_and_headers_have_limits_in_bytes_and_time() {
    let sockets = ListenOptions { header_time: Duration::from_millis(500), ..ListenOptions::default() };
    let options = GateOptions {
        max_body: 1000,
        body_time: Duration::from_millis(500),
        request_time: Duration::from_millis(800),
        ..GateOptions::default()
    };
    let server = Server::start(options, None, sockets);
    status(&answer(server.post("/v1/echo", "", &"x".repeat(1000))), 200);
    status(&answer(server.post("/v1/echo", "", &"x".repeat(1001))), 413);
    // Without a length nobody knows before.
    let chunk = format!("{:x}\r\n{}\r\n", 600, "x".repeat(600));
    let chunked = format!(
        "POST /v1/echo HTTP/1.1\r\nhost: h\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n{chunk}{chunk}0\r\n\r\n"
    );
    status(&answer(server.send(&chunked)), 413);
    // A body that never comes.
    let start = Instant::now();
    let stuck = server.send("POST /v1/echo HTTP/1.1\r\nhost: h\r\ncontent-length: 100\r\n\r\nabc");
    status(&answer(stuck), 408);
    // Headers that never end: a clean close.
    let slow = server.send("POST /v1/echo HTTP/1.1\r\nhost: h\r\nx-a: b");
    let found = answer(slow);
    assert!(found.is_empty() || found.starts_with("HTTP/1.1 408"), "{found}");
    assert!(start.elapsed() < Duration::from_secs(5));
    // An answer that never comes, and nonsense.
    status(&answer(server.post("/v1/slow", "", "5000")), 408);
    let nonsense = answer(server.send("\u{0}\u{1}\u{2} nothing like HTTP\r\n\r\n"));
    assert!(nonsense.is_empty() || nonsense.starts_with("HTTP/1.1 400"), "{nonsense}");
    let many = (0..100).map(|i| format!("x-{i}: y\r\n")).collect::<String>();
    let found = server.get("/health", &many);
    assert!(found.is_empty() || found.starts_with("HTTP/1.1 431"), "{found}");
    status(&server.get("/health", ""), 200);
}

/// Announced is not sent: 40 bodies of 1 MB that do not come take no room, of which there are 4 MB.
#[test]
fn slow_senders_hold_up_nobody() {
    let options = GateOptions {
        max_body: 1 << 20,
        bodies: 4 << 20,
        queue_time: Duration::from_secs(5),
        body_time: Duration::from_secs(5),
        ..GateOptions::default()
    };
    let server = Server::open(options);
    let slow: Vec<_> = (0..20)
        .flat_map(|_| ["content-length: 1000000\r\n\r\nabc", "transfer-encoding: chunked\r\n\r\n1\r\na\r\n"])
        .map(|rest| server.send(&format!("POST /v1/echo HTTP/1.1\r\nhost: h\r\n{rest}")))
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    let found = answer(server.post("/v1/echo", "", &"x".repeat(1 << 20)));
    status(&found, 200);
    assert!(found.contains("1048576 bytes") && start.elapsed() < Duration::from_secs(2), "{found}");
    drop(slow);
}

/// What has arrived does take room, and is given back.
#[test]
fn bodies_have_so_much_memory_together() {
    let options = GateOptions {
        max_body: 1 << 20,
        bodies: 2 << 20,
        queue_time: Duration::from_millis(500),
        ..GateOptions::default()
    };
    let server = Server::open(options);
    let part = format!("POST /v1/echo HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n", 1 << 20);
    let full: Vec<_> = (0..2).map(|_| server.send(&(part.clone() + &"x".repeat((1 << 20) - 1)))).collect();
    std::thread::sleep(Duration::from_millis(200));
    let found = answer(server.post("/v1/echo", "", "abc"));
    status(&found, 429);
    assert!(found.contains("on their way in") && found.contains("retry-after: "), "{found}");
    drop(full);
    std::thread::sleep(Duration::from_millis(200));
    status(&answer(server.post("/v1/echo", "", &"x".repeat(1 << 20))), 200);
}

#[test]
fn bodies_have_so_many_values() {
    let server = Server::open(GateOptions { max_values: 100, ..GateOptions::default() });
    let list = |n: usize| format!("[{}1]", "1,".repeat(n - 2));
    status(&answer(server.post("/v1/echo", "", &list(100))), 200);
    let found = answer(server.post("/v1/echo", "", &list(101)));
    status(&found, 413);
    assert!(found.contains("more than 100 values") && found.contains("body_too_large"), "{found}");
    status(&answer(server.post("/v1/echo", "", &"[".repeat(100))), 413);
    status(&answer(server.post("/v1/echo", "", &"{\"a\":".repeat(100))), 413);
    // Within a text they are letters, whatever stands before its end.
    for text in ["[{,".repeat(100), format!("\\\"{}", ",".repeat(200)), format!("{}\\\\", ",".repeat(200))] {
        status(&answer(server.post("/v1/echo", "", &format!("[\"{text}\",1]"))), 200);
    }
    let after = format!("[\"\\\\\"{}]", ",1".repeat(200));
    status(&answer(server.post("/v1/echo", "", &after)), 413);
}

#[test]
fn who_leaves_before_an_answer_is_counted() {
    let server = Server::open(GateOptions::default());
    let left = server.post("/v1/slow", "", "20000");
    std::thread::sleep(Duration::from_millis(100));
    drop(left);
    std::thread::sleep(Duration::from_millis(300));
    let text = server.gate.metrics.text();
    let line = "radapt_requests_total{route=\"/v1/slow\",status=\"499\",key=\"anonymous\"} 1";
    assert!(text.lines().any(|found| found == line), "{text}");
    assert!(text.contains("radapt_in_flight 0"), "{text}");
}

#[test]
fn a_request_has_a_number_and_never_breaks_out_of_it() {
    let server = Server::open(GateOptions::default());
    let found = server.get("/health", "x-request-id: mine-7\r\n");
    assert!(found.contains("x-request-id: mine-7"), "{found}");
    for odd in ["a b", "<script>", &"x".repeat(65), ""] {
        let found = server.get("/health", &format!("x-request-id: {odd}\r\n"));
        assert!(found.contains("x-request-id: req_"), "{found}");
    }
    let stream = answer(server.post("/v1/stream", "", ""));
    assert!(stream.contains("0;") && stream.contains("4;"), "{stream}");
    std::thread::sleep(Duration::from_millis(100));
    let text = server.gate.metrics.text();
    assert!(text.contains("radapt_first_piece_seconds_count 1"), "{text}");
    assert!(text.contains("route=\"/v1/stream\",status=\"200\",key=\"anonymous\"} 1"), "{text}");
}

#[test]
fn draining_ends_what_runs_and_turns_the_rest_away() {
    let mut server = Server::open(GateOptions::default());
    let running = server.post("/v1/stream", "", "");
    std::thread::sleep(Duration::from_millis(150));
    server.stop.take().unwrap().send(()).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let turned = answer(server.post("/v1/slow", "", "0"));
    status(&turned, 503);
    assert!(turned.contains("retry-after: ") && turned.contains("connection: close"), "{turned}");
    status(&server.get("/health", ""), 200);
    let whole = answer(running);
    assert!(whole.contains("4;"), "{whole}");
    assert!(server.ended.recv_timeout(Duration::from_secs(5)).unwrap());
    assert!(TcpStream::connect(server.address).is_err());
}

#[test]
fn who_notices_in_time_is_not_turned_away() {
    let sockets = ListenOptions {
        notice: Duration::from_millis(400),
        linger: Duration::from_millis(400),
        ..ListenOptions::default()
    };
    let mut server = Server::start(GateOptions::default(), None, sockets);
    // A connection that would be kept.
    let ask = "POST /v1/slow HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\n\r\n0";
    assert!(!server.gate.leaving());
    server.stop.take().unwrap().send(()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(server.gate.leaving() && !server.gate.draining());
    let taken = answer(server.send(ask));
    status(&taken, 200);
    assert!(taken.contains("connection: close") && taken.ends_with("done"), "{taken}");
    std::thread::sleep(Duration::from_millis(450));
    assert!(server.gate.leaving() && server.gate.draining());
    status(&answer(server.send(ask)), 503);
    assert!(server.ended.recv_timeout(Duration::from_secs(5)).unwrap());
    assert!(TcpStream::connect(server.address).is_err());
}

#[test]
fn what_does_not_end_is_cut_off() {
    let sockets = ListenOptions {
        linger: Duration::from_millis(10),
        drain_time: Duration::from_millis(200),
        ..ListenOptions::default()
    };
    let mut server = Server::start(GateOptions::default(), None, sockets);
    let _running = server.post("/v1/slow", "", "30000");
    std::thread::sleep(Duration::from_millis(100));
    server.stop.take().unwrap().send(()).unwrap();
    assert!(!server.ended.recv_timeout(Duration::from_secs(5)).unwrap());
}
