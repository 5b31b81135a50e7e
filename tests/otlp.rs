//! Traces as a collector gets them.
#![cfg(feature = "otlp")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::routing::get;
use radapt::server::gate::{Gate, GateOptions, gate};
use radapt::server::traces;
use tower_service::Service;
use tracing_subscriber::layer::SubscriberExt;

/// A collector that keeps what it is sent: the route and the body of each request.
fn collector() -> (String, Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let (told, heard) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.expect("a connection"));
            let (mut first, mut length) = (String::new(), 0);
            stream.read_line(&mut first).expect("a request");
            loop {
                let mut line = String::new();
                stream.read_line(&mut line).expect("a header");
                if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().expect("a length");
                }
                if line.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).expect("a body");
            let _ = told.send((first, body));
            let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            stream.get_mut().write_all(answer.as_bytes()).expect("answered");
        }
    });
    (format!("http://{address}/"), heard)
}

#[test]
fn a_request_is_a_span_below_its_askers_without_what_was_asked() {
    let (endpoint, heard) = collector();
    let (layer, exporter) = traces::layer(&endpoint).expect("a layer");
    let subscriber = tracing_subscriber::registry().with(layer);
    let own = Arc::new(Gate::new(GateOptions::default(), None));
    let mut router = Router::new()
        .route("/v1/models", get(|| async { "models" }))
        .layer(axum::middleware::from_fn_with_state(own, gate));
    tracing::subscriber::with_default(subscriber, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let request = Request::builder()
                .uri("/v1/models?secret=word")
                .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
                .header("x-request-id", "number-7")
                .body(Body::empty())
                .expect("a request");
            let response = router.call(request).await.expect("an answer");
            assert_eq!(response.status(), 200);
            let body = axum::body::to_bytes(response.into_body(), 100).await.expect("a body");
            assert_eq!(&body[..], b"models");
        });
    });
    drop(exporter);
    let (first, body) = heard.recv_timeout(Duration::from_secs(20)).expect("a batch of spans");
    assert!(first.starts_with("POST /v1/traces HTTP/1.1"), "{first}");
    let has = |word: &[u8]| body.windows(word.len()).any(|found| found == word);
    for word in ["GET /v1/models", "http.route", "number-7", "http.response.status_code", "radapt"] {
        assert!(has(word.as_bytes()), "{word}: {}", String::from_utf8_lossy(&body));
    }
    // Its asker's trace, and span as the parent.
    assert!(has(&[
        0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31, 0x9c
    ]));
    assert!(has(&[0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]));
    assert!(!has(b"secret"));
}

#[test]
fn a_collector_that_is_none_is_a_usage_error() {
    for wrong in ["localhost:4318", "grpc://localhost:4317", ""] {
        let error = traces::layer::<tracing_subscriber::Registry>(wrong).map(|_| ()).expect_err("none");
        assert!(error.to_string().contains("--otlp"), "{error}");
    }
}
