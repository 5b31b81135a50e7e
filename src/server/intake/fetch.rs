//! Fetching a picture over HTTPS.
//!
//! Each hop is checked, resolved, checked, and connected to the address that was checked: nothing
//! is resolved a second time. One connection per request, HTTP/1.1, no proxies, cookies,
//! credentials or referrers, no compressed bodies (nothing here unpacks one).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, ACCEPT_ENCODING, CONNECTION, HOST, LOCATION, USER_AGENT};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, DEFAULT_VERSIONS};
use url::{Host, Url};

use super::address::is_public;
use super::hosts::{Hosts, Target, target};
use super::network::Network;
use super::pool::{Pool, Room};
use super::{IntakeError, Refusal};
use crate::{Error, Result};

/// How many of a name's addresses are tried.
const MAX_ADDRESSES: usize = 4;
/// The most fields an answer's head may have, and its most bytes.
const MAX_FIELDS: usize = 64;
const MAX_HEAD: usize = 32 << 10;

/// From where pictures are fetched, and within which limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchOptions {
    /// The hosts pictures may be fetched from: `example.org`, `*.example.org` (all names below it,
    /// not itself), a public address, or `*` for any public host. Redirects are held to them too.
    pub hosts: Vec<String>,
    /// The ports that may be asked; 443.
    pub ports: Vec<u16>,
    /// How many redirects are followed; 3.
    pub max_redirects: usize,
    /// For a TCP connection and for its TLS handshake, each; 5 s.
    pub connect_time: Duration,
    /// For a name to be resolved, an answer to begin, and between two pieces of it; 5 s.
    pub idle_time: Duration,
    /// For all of it, redirects included; 20 s.
    pub total_time: Duration,
    /// Pictures fetched at once; 32.
    pub concurrent: usize,
}

impl FetchOptions {
    /// From these hosts, with the limits given at the fields.
    pub fn new(hosts: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            hosts: hosts.into_iter().map(Into::into).collect(),
            ports: vec![443],
            max_redirects: 3,
            connect_time: Duration::from_secs(5),
            idle_time: Duration::from_secs(5),
            total_time: Duration::from_secs(20),
            concurrent: 32,
        }
    }
}

pub struct Fetch {
    options: FetchOptions,
    hosts: Hosts,
    network: Arc<dyn Network>,
    tls: TlsConnector,
    slots: Semaphore,
}

type Step<T> = std::result::Result<T, IntakeError>;

impl Fetch {
    pub fn new(options: FetchOptions, network: Arc<dyn Network>) -> Result<Self> {
        let hosts = Hosts::new(&options.hosts, &options.ports)?;
        if options.concurrent == 0 || options.concurrent > Semaphore::MAX_PERMITS {
            return Err(Error::argument("pictures fetched at once", "at least 1", options.concurrent));
        }
        for (what, time) in
            [("connect", options.connect_time), ("idle", options.idle_time), ("total", options.total_time)]
        {
            if time.is_zero() {
                return Err(Error::argument(format!("{what} time of fetching"), "more than none", "0"));
            }
        }
        // Named, since a program may link more than one provider.
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(DEFAULT_VERSIONS)
            .map_err(|e| Error::Unsupported(format!("TLS: {e}")))?;
        let mut config = config.with_root_certificates(network.roots()).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Sessions that are taken up again can be recognised.
        config.resumption = Resumption::disabled();
        let slots = Semaphore::new(options.concurrent);
        Ok(Self { options, hosts, network, tls: TlsConnector::from(Arc::new(config)), slots })
    }

    /// Fetches what is at a URL: its bytes, at most as many as a picture may have, and their room.
    pub async fn fetch(&self, url: &str, label: &str, pool: &Pool) -> Step<(Bytes, Room)> {
        // What needs no network is refused without waiting for a turn.
        let first = target(url, None, &self.hosts, label)?;
        let _slot = pool.in_time(self.slots.acquire(), label).await?;
        timeout(self.options.total_time, self.follow(first, label, pool)).await.map_err(|_| slow(label))?
    }

    async fn follow(&self, first: Target, label: &str, pool: &Pool) -> Step<(Bytes, Room)> {
        let mut at = first;
        for _ in 0..=self.options.max_redirects {
            let stream = self.connect(&at, label).await?;
            // Dropped, it ends the connection.
            let mut connection = JoinSet::new();
            let answer = self.ask(stream, &at, &mut connection, label).await?;
            match answer.status() {
                StatusCode::OK => return self.body(answer, label, pool).await,
                StatusCode::MOVED_PERMANENTLY
                | StatusCode::FOUND
                | StatusCode::SEE_OTHER
                | StatusCode::TEMPORARY_REDIRECT
                | StatusCode::PERMANENT_REDIRECT => {
                    at = self.next(&answer, &at.url, label)?;
                }
                status => {
                    return Err(IntakeError::new(
                        Refusal::UpstreamStatus,
                        label,
                        format_args!("its host answered with status {}", status.as_u16()),
                    ));
                }
            }
        }
        Err(IntakeError::new(Refusal::TooManyRedirects, label, "its URL redirects too often"))
    }

    fn next(&self, answer: &Response<Incoming>, from: &Url, label: &str) -> Step<Target> {
        let mut places = answer.headers().get_all(LOCATION).iter();
        let bad = || IntakeError::new(Refusal::BadUrl, label, "its URL redirects to no proper URL");
        let (Some(place), None) = (places.next(), places.next()) else { return Err(bad()) };
        let place = std::str::from_utf8(place.as_bytes()).map_err(|_| bad())?;
        target(place, Some(from), &self.hosts, label)
    }

