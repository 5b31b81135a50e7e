//! What fetching needs of the network.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use futures::future::BoxFuture;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::rustls::RootCertStore;

/// Names, connections and trust. [`super::Intake::new`] takes the system's; tests give their own.
///
/// Which addresses are allowed is not asked here: they are checked between `resolve` and
/// `connect`, whatever a network says.
pub trait Network: Send + Sync {
    /// The addresses of a name, which is in ASCII and without a dot at its end. Asked once per hop.
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>>;

    /// Connects to an address that was checked.
    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>>;

    /// The certificate authorities to trust.
    fn roots(&self) -> RootCertStore;
}

/// The system's resolver and sockets, and Mozilla's certificate authorities.
pub struct System {
    /// The system's resolver blocks a thread, and cannot be interrupted.
    lookups: Arc<Semaphore>,
}

impl System {
    /// With at most so many lookups at once.
    pub fn new(lookups: usize) -> Self {
        Self { lookups: Arc::new(Semaphore::new(lookups)) }
    }
}

impl Network for System {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            let permit = Arc::clone(&self.lookups).acquire_owned().await.map_err(io::Error::other)?;
            // The dot keeps the system from trying the name in domains of its own.
            let name = format!("{name}.");
            let found = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                (name.as_str(), 443).to_socket_addrs()
            });
            Ok(found.await.map_err(io::Error::other)??.map(|found| found.ip()).collect())
        })
    }

    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(to))
    }

    fn roots(&self) -> RootCertStore {
        RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() }
    }
}
