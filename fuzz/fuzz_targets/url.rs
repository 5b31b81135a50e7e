//! A picture's URL, through the server's intake. Fetching is on, but there is no network: what the
//! intake would connect to must be public, and named by a rule.
#![no_main]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock};

use futures::future::{BoxFuture, FutureExt};
use libfuzzer_sys::fuzz_target;
use radapt::image::DecodeLimits;
use radapt::server::intake::{FetchOptions, Intake, IntakeOptions, Network};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio_rustls::rustls::RootCertStore;

/// Names stand for one public address; no connection is made.
struct Nowhere;

impl Network for Nowhere {
    fn resolve<'a>(&'a self, name: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        assert!(name == "example.org" || name.ends_with(".pics.example.org"), "asked for {name}");
        async { Ok(vec![IpAddr::from([93, 184, 216, 34])]) }.boxed()
    }

    fn connect(&self, to: SocketAddr) -> BoxFuture<'_, io::Result<TcpStream>> {
        let allowed = [IpAddr::from([93, 184, 216, 34]), IpAddr::from([8, 8, 8, 8])];
        assert!(allowed.contains(&to.ip()) && to.port() == 443, "would connect to {to}");
        async { Err(io::ErrorKind::ConnectionRefused.into()) }.boxed()
    }

    fn roots(&self) -> RootCertStore {
        RootCertStore::empty()
    }
}

static INTAKE: LazyLock<(Runtime, Intake)> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread().enable_time().build().unwrap();
    let options = IntakeOptions {
        limits: DecodeLimits { max_bytes: 1 << 16, max_pixels: 1 << 16, max_memory: 1 << 20 },
        memory: 8 << 20,
        fetch: Some(FetchOptions::new(["example.org", "*.pics.example.org", "8.8.8.8"])),
        ..Default::default()
    };
    (runtime, Intake::with_network(options, Arc::new(Nowhere)).unwrap())
});

fuzz_target!(|url: &str| {
    let (runtime, intake) = &*INTAKE;
    if let Err(error) = runtime.block_on(intake.picture(url, "fuzz")) {
        assert!((400..500).contains(&error.refusal.status()), "{error}");
    }
});
