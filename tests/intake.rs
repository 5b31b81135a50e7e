//! The server's picture intake against hostile inputs: each is refused for the reason expected, no
//! address inside is reached, and memory stays within its bound.
#![cfg(feature = "server")]

mod hostile;
mod upstream;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::StreamExt as _;
use futures::future::join_all;
use hostile::{Case, INSIDE, Input, LIMITS, data_url, pictures, url};
use image::{ImageFormat, Rgba, RgbaImage};
use radapt::image::{DecodeLimits, decode, measure};
use radapt::server::intake::{FetchOptions, Intake, IntakeError, IntakeOptions, Refusal};
use upstream::{Authority, Do, Inside, Name, Net, Route, serve, serve_plain};

fn options() -> IntakeOptions {
    IntakeOptions { limits: LIMITS, memory: 64 << 20, ..Default::default() }
}

/// Gives all cases to an intake, several at a time, and tells how many there were of each reason.
async fn refuse(intake: &Intake, cases: Vec<Case>) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    let outcomes: Vec<_> = futures::stream::iter(cases)
        .map(|case| async move {
            let outcome = match &case.input {
                Input::Url(url) => intake.picture(url, "here").await,
                Input::Bytes(bytes) => intake.picture_from_bytes(bytes.clone(), "here").await,
            };
            (case, outcome)
        })
        .buffer_unordered(16)
        .collect()
        .await;
    let mut wrong = Vec::new();
    for (case, outcome) in outcomes {
        match outcome {
            Ok(picture) => wrong.push(format!("{}: taken, {:?}", case.name, picture.dimensions())),
            Err(error) if error.refusal != case.expected => wrong.push(format!(
                "{}: expected {}, found {}: {error} ({:?})",
                case.name,
                case.expected,
                error.refusal,
                error.detail()
            )),
            Err(error) => {
                polite(&case.name, &error);
                *counts.entry(error.refusal.as_str()).or_default() += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "{} went wrong:\n{}", wrong.len(), wrong.join("\n"));
    counts
}

#[test]
fn refusals_have_labels_of_their_own() {
    let labels: BTreeSet<_> = Refusal::ALL.iter().map(|refusal| refusal.as_str()).collect();
    assert_eq!(labels.len(), Refusal::ALL.len());
    for refusal in Refusal::ALL {
        let label = refusal.as_str();
        assert!(label.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_')), "{label}");
        assert!((400..500).contains(&refusal.status()) || label == "busy", "{label}");
    }
}

/// A refusal is the asker's fault, names the picture, is short, and gives nothing away.
fn polite(name: &str, error: &IntakeError) {
    let message = error.to_string();
    assert!((400..500).contains(&error.refusal.status()), "{name}");
    assert!(message.starts_with("picture `here`: ") && message.len() < 300, "{name}: {message}");
    for inside in ["127.", "10.", "169.254", "::", "secret", "localhost", "metadata", "os error"] {
        assert!(!message.contains(inside), "{name}: {message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_files_and_urls_are_refused() {
    let intake = Intake::new(options()).unwrap();
    let counts = refuse(&intake, hostile::files()).await;
    println!("files: {} {counts:?}", counts.values().sum::<usize>());
    let counts = refuse(&intake, hostile::data_urls()).await;
    println!("data URLs: {} {counts:?}", counts.values().sum::<usize>());
    let counts = refuse(&intake, hostile::schemes()).await;
    println!("schemes: {} {counts:?}", counts.values().sum::<usize>());

    let closed =
        refuse(&intake, vec![url("fetching is off", "https://127.0.0.1/", Refusal::FetchDisabled)]).await;
    assert_eq!(closed.len(), 1);
}

#[tokio::test]
async fn no_connection_is_made_to_an_address_inside() {
    // With a network whose every connection would be counted.
    let net =
        Arc::new(Net::new(HashMap::new(), HashMap::new(), Authority::new().roots(), Inside::start().await));
    let all = FetchOptions::new(["*"]);
    let intake = Intake::with_network(IntakeOptions { fetch: Some(all), ..options() }, net.clone()).unwrap();
    let mut cases: Vec<_> = INSIDE
        .split_whitespace()
        .map(|address| {
            url(format!("address {address}"), format!("https://{address}/a.png"), Refusal::PrivateAddress)
        })
        .collect();
    cases.extend(hostile::urls());
    cases.extend(hostile::schemes());
    let counts = refuse(&intake, cases).await;
    println!("addresses and forms: {} {counts:?}", counts.values().sum::<usize>());
    assert_eq!((net.dialled(), net.reached_inside()), (vec![], 0));

    // With an allow-list of names, no address is one of them.
    let some = FetchOptions::new(["pics.example.org", "*.example.org"]);
    let intake = Intake::with_network(IntakeOptions { fetch: Some(some), ..options() }, net.clone()).unwrap();
    let hosts = INSIDE.split_whitespace().chain([
        "example.org",
        "evil.test",
        "pics.example.org.evil.test",
        "evilexample.org",
        "pics-example.org",
        "example.org.",
        "localhost",
        "metadata.google.internal",
        "pics.example.com",
        "8.8.8.8",
        "134744072",
        "[2606:4700::1111]",
        "pics.example.org。evil.test",
        "pics.eхample.org",
    ]);
    let cases = hosts
        .map(|host| url(format!("host {host}"), format!("https://{host}/a.png"), Refusal::HostNotAllowed))
        .collect();
    let counts = refuse(&intake, cases).await;
    println!("hosts: {} {counts:?}", counts.values().sum::<usize>());
    assert_eq!((net.dialled(), net.reached_inside()), (vec![], 0));
}

/// Where `/to/N` redirects to, and the reason expected.
fn redirects() -> Vec<(String, Refusal)> {
    use Refusal::{BadUrl, HostNotAllowed, PortNotAllowed, PrivateAddress, Scheme};
    let mut list: Vec<(String, Refusal)> = INSIDE
        .split_whitespace()
        .filter(|a| a.is_ascii())
        .map(|address| (format!("https://{address}/"), PrivateAddress))
        .collect();
    for (place, expected) in [
        ("http://pics.example.org/good.png", Scheme),
        ("http://127.0.0.1/", Scheme),
        ("file:///etc/passwd", Scheme),
        ("ftp://pics.example.org/good.png", Scheme),
        ("gopher://127.0.0.1:6379/_", Scheme),
        ("data:image/png;base64,AAAA", Scheme),
        ("javascript:alert(1)", Scheme),
        ("blob:https://pics.example.org/1", Scheme),
        ("pics.example.org:443/good.png", Scheme),
        ("//127.0.0.1/", PrivateAddress),
        ("//169.254.169.254/latest/meta-data/", PrivateAddress),
        ("//[::1]/", PrivateAddress),
        ("https://private-0.example.org/", PrivateAddress),
        ("https://pics.example.org:8443/good.png", PortNotAllowed),
        ("//pics.example.org:22/", PortNotAllowed),
        ("https://user:pass@pics.example.org/good.png", BadUrl),
        ("//user@pics.example.org/good.png", BadUrl),
        ("//@pics.example.org/good.png", BadUrl),
        ("https:good.png", BadUrl),
        ("https:///good.png", BadUrl),
        ("/\\127.0.0.1/", BadUrl),
        ("\\\\127.0.0.1\\", BadUrl),
        ("/a b", BadUrl),
        ("https://[::1/", BadUrl),
        ("https://absent.example.org/", Refusal::Unresolved),
    ] {
        list.push((place.to_owned(), expected));
    }
    list.push((format!("/{}", "a".repeat(5000)), BadUrl));
    // Not on the list of the second intake.
    list.push(("https://evil.test/".to_owned(), HostNotAllowed));
    list
}

fn answer(status: &str, fields: &str, body: &[u8]) -> Vec<Do> {
    let head = format!("HTTP/1.1 {status}\r\n{fields}content-length: {}\r\n\r\n", body.len());
    vec![Do::Send([head.as_bytes(), body].concat())]
}

fn send(text: &str) -> Vec<Do> {
    vec![Do::Send(text.as_bytes().to_vec())]
}

/// What the server of the public names does.
fn script(path: &str, png: &[u8], places: &[(String, Refusal)]) -> Vec<Do> {
    let head = |fields: &str| Do::Send(format!("HTTP/1.1 200 OK\r\n{fields}\r\n").into_bytes());
    let day = Duration::from_secs(86_400);
    let to = |place: &str| answer("302 Found", &format!("location: {place}\r\n"), b"secret");
    if let Some(index) = path.strip_prefix("/to/") {
        return to(&places[index.parse::<usize>().unwrap()].0);
    }
    if let Some(left) = path.strip_prefix("/chain/") {
        return match left.parse::<usize>().unwrap() {
            0 => to("/good.png"),
            n => to(&format!("/chain/{}", n - 1)),
        };
    }
    if let Some(status) = path.strip_prefix("/status/") {
        return answer(&format!("{status} X"), "www-authenticate: Basic\r\n", png);
    }
    match path {
        "/good.png" => answer("200 OK", "content-type: text/html\r\n", png),
        "/chunked" => vec![
            head("transfer-encoding: chunked\r\n"),
            Do::Send([format!("{:x}\r\n", png.len()).as_bytes(), png, b"\r\n0\r\nx: y\r\n\r\n"].concat()),
        ],
        "/until-closed" => vec![head(""), Do::Send(png.to_vec())],
        "/cookie" => answer("302 Found", "location: /good.png\r\nset-cookie: a=b; Path=/\r\n", b""),
        "/elsewhere" => to("https://other.example.org/good.png"),
        "/301" => answer("301 X", "location: good.png#fragment\r\n", b""),
        "/303" => answer("303 X", "location: ?good\r\n", b""),
        "/303?good" => answer("308 X", "location: ./a/../good.png\r\n", b""),

        "/loop" => to("/loop"),
        "/ping" => to("/pong"),
        "/pong" => to("https://other.example.org/ping"),
        "/nowhere" => answer("302 Found", "", b""),
        "/two-ways" => answer("302 Found", "location: /good.png\r\nlocation: /good.png\r\n", b""),
        "/empty-place" => answer("302 Found", "location:\r\n", b""),
        "/odd-place" => {
            vec![Do::Send(b"HTTP/1.1 302 X\r\nlocation: /\xff\xfe\r\ncontent-length: 0\r\n\r\n".to_vec())]
        }
        "/refresh" => answer("200 OK", "refresh: 0; url=/good.png\r\n", b"<meta http-equiv=refresh>"),
        "/html" => answer("200 OK", "content-type: image/png\r\n", b"<html>not found</html>"),
        "/empty" => answer("200 OK", "content-type: image/png\r\n", b""),
        "/cut" => answer("200 OK", "content-type: image/png\r\n", &png[..png.len() / 2]),
        "/gzip" => answer("200 OK", "content-encoding: gzip\r\n", &pictures::gzip(png)),
        "/deflate" => answer("200 OK", "content-encoding: deflate\r\n", &pictures::zlib(png)),
        "/bomb" => answer("200 OK", "", &pictures::png(60_000, 60_000, 2, &[])),
        "/endless" => vec![head(""), Do::Repeat(vec![0; 64 << 10], Duration::ZERO)],
        "/endless-chunks" => vec![
            head("transfer-encoding: chunked\r\n"),
            Do::Repeat([&b"8000\r\n"[..], &[0; 32 << 10], b"\r\n"].concat(), Duration::ZERO),
        ],
        "/endless-picture" => {
            vec![head(""), Do::Send(png.to_vec()), Do::Repeat(vec![0; 64 << 10], Duration::ZERO)]
        }
        "/claims-much" => vec![head("content-length: 10000000000\r\n"), Do::Wait(day)],
        "/claims-little" => vec![head("content-length: 100\r\n"), Do::Send(png.to_vec())],
        "/claims-more" => vec![head("content-length: 100000\r\n"), Do::Send(png.to_vec())],
        "/claims-two" => vec![head("content-length: 10\r\ncontent-length: 20\r\n"), Do::Send(png.to_vec())],
        "/claims-less-than-none" => vec![head("content-length: -1\r\n"), Do::Send(png.to_vec())],
        "/claims-words" => vec![head("content-length: many\r\n"), Do::Send(png.to_vec())],
        "/bad-chunk" => vec![head("transfer-encoding: chunked\r\n"), Do::Send(b"zz\r\nabc\r\n".to_vec())],
        "/large-chunk" => {
            vec![head("transfer-encoding: chunked\r\n"), Do::Send(b"fffffffffffffffff\r\n".to_vec())]
        }
        "/cut-chunk" => vec![head("transfer-encoding: chunked\r\n"), Do::Send(b"ff\r\nabc".to_vec())],
        "/nothing" => vec![],
        "/garbage" => send("hello\r\n\r\n"),
        "/old" => send("<html>HTTP/0.9</html>"),
        "/http2" => send("HTTP/2 200\r\n\r\n"),
        "/no-status" => send("HTTP/1.1\r\n\r\n"),
        "/bad-field" => send("HTTP/1.1 200 OK\r\nno colon\r\n\r\n"),
        "/folded" => send("HTTP/1.1 200 OK\r\nx: y\r\n z\r\nno colon\r\n\r\n"),
        "/long-head" => send(&format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "a".repeat(1 << 20))),
        "/many-fields" => send(&format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(1000))),
        "/cut-head" => send("HTTP/1.1 200 OK\r\nx: "),
        "/switches" => {
            send("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
        }

        "/silent" => vec![Do::Wait(day)],
        "/stops" => vec![head("content-length: 100000\r\n"), Do::Send(png.to_vec()), Do::Wait(day)],
        "/drips-head" => vec![
            Do::Send(b"HTTP/1.1 200 OK\r\n".to_vec()),
            Do::Repeat(b"x: y\r\n".to_vec(), Duration::from_millis(300)),
        ],
        "/drips-body" => vec![head(""), Do::Repeat(vec![0], Duration::from_millis(200))],
        "/drips-chunks" => vec![
            head("transfer-encoding: chunked\r\n"),
            Do::Repeat(b"1\r\na\r\n".to_vec(), Duration::from_millis(200)),
        ],
        "/continues" => {
            vec![Do::Repeat(b"HTTP/1.1 100 Continue\r\n\r\n".to_vec(), Duration::from_millis(200))]
        }
        "/slow-loop" => vec![Do::Wait(Duration::from_millis(900)), to("/slow-loop").remove(0)],
        other => panic!("the test asked for {other}"),
    }
}

/// The network of the fetching test: a server for `*.example.org`, and names that lead elsewhere.
async fn world(png: &[u8]) -> (Arc<Net>, upstream::Heads) {
    let (authority, other) = (Authority::new(), Authority::new());
    let tls = authority.certify(&["*.example.org", "93.184.216.34"], false);
    let (bytes, places) = (png.to_vec(), redirects());
    let (server, heads) = serve(tls, move |path| script(path, &bytes, &places)).await;
    let silence = |_: &str| Vec::new();
    let (wrong, _) = serve(authority.certify(&["pics.example.com", "example.org"], false), silence).await;
    let (expired, _) = serve(authority.certify(&["*.example.org"], true), silence).await;
    let (unknown, _) = serve(other.certify(&["*.example.org"], false), silence).await;
    let http = serve_plain(send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")).await;
    let mute = serve_plain(vec![Do::Wait(Duration::from_secs(86_400))]).await;

    let ip = |last: u8| IpAddr::from([93, 184, 216, last]);
    let routes = HashMap::from([
        (ip(34), Route::To(server)),
        (ip(35), Route::To(wrong)),
        (ip(36), Route::To(expired)),
        (ip(37), Route::To(unknown)),
        (ip(38), Route::To(http)),
        (ip(39), Route::To(mute)),
        (ip(40), Route::Refused),
        (ip(41), Route::Hangs),
        ("2606:4700::34".parse().unwrap(), Route::To(server)),
    ]);
    let inside = |text: &str| vec![text.parse::<IpAddr>().unwrap()];
    let mut names = HashMap::from([
        ("pics", Name::Is(vec![vec![ip(34)]])),
        ("other", Name::Is(vec![vec![ip(34)]])),
        ("v6", Name::Is(vec![vec!["2606:4700::34".parse().unwrap()]])),
        ("second", Name::Is(vec![vec![ip(40), ip(34)]])),
        ("wrong", Name::Is(vec![vec![ip(35)]])),
        ("expired", Name::Is(vec![vec![ip(36)]])),
        ("unknown", Name::Is(vec![vec![ip(37)]])),
        ("http", Name::Is(vec![vec![ip(38)]])),
        ("mute", Name::Is(vec![vec![ip(39)]])),
        ("refused", Name::Is(vec![vec![ip(40)]])),
        ("hangs", Name::Is(vec![vec![ip(41)]])),
        ("unnamed", Name::Hangs),
        ("absent", Name::Fails),
        ("none", Name::Is(vec![vec![]])),
        ("mixed", Name::Is(vec![vec![ip(34), "10.0.0.1".parse().unwrap()]])),
        ("mixed-v6", Name::Is(vec![vec![ip(34), "::1".parse().unwrap()]])),
        ("rebinds", Name::Is(vec![vec![ip(34)], inside("127.0.0.1")])),
        ("rebinds-late", Name::Is(vec![vec![ip(34)], vec![ip(34)], inside("169.254.169.254")])),
        ("rebinds-v6", Name::Is(vec![vec![ip(34)], inside("::ffff:10.0.0.1")])),
    ])
    .into_iter()
    .map(|(name, leads)| (format!("{name}.example.org"), leads))
    .collect::<HashMap<_, _>>();
    for (i, address) in PRIVATE.split_whitespace().enumerate() {
        names.insert(format!("private-{i}.example.org"), Name::Is(vec![inside(address)]));
    }
    (Arc::new(Net::new(names, routes, authority.roots(), Inside::start().await)), heads)
}

/// What names stand for that an attacker has registered.
const PRIVATE: &str = "
    127.0.0.1 0.0.0.0 10.0.0.1 172.16.0.1 192.168.0.1 100.64.0.1 100.100.100.200 169.254.169.254
    168.63.129.16 192.0.0.192 198.18.0.1 203.0.113.1 224.0.0.1 255.255.255.255 :: ::1 ::ffff:127.0.0.1
    ::ffff:169.254.169.254 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::a00:1 2002:7f00:1:: 2001::1
    2001:db8::1 fe80::1 fc00::1 fd00:ec2::254 ff02::1";

#[tokio::test(flavor = "multi_thread")]
async fn hostile_hosts_are_refused_and_none_inside_is_reached() {
    use Refusal::{
        BadUrl, NotAPicture, PrivateAddress, Timeout, Tls, TooLarge, TooManyPixels, TooManyRedirects,
        Unreachable, Unresolved, UpstreamBroken, UpstreamStatus,
    };
    let png = pictures::encode(pictures::noise(48, 40), ImageFormat::Png);
    let whole = decode(&png, "whole", &LIMITS).unwrap();
    let (net, heads) = world(&png).await;
    let any = FetchOptions { concurrent: 64, ..FetchOptions::new(["*"]) };
    let intake =
        Intake::with_network(IntakeOptions { fetch: Some(any.clone()), ..options() }, net.clone()).unwrap();

    // What is proper is taken, so that the rest is not refused for no reason.
    for (host, path) in [
        ("pics", "/good.png"),
        ("PICS", "/good.png#x"),
        ("pics", "/chunked"),
        ("pics", "/until-closed"),
        ("pics", "/cookie"),
        ("pics", "/elsewhere"),
        ("pics", "/301"),
        ("pics", "/303"),
        ("pics", "/chain/2"),
        ("v6", "/good.png"),
        ("second", "/good.png"),
        ("rebinds", "/good.png"),
    ] {
        let url = format!("https://{host}.example.org{path}");
        assert_eq!(
            intake.picture(&url, "here").await.map_err(|e| format!("{url}: {e} {:?}", e.detail())),
            Ok(whole.clone())
        );
    }
    assert!(intake.picture("https://pics.example.org./good.png", "here").await.is_ok());
    assert!(intake.picture("https://93.184.216.34:443/good.png", "here").await.is_ok());
    // Asked once, and connected to what the answer was.
    assert_eq!(net.lookups("rebinds.example.org"), 1);
    for head in heads.lock().unwrap().iter().map(|head| head.to_ascii_lowercase()) {
        assert!(head.starts_with("get /") && head.contains("\r\nuser-agent: radapt/"), "{head}");
        assert!(head.contains("\r\naccept-encoding: identity\r\n") && !head.contains('#'), "{head}");
        for never in ["cookie:", "referer:", "authorization:", "proxy", "gzip", "range:"] {
            assert!(!head.contains(never), "{head}");
        }
    }

    let mut cases = Vec::new();
    for (path, expected) in [
        ("/chain/3", TooManyRedirects),
        ("/chain/40", TooManyRedirects),
        ("/loop", TooManyRedirects),
        ("/ping", TooManyRedirects),
        ("/empty-place", TooManyRedirects),
        ("/nowhere", BadUrl),
        ("/two-ways", BadUrl),
        ("/odd-place", BadUrl),
        ("/refresh", NotAPicture),
        ("/html", NotAPicture),
        ("/empty", NotAPicture),
        ("/cut", NotAPicture),
        ("/gzip", NotAPicture),
        ("/deflate", NotAPicture),
        ("/bomb", TooManyPixels),
        ("/endless", TooLarge),
        ("/endless-chunks", TooLarge),
        ("/endless-picture", TooLarge),
        ("/claims-much", TooLarge),
        ("/claims-little", NotAPicture),
        ("/claims-more", UpstreamBroken),
        ("/claims-two", UpstreamBroken),
        ("/claims-less-than-none", UpstreamBroken),
        ("/claims-words", UpstreamBroken),
        ("/bad-chunk", UpstreamBroken),
        ("/large-chunk", UpstreamBroken),
        ("/cut-chunk", UpstreamBroken),
        ("/nothing", UpstreamBroken),
        ("/garbage", UpstreamBroken),
        ("/old", UpstreamBroken),
        ("/http2", UpstreamBroken),
        ("/no-status", UpstreamBroken),
        ("/bad-field", UpstreamBroken),
        ("/folded", UpstreamBroken),
        ("/long-head", UpstreamBroken),
        ("/many-fields", UpstreamBroken),
        ("/cut-head", UpstreamBroken),
        ("/switches", UpstreamStatus),
    ] {
        cases.push(url(format!("host's {path}"), format!("https://pics.example.org{path}"), expected));
    }
    for status in [
        201, 202, 203, 206, 300, 305, 306, 400, 401, 403, 404, 407, 410, 418, 429, 451, 500, 502, 503, 599,
        999,
    ] {
        cases.push(url(
            format!("status {status}"),
            format!("https://pics.example.org/status/{status}"),
            UpstreamStatus,
        ));
    }
    for (name, expected) in [
        ("wrong", Tls),
        ("expired", Tls),
        ("unknown", Tls),
        ("http", Tls),
        ("refused", Unreachable),
        ("absent", Unresolved),
        ("none", Unresolved),
        ("mixed", PrivateAddress),
        ("mixed-v6", PrivateAddress),
    ] {
        cases.push(url(format!("host {name}"), format!("https://{name}.example.org/good.png"), expected));
    }
    for (i, address) in PRIVATE.split_whitespace().enumerate() {
        let place = format!("https://private-{i}.example.org/");
        cases.push(url(format!("name of {address}"), place, PrivateAddress));
    }
    // The second lookup is for the second hop.
    cases.push(url("rebinding", "https://rebinds.example.org/loop", PrivateAddress));
    cases.push(url("late rebinding", "https://rebinds-late.example.org/loop", PrivateAddress));
    cases.push(url("IPv6 rebinding", "https://rebinds-v6.example.org/loop", PrivateAddress));
    let places = redirects();
    for (i, (place, expected)) in places.iter().enumerate().take(places.len() - 1) {
        let short: String = place.chars().take(40).collect();
        cases.push(url(
            format!("redirect to {short}"),
            format!("https://pics.example.org/to/{i}"),
            *expected,
        ));
    }
    let counts = refuse(&intake, cases).await;
    println!("hosts: {} {counts:?}", counts.values().sum::<usize>());

    // A list holds for redirects too.
    let listed = FetchOptions { hosts: vec!["pics.example.org".into()], ..any.clone() };
    let closed =
        Intake::with_network(IntakeOptions { fetch: Some(listed), ..options() }, net.clone()).unwrap();
    assert!(closed.picture("https://pics.example.org/good.png", "here").await.is_ok());
    let last = format!("https://pics.example.org/to/{}", places.len() - 1);
    let cases = vec![
        url("redirect off the list", last, Refusal::HostNotAllowed),
        url("redirect to a sibling", "https://pics.example.org/elsewhere", Refusal::HostNotAllowed),
    ];
    refuse(&closed, cases).await;

    // Those that take their time get no more than they may have.
    let (short, total) = (Duration::from_secs(1), Duration::from_secs(3));
    let hasty = FetchOptions { connect_time: short, idle_time: short, total_time: total, ..any };
    let hasty = Intake::with_network(IntakeOptions { fetch: Some(hasty), ..options() }, net.clone()).unwrap();
    let mut cases: Vec<_> =
        ["/silent", "/stops", "/drips-head", "/drips-body", "/drips-chunks", "/continues", "/slow-loop"]
            .map(|path| url(format!("host's {path}"), format!("https://pics.example.org{path}"), Timeout))
            .into();
    cases.extend(
        ["mute", "hangs", "unnamed"]
            .map(|name| url(format!("host {name}"), format!("https://{name}.example.org/"), Timeout)),
    );
    let began = Instant::now();
    let counts = refuse(&hasty, cases).await;
    assert!(began.elapsed() < total * 4, "{:?}", began.elapsed());
    println!("slow hosts: {} {counts:?}", counts.values().sum::<usize>());

    let dialled = net.dialled();
    assert!(dialled.len() > 100, "the servers were asked");
    let public: Vec<IpAddr> = vec!["2606:4700::34".parse().unwrap()];
    for to in dialled {
        assert!(
            to.port() == 443 && (to.ip().to_string().starts_with("93.184.216.") || public.contains(&to.ip())),
            "{to}"
        );
    }
    assert_eq!(net.reached_inside(), 0);
}

/// Files that are a picture and something else as well, or hold more than their picture: the
/// picture is taken, and nothing else of it.
#[tokio::test]
async fn what_else_a_picture_holds_is_dropped() {
    let intake = Intake::new(options()).unwrap();
    for (format, file) in pictures::good() {
        let whole = decode(&file, "whole", &LIMITS).unwrap();
        for tail in [&b"PK\x03\x04 zip"[..], b"<script>alert(1)</script>", b"%PDF-1.7", &[0; 1000]] {
            let both = [&file[..], tail].concat();
            let taken = intake.picture_from_bytes(both.clone(), "here").await.unwrap();
            assert_eq!(taken, whole, "{format}");
            assert_eq!(intake.picture(&data_url(&both), "here").await.unwrap(), whole, "{format}");
        }
        // Whatever it is declared as; parameters are passed over.
        let text = STANDARD.encode(&file);
        for head in [
            "data:;base64,",
            "DATA:text/html;BASE64,",
            "data:image/png; charset=\"x\" ;base64,",
            "data:application/x-sh;a=b;c=d;base64,",
        ] {
            assert_eq!(
                intake.picture(&format!("{head}{text}"), "here").await.unwrap(),
                whole,
                "{format} {head}"
            );
        }
    }
    // 5,000 frames are one.
    let one = intake.picture_from_bytes(pictures::gif((1, 1), (1, 1), 1), "here").await.unwrap();
    assert_eq!(intake.picture_from_bytes(pictures::gif((1, 1), (1, 1), 5000), "here").await.unwrap(), one);
    let intake = Intake::new(IntakeOptions::default()).unwrap();
    // More rows than the picture has, and profiles and texts that unpack to far more than they are.
    let dot = pictures::png(1, 1, 0, &[pictures::dot()]);
    let plain = intake.picture_from_bytes(dot, "here").await.unwrap();
    let zeros = pictures::zeros(64);
    let (idat, text) =
        (pictures::chunk(b"IDAT", &zeros), pictures::chunk(b"zTXt", &[b"k\0\0", &zeros[..]].concat()));
    for chunks in [[pictures::profile(&zeros), pictures::dot()], [text, pictures::dot()]] {
        assert_eq!(intake.picture_from_bytes(pictures::png(1, 1, 0, &chunks), "here").await.unwrap(), plain);
    }
    assert!(intake.picture_from_bytes(pictures::png(1, 1, 0, &[idat]), "here").await.is_ok());
}

#[tokio::test]
async fn orientation_is_applied() {
    let intake = Intake::new(IntakeOptions::default()).unwrap();
    for turned in 1..=8 {
        let file = std::fs::read(format!("tests/fixtures/decode/orientation-{turned}.jpg")).unwrap();
        let expected = decode(&file, "turned", &DecodeLimits::default()).unwrap();
        assert_eq!(intake.picture_from_bytes(file, "here").await.unwrap(), expected);
    }
}

/// The memory that is set aside for a picture is what decoding it takes by its own account.
#[test]
fn what_is_measured_is_enough() {
    let mut seen = 0;
    for entry in std::fs::read_dir("tests/fixtures/decode").unwrap() {
        let path = entry.unwrap().path();
        let file = std::fs::read(&path).unwrap();
        let limits = DecodeLimits::default();
        let Ok(picture) = decode(&file, "fixture", &limits) else { continue };
        let header = measure(&file, "fixture", &limits).unwrap();
        let (width, height) = picture.dimensions();
        let sizes = [(width, height), (height, width)];
        assert!(sizes.contains(&(header.width, header.height)), "{}", path.display());
        let exact = DecodeLimits { max_memory: header.memory, ..limits };
        assert!(decode(&file, "fixture", &exact).is_ok(), "{}", path.display());
        seen += 1;
    }
    assert!(seen > 50, "{seen} fixtures");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_tiny_pictures_at_once() {
    let url = Arc::new(data_url(&pictures::png(1, 1, 0, &[pictures::dot()])));
    for (queue, all) in [(10_000, true), (64, false)] {
        let intake = Arc::new(Intake::new(IntakeOptions { queue, ..options() }).unwrap());
        let asked = (0..10_000).map(|_| {
            let (intake, url) = (Arc::clone(&intake), Arc::clone(&url));
            tokio::spawn(
                async move { intake.picture(&url, "here").await.map(|picture| picture.dimensions()) },
            )
        });
        let (mut taken, mut busy) = (0, 0);
        for outcome in join_all(asked).await {
            match outcome.expect("no panic") {
                Ok(size) => {
                    assert_eq!(size, (1, 1));
                    taken += 1;
                }
                Err(error) => {
                    assert_eq!(error.refusal, Refusal::Busy);
                    busy += 1;
                }
            }
        }
        println!("queue of {queue}: {taken} taken, {busy} told to come again");
        assert!(taken + busy == 10_000 && taken >= 64 && (busy == 0 || !all));
        // And then there is room again.
        assert!(intake.picture(&url, "here").await.is_ok());
    }
}

/// As large as the limits of [`slow`] allow.
fn large() -> Vec<u8> {
    pictures::encode(RgbaImage::from_pixel(4096, 4096, Rgba([9, 8, 7, 6])), ImageFormat::Png)
}

fn slow() -> IntakeOptions {
    let limits = DecodeLimits { max_bytes: 4 << 20, max_pixels: 16 << 20, max_memory: 128 << 20 };
    IntakeOptions { limits, memory: 300 << 20, workers: 2, queue_time: Duration::from_secs(60), ..options() }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_pictures_do_not_hold_up_small_ones() {
    let intake = Intake::new(slow()).unwrap();
    let (large, small) = (large(), pictures::png(1, 1, 0, &[pictures::dot()]));
    let done = AtomicUsize::new(0);
    let larges = join_all((0..8).map(|_| async {
        let size = intake.picture_from_bytes(large.clone(), "here").await.map(|picture| picture.dimensions());
        assert_eq!(size.unwrap(), (4096, 4096));
        done.fetch_add(1, Ordering::SeqCst)
    }));
    let smalls = async {
        // After the large ones have taken their places.
        tokio::task::yield_now().await;
        for _ in 0..100 {
            assert!(intake.picture_from_bytes(small.clone(), "here").await.is_ok());
        }
        done.load(Ordering::SeqCst)
    };
    let (_, before) = tokio::join!(larges, smalls);
    assert!(before <= 4, "{before} of 8 large pictures came before the last small one");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_or_waits_too_long_keeps_no_place() {
    let large = large();
    let intake = Intake::new(slow()).unwrap();
    for _ in 0..20 {
        let mut left = Box::pin(intake.picture_from_bytes(large.clone(), "here"));
        assert!(futures::poll!(&mut left).is_pending());
    }
    assert!(intake.picture_from_bytes(large.clone(), "here").await.is_ok());

    let hasty = Intake::new(IntakeOptions { queue_time: Duration::from_millis(1), ..slow() }).unwrap();
    let outcomes = join_all((0..8).map(|_| hasty.picture_from_bytes(large.clone(), "here"))).await;
    let busy = outcomes.iter().filter(|o| matches!(o, Err(e) if e.refusal == Refusal::Busy)).count();
    assert!((1..8).contains(&busy), "{busy} of 8 were told to come again");

    let hasty = Intake::new(IntakeOptions { decode_time: Duration::from_millis(1), ..slow() }).unwrap();
    let error = hasty.picture_from_bytes(large, "here").await.unwrap_err();
    assert_eq!(error.refusal, Refusal::Timeout);
}

#[test]
fn options_that_leave_no_room_are_refused() {
    let intake = |options: IntakeOptions| Intake::new(options).map(|_| ()).map_err(|e| e.to_string());
    assert_eq!(intake(options()), Ok(()));
    assert_eq!(intake(IntakeOptions::default()), Ok(()));
    assert!(intake(IntakeOptions { memory: 16 << 20, ..options() }).unwrap_err().contains("MiB"));
    assert!(intake(IntakeOptions { workers: 0, ..options() }).is_err());
    assert!(intake(IntakeOptions { queue: 0, ..options() }).is_err());
    assert!(intake(IntakeOptions { queue: usize::MAX, ..options() }).is_err());
    let fetch = |fetch: FetchOptions| intake(IntakeOptions { fetch: Some(fetch), ..options() });
    assert_eq!(fetch(FetchOptions::new(["example.org"])), Ok(()));
    assert!(fetch(FetchOptions::new([""; 0])).unwrap_err().contains("host"));
    for inside in
        ["127.0.0.1", "::1", "10.0.0.1", "169.254.169.254", "http://example.org", "example.org/x", "*.*"]
    {
        assert!(fetch(FetchOptions::new([inside])).unwrap_err().contains(inside), "{inside}");
    }
    assert!(fetch(FetchOptions { concurrent: 0, ..FetchOptions::new(["*"]) }).is_err());
    assert!(fetch(FetchOptions { total_time: Duration::ZERO, ..FetchOptions::new(["*"]) }).is_err());
}

/// Runs one of the `child_` tests below in a process of its own.
fn child(name: &str, variables: &[(&str, String)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// With the system's network and proxies set: nothing on this machine is reached.
#[test]
fn the_systems_network_reaches_nothing_inside() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let proxy = format!("http://127.0.0.1:{port}");
    let names = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"];
    let mut variables: Vec<_> = names.iter().map(|name| (*name, proxy.clone())).collect();
    variables.push(("RADAPT_TEST_PORT", port.to_string()));
    child("child_asks_for_this_machine", &variables);
    assert!(listener.accept().is_err(), "somebody came");
}

#[tokio::test]
#[ignore = "run by the_systems_network_reaches_nothing_inside"]
async fn child_asks_for_this_machine() {
    let port: u16 = std::env::var("RADAPT_TEST_PORT").unwrap().parse().unwrap();
    let fetch = FetchOptions { ports: vec![port], ..FetchOptions::new(["*"]) };
    let intake = Intake::new(IntakeOptions { fetch: Some(fetch), ..options() }).unwrap();
    for host in INSIDE.split_whitespace() {
        let error = intake.picture(&format!("https://{host}:{port}/"), "here").await.unwrap_err();
        assert_eq!(error.refusal, Refusal::PrivateAddress, "{host}");
    }
    for host in ["localhost", "absent.invalid"] {
        let error = intake.picture(&format!("https://{host}:{port}/"), "here").await.unwrap_err();
        let expected = [Refusal::PrivateAddress, Refusal::Unresolved, Refusal::Timeout];
        assert!(expected.contains(&error.refusal), "{host}: {error}");
    }
}

/// Pictures that would take 4 GB at once, in an intake that may have 300 MiB.
#[cfg(target_os = "linux")]
#[test]
fn memory_stays_within_its_bound() {
    let text = child("child_takes_large_pictures", &[]);
    println!("{}", text.lines().find(|line| line.contains("peak")).unwrap());
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by memory_stays_within_its_bound"]
async fn child_takes_large_pictures() {
    fn status(key: &str) -> u64 {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
    }
    let options = slow();
    let (budget, intake) = (options.memory >> 20, Intake::new(options).unwrap());
    let zeros = pictures::zeros(200);
    let files = [
        axum::body::Bytes::from(large()),
        pictures::png(1, 1, 0, &[pictures::profile(&zeros), pictures::dot()]).into(),
        pictures::png(1, 1, 0, &[pictures::chunk(b"IDAT", &zeros)]).into(),
        pictures::gif((1, 1), (5000, 5000), 1).into(),
        pictures::jpeg(0xc2, 4000, 4000, 1, 90).into(),
        pictures::webp_lossless(4096, 4096).into(),
        pictures::bmp(4096, 4096, 24, 0, &[0; 1000]).into(),
    ];
    // Making them has taken memory, too.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    let asked = (0..10).flat_map(|_| &files).map(|file| async {
        intake.picture_from_bytes(file.clone(), "here").await.map(|picture| picture.dimensions()).is_ok()
    });
    let taken = join_all(asked).await.into_iter().filter(|taken| *taken).count();
    let peak = status("VmHWM");
    println!("{taken} of 70 taken; {before} MiB before, peak {peak} MiB, budget {budget} MiB");
    assert!(taken >= 30, "{taken}");
    // What is set aside, and what the allocator keeps of it for each of the pool's threads.
    assert!(peak - before <= budget + 64, "{before} MiB before, peak {peak} MiB, budget {budget} MiB");
}
