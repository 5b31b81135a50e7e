//! A network for the intake's tests: names and addresses as the test says, TLS servers that
//! misbehave by script, and a listener that stands for everything inside that must not be reached.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use radapt::server::intake::Network;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::{DEFAULT_VERSIONS, RootCertStore, ServerConfig};

/// What a server does next with a connection.
#[derive(Clone)]
pub enum Do {
    Send(Vec<u8>),
    Wait(Duration),
    /// These bytes again and again, so far apart.
    Repeat(Vec<u8>, Duration),
}

/// What a name stands for.
#[derive(Clone)]
pub enum Name {
    /// The addresses of the first lookup, the second, ...; the last ones stay.
    Is(Vec<Vec<IpAddr>>),
    Fails,
    Hangs,
}

/// Where a public address leads.
#[derive(Clone, Copy)]
pub enum Route {
    To(SocketAddr),
    Refused,
    Hangs,
}

/// A network of the test's own.
pub struct Net {
    names: HashMap<String, Name>,
    routes: HashMap<IpAddr, Route>,
    roots: RootCertStore,
    inside: Inside,
    lookups: Mutex<HashMap<String, usize>>,
    dialled: Mutex<Vec<SocketAddr>>,
}

impl Net {
    pub fn new(
        names: HashMap<String, Name>,
        routes: HashMap<IpAddr, Route>,
        roots: RootCertStore,
        inside: Inside,
    ) -> Self {
        Self { names, routes, roots, inside, lookups: Mutex::default(), dialled: Mutex::default() }
    }

    pub fn lookups(&self, name: &str) -> usize {
        self.lookups.lock().unwrap().get(name).copied().unwrap_or(0)
    }

    /// Every address that a connection was asked for.
    pub fn dialled(&self) -> Vec<SocketAddr> {
        self.dialled.lock().unwrap().clone()
    }

    pub fn reached_inside(&self) -> usize {
        self.inside.accepted()
    }
}

impl Network for Net {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        let before = {
            let mut lookups = self.lookups.lock().unwrap();
            let count = lookups.entry(name.to_owned()).or_default();
            *count += 1;
            *count - 1
        };
        Box::pin(async move {
            match self.names.get(name) {
                Some(Name::Is(answers)) => Ok(answers[before.min(answers.len() - 1)].clone()),
                Some(Name::Hangs) => std::future::pending().await,
                Some(Name::Fails) | None => Err(io::Error::other("no such name")),
            }
        })
    }

    /// What is not known to be public leads inside.
    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        self.dialled.lock().unwrap().push(to);
        Box::pin(async move {
            match self.routes.get(&to.ip()) {
                Some(Route::To(server)) => TcpStream::connect(server).await,
                Some(Route::Refused) => Err(io::ErrorKind::ConnectionRefused.into()),
                Some(Route::Hangs) => std::future::pending().await,
                None => TcpStream::connect(self.inside.address).await,
            }
        })
    }

    fn roots(&self) -> RootCertStore {
        self.roots.clone()
    }
}

/// A listener that counts who comes.
pub struct Inside {
    pub address: SocketAddr,
    accepted: Arc<AtomicUsize>,
}

impl Inside {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let accepted = Arc::new(AtomicUsize::new(0));
        let (address, count) = (listener.local_addr().unwrap(), Arc::clone(&accepted));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecret").await;
            }
        });
        Self { address, accepted }
    }

    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

/// A certificate authority.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    pub fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        roots
    }

    /// A server's certificate for these names; `expired` long ago.
    pub fn certify(&self, names: &[&str], expired: bool) -> TlsAcceptor {
        let mut params =
            CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
        if expired {
            params.not_before = rcgen::date_time_ymd(2001, 1, 1);
            params.not_after = rcgen::date_time_ymd(2002, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(DEFAULT_VERSIONS)
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}

/// What each request said: its head, whole.
pub type Heads = Arc<Mutex<Vec<String>>>;

/// Starts a TLS server whose answers depend on the path.
pub async fn serve(
    tls: TlsAcceptor,
    answer: impl Fn(&str) -> Vec<Do> + Send + Sync + 'static,
) -> (SocketAddr, Heads) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (heads, answer) = (Heads::default(), Arc::new(answer));
    let seen = Arc::clone(&heads);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (tls, answer, seen) = (tls.clone(), Arc::clone(&answer), Arc::clone(&seen));
            tokio::spawn(async move {
                let mut stream = tls.accept(stream).await?;
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await?);
                }
                let head = String::from_utf8_lossy(&head).into_owned();
                let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
                seen.lock().unwrap().push(head);
                act(&mut stream, answer(&path)).await?;
                stream.shutdown().await
            });
        }
    });
    (address, heads)
}

/// Starts a server without TLS, which does the same to everyone.
pub async fn serve_plain(script: Vec<Do>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let script = script.clone();
            tokio::spawn(async move { act(&mut stream, script).await });
        }
    });
    address
}

async fn act(stream: &mut (impl AsyncWrite + Unpin), script: Vec<Do>) -> io::Result<()> {
    for step in script {
        match step {
            Do::Send(bytes) => stream.write_all(&bytes).await?,
            Do::Wait(time) => tokio::time::sleep(time).await,
            Do::Repeat(bytes, pause) => loop {
                stream.write_all(&bytes).await?;
                stream.flush().await?;
                tokio::time::sleep(pause).await;
            },
        }
        stream.flush().await?;
    }
    Ok(())
}
