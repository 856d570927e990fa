//! Connections that did not prove anything yet: few in all and from one address, and not for long.
//!
//! A connection has a deadline until a stream on it is let in, and again after its last one ended. So whoever has no
//! token holds a bounded number of connections for a bounded time, and agents that are in take no room here.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::transport::server::Connected;

/// Connections that wait in all.
const WAITING: usize = 1024;

/// Connections that wait from one address. Many nodes may share one behind address translation, and come all at once
/// after a restart; those that find no room dial again.
const WAITING_PER_ADDRESS: usize = 256;

/// Who waits.
#[derive(Debug, Clone)]
pub(super) struct Lobby {
    waiting: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
    entry: Duration,
}

impl Lobby {
    pub(super) fn new(entry: Duration) -> Self {
        Self { waiting: Arc::default(), entry }
    }

    /// Takes a connection in, if there is room.
    pub(super) fn admit(&self, stream: TcpStream, address: IpAddr) -> Option<Connection> {
        let place = Place::take(&self.waiting, address)?;
        let state = State {
            place: Some(place),
            streams: 0,
            deadline: Instant::now() + self.entry,
            entry: self.entry,
        };
        let pass = Pass(Arc::new(Mutex::new(state)));
        // Latency counts more than the few bytes saved. If it cannot be set, it works all the same.
        let _kept = stream.set_nodelay(true);
        let alarm = Box::pin(sleep_until(pass.lock().deadline));
        Some(Connection { stream, pass, alarm })
    }
}

/// A place of one that waits; given back when dropped.
#[derive(Debug)]
struct Place {
    waiting: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
    address: IpAddr,
}

impl Place {
    fn take(waiting: &Arc<Mutex<BTreeMap<IpAddr, usize>>>, address: IpAddr) -> Option<Self> {
        let mut counts = lock(waiting);
        if counts.values().sum::<usize>() >= WAITING {
            return None;
        }
        let count = counts.entry(address).or_default();
        if *count >= WAITING_PER_ADDRESS {
            return None;
        }
        *count += 1;
        Some(Self { waiting: waiting.clone(), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = lock(&self.waiting);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct State {
    place: Option<Place>,
    /// Streams that were let in and go on.
    streams: usize,
    /// When the connection ends if no stream is in.
    deadline: Instant,
    entry: Duration,
}

/// By which the streams of a connection tell it that they were let in.
#[derive(Debug, Clone)]
pub(super) struct Pass(Arc<Mutex<State>>);

impl Pass {
    /// A stream is in until the guard is dropped.
    pub(super) fn enter(&self) -> Inside {
        let mut state = self.lock();
        state.place = None;
        state.streams += 1;
        Inside(self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

/// A stream that was let in.
#[derive(Debug)]
pub(super) struct Inside(Pass);

impl Drop for Inside {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.streams -= 1;
        state.deadline = Instant::now() + state.entry;
    }
}

/// A connection that ends by itself when it proves nothing in time.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    pass: Pass,
    /// Rings at the deadline, or earlier when that has moved.
    alarm: Pin<Box<Sleep>>,
}

impl Connection {
    /// Ready when the connection must end; else wakes the task when to look again.
    fn poll_deadline(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while self.alarm.as_mut().poll(context).is_ready() {
            let now = Instant::now();
            let (is_in, deadline, entry) = {
                let state = self.pass.lock();
                (state.streams > 0, state.deadline, state.entry)
            };
            if !is_in && deadline <= now {
                return Poll::Ready(());
            }
            // While a stream is in, nobody rings when it ends: look as often as the entry lasts.
            self.alarm.as_mut().reset(if is_in { now + entry } else { deadline });
        }
        Poll::Pending
    }
}

impl Connected for Connection {
    type ConnectInfo = Pass;

    fn connect_info(&self) -> Pass {
        self.pass.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Whoever serves a connection always waits for what it reads, so here is where the time is kept.
        if self.poll_deadline(context).is_ready() {
            let why = "no agent proved itself in time";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn places_are_bounded_by_address_and_in_all_and_given_back() {
        let waiting = Arc::default();
        let mut places = Vec::new();
        while let Some(place) = Place::take(&waiting, address(1)) {
            places.push(place);
        }
        assert_eq!(places.len(), WAITING_PER_ADDRESS);
        for last in 2..=255 {
            while let Some(place) = Place::take(&waiting, address(last)) {
                places.push(place);
            }
        }
        assert_eq!(places.len(), WAITING);
        drop(places);
        assert!(lock(&waiting).is_empty());
        assert!(Place::take(&waiting, address(1)).is_some());
    }
}