    /// The addresses of a host, all of them public.
    async fn addresses(&self, host: &Host, label: &str) -> Step<Vec<IpAddr>> {
        // One message for both, or it would tell which names exist inside.
        let none = |refusal, detail: String| {
            IntakeError::new(refusal, label, "its host has no public address").with_detail(detail)
        };
        let found = match host {
            Host::Ipv4(address) => vec![IpAddr::V4(*address)],
            Host::Ipv6(address) => vec![IpAddr::V6(*address)],
            Host::Domain(name) => timeout(self.options.idle_time, self.network.resolve(name))
                .await
                .map_err(|_| slow(label))?
                .map_err(|e| none(Refusal::Unresolved, format!("{name}: {e}")))?,
        };
        if found.is_empty() {
            return Err(none(Refusal::Unresolved, format!("{host}: no addresses")));
        }
        // One that is not public among others is how rebinding begins.
        if let Some(address) = found.iter().find(|&&address| !is_public(address)) {
            return Err(none(Refusal::PrivateAddress, format!("{host} is {address}")));
        }
        Ok(found)
    }

    async fn connect(&self, at: &Target, label: &str) -> Step<TlsStream<TcpStream>> {
        let unreachable = || IntakeError::new(Refusal::Unreachable, label, "its host cannot be reached");
        let addresses = self.addresses(&at.host, label).await?;
        let mut last = None;
        for address in addresses.into_iter().take(MAX_ADDRESSES) {
            let to = SocketAddr::new(address.to_canonical(), at.port);
            match timeout(self.options.connect_time, self.network.connect(to)).await {
                Ok(Ok(stream)) => return self.secure(stream, at, label).await,
                Ok(Err(e)) => last = Some(unreachable().with_detail(format_args!("{to}: {e}"))),
                Err(_) => last = Some(slow(label).with_detail(to)),
            }
        }
        Err(last.unwrap_or_else(unreachable))
    }

    async fn secure(&self, stream: TcpStream, at: &Target, label: &str) -> Step<TlsStream<TcpStream>> {
        let untrusted = |detail: String| {
            IntakeError::new(Refusal::Tls, label, "no trusted TLS connection to its host").with_detail(detail)
        };
        let name = match &at.host {
            Host::Domain(name) => {
                ServerName::try_from(name.clone()).map_err(|e| untrusted(format!("{name}: {e}")))?
            }
            Host::Ipv4(address) => ServerName::IpAddress(IpAddr::V4(*address).into()),
            Host::Ipv6(address) => ServerName::IpAddress(IpAddr::V6(*address).into()),
        };
        timeout(self.options.connect_time, self.tls.connect(name, stream))
            .await
            .map_err(|_| slow(label))?
            .map_err(|e| untrusted(format!("{}: {e}", at.host)))
    }

    async fn ask(
        &self,
        stream: TlsStream<TcpStream>,
        at: &Target,
        connection: &mut JoinSet<()>,
        label: &str,
    ) -> Step<Response<Incoming>> {
        let broken = |e: hyper::Error| {
            IntakeError::new(Refusal::UpstreamBroken, label, "its host gave no proper answer").with_detail(e)
        };
        let exchange = async {
            let (mut sender, driver) = http1::Builder::new()
                .max_headers(MAX_FIELDS)
                .max_buf_size(MAX_HEAD)
                .handshake(TokioIo::new(stream))
                .await
                .map_err(broken)?;
            connection.spawn(async move {
                // What goes wrong here is told to the one who asked, too.
                let _ = driver.await;
            });
            let request = Request::get(at.path())
                .header(HOST, at.authority())
                .header(USER_AGENT, concat!("radapt/", env!("CARGO_PKG_VERSION")))
                .header(ACCEPT, "image/png, image/jpeg, image/webp, image/gif, image/bmp")
                .header(ACCEPT_ENCODING, "identity")
                .header(CONNECTION, "close")
                .body(Empty::<Bytes>::new())
                .map_err(|e| {
                    IntakeError::new(Refusal::BadUrl, label, "its URL is malformed").with_detail(e)
                })?;
            sender.send_request(request).await.map_err(broken)
        };
        timeout(self.options.idle_time, exchange).await.map_err(|_| slow(label))?
    }

    async fn body(&self, answer: Response<Incoming>, label: &str, pool: &Pool) -> Step<(Bytes, Room)> {
        let limit = pool.max_bytes();
        let large = || {
            IntakeError::new(
                Refusal::TooLarge,
                label,
                format_args!("it has more than {limit} bytes, which is the limit"),
            )
        };
        let mut body = answer.into_body();
        // Told beforehand it saves the trouble; what counts is what comes.
        if hyper::body::Body::size_hint(&body).lower() > limit {
            return Err(large());
        }
        let mut room = pool.room(1, label).await?;
        let mut bytes = Vec::new();
        loop {
            let frame = timeout(self.options.idle_time, body.frame()).await.map_err(|_| slow(label))?;
            let Some(frame) = frame else { return Ok((bytes.into(), room)) };
            let frame = frame.map_err(|e| {
                IntakeError::new(Refusal::UpstreamBroken, label, "its host broke off").with_detail(e)
            })?;
            let Ok(data) = frame.into_data() else { continue };
            let length = bytes.len() as u64 + data.len() as u64;
            if length > limit {
                return Err(large());
            }
            // A buffer that grows may be twice as large as what is in it.
            pool.widen(&mut room, 2 * length, label)?;
            bytes.extend_from_slice(&data);
        }
    }
}

fn slow(label: &str) -> IntakeError {
    IntakeError::new(Refusal::Timeout, label, "fetching it took too long")
}
