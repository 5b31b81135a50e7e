//! The sockets: connections with limits of their own, and an end in which none is cut off.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::gate::Gate;
use super::metrics::Metrics;

/// How connections are taken.
#[derive(Debug, Clone)]
pub struct ListenOptions {
    /// Open connections at most; further ones wait unaccepted.
    pub connections: usize,
    /// How long a request's headers may take to arrive, and a connection may idle before them.
    pub header_time: Duration,
    /// How long after the signal to stop `/ready` alone says so, and requests are taken as before: time
    /// for a load balancer to notice.
    pub notice: Duration,
    /// How long new requests are answered with 503 after that, so that whoever sends
    /// them hears of it before the door is shut.
    pub linger: Duration,
    /// How long running requests have to end after that.
    pub drain_time: Duration,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            connections: 1024,
            header_time: Duration::from_secs(15),
            notice: Duration::ZERO,
            linger: Duration::from_secs(3),
            drain_time: Duration::from_secs(60),
        }
    }
}

/// How often a file of keys is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// Serves until `stop` comes, then drains: for [`ListenOptions::notice`] only `/ready` says that it
/// does, for [`ListenOptions::linger`] the gate turns new requests away with 503, then the door is
/// shut, connections close as they fall idle, and what still runs after
/// [`ListenOptions::drain_time`] is cut off. Says whether nothing had to be.
pub async fn listen(
    listener: TcpListener,
    router: Router,
    gate: Arc<Gate>,
    options: ListenOptions,
    stop: impl Future<Output = ()>,
) -> bool {
    let places = Arc::new(Semaphore::new(options.connections.clamp(1, Semaphore::MAX_PERMITS)));
    let graceful = GracefulShutdown::new();
    let metrics: Arc<Metrics> = gate.metrics.clone();
    let look = tokio::spawn(look_at_keys(gate.clone()));
    let end = async {
        stop.await;
        gate.leave();
        tokio::time::sleep(options.notice).await;
        gate.drain();
        tokio::time::sleep(options.linger).await;
    };
    let mut end = std::pin::pin!(end);
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.ok()?;
            Some((listener.accept().await, place))
        };
        let (accepted, place) = tokio::select! {
            found = accepted => match found {
                Some(found) => found,
                None => break,
            },
            () = &mut end => break,
            Some(_) = tasks.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, or the asker was gone before it was heard.
                tracing::warn!(target: "radapt::server", %error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // Pieces of a streamed answer are small and should not wait for each other.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(options.header_time)
            .max_headers(64)
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        let gauge = metrics.connections.clone();
        gauge.inc();
        tasks.spawn(async move {
            // What breaks a connection is its asker's affair.
            let _ = connection.await;
            gauge.dec();
            drop(place);
        });
    }
    drop(listener);
    look.abort();
    let ended = tokio::time::timeout(options.drain_time, graceful.shutdown()).await.is_ok();
    if !ended {
        tracing::warn!(target: "radapt::server", connections = metrics.connections.get(), "cut off while draining");
    }
    tasks.shutdown().await;
    ended
}

async fn look_at_keys(gate: Arc<Gate>) {
    let mut ticks = tokio::time::interval(LOOK);
    loop {
        ticks.tick().await;
        let Some(keys) = gate.keys() else { return };
        match keys.refresh() {
            Ok(true) => tracing::info!(target: "radapt::server", keys = keys.len(), "read the keys again"),
            Ok(false) => {}
            Err(error) => {
                tracing::error!(target: "radapt::server", %error, "the keys stay as they were");
            }
        }
    }
}
