//! Bodies that are lent: their bytes stay where they are, and go out in pieces.
//!
//! The client wants to own what it sends, for it may still be sending when the caller has given up.
//! Copying a pack would double its memory, so it is asked for piece by piece: the thread that waits
//! for the answer hands out copies of a few pieces at a time.

use std::io::IoSlice;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;
use tokio::time::error::Elapsed;
use tokio::time::timeout;

/// Bytes of a piece.
const PIECE: usize = 256 << 10;

/// Pieces under way.
const PIECES: usize = 2;

/// The client's end.
pub(super) struct Lent {
    pieces: mpsc::Receiver<Bytes>,
    left: u64,
}

impl Body for Lent {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        self.pieces.poll_recv(context).map(|piece| match piece {
            Some(piece) => {
                self.left = self.left.saturating_sub(piece.len() as u64);
                Some(Ok(Frame::data(piece)))
            }
            // The caller has given up.
            None => Some(Err(std::io::ErrorKind::BrokenPipe.into())),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// The caller's end.
pub(super) struct Lender(mpsc::Sender<Bytes>);

/// A body of `len` bytes, and what hands them out.
pub(super) fn lend(len: u64) -> (Lent, Lender) {
    let (sender, pieces) = mpsc::channel(PIECES);
    (Lent { pieces, left: len }, Lender(sender))
}

impl Lender {
    /// Hands out all bytes, as fast as they are taken and `limit` allows.
    ///
    /// # Errors
    /// When one piece was not taken within `patience`.
    pub(super) async fn hand_out(
        self,
        parts: &[IoSlice<'_>],
        limit: &Limit,
        patience: Duration,
    ) -> Result<(), Elapsed> {
        for piece in parts.iter().flat_map(|part| part.chunks(PIECE)) {
            limit.wait(piece.len()).await;
            let sent = timeout(patience, self.0.send(Bytes::copy_from_slice(piece))).await?;
            if sent.is_err() {
                return Ok(()); // the request has ended
            }
        }
        // The body must not see the channel closed before it has taken everything.
        timeout(patience, self.0.closed()).await
    }
}

/// A limit of bytes a second, shared by all transfers in one direction.
pub(super) struct Limit {
    bytes_per_second: Option<u64>,
    /// When what was let through so far will have been sent.
    free_at: Mutex<Instant>,
}

impl Limit {
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may pass.
    pub(super) async fn wait(&self, bytes: usize) {
        if let Some(delay) = self.reserve(bytes, Instant::now()) {
            tokio::time::sleep(delay).await;
        }
    }

    fn reserve(&self, bytes: usize, now: Instant) -> Option<Duration> {
        let rate = self.bytes_per_second?.max(1);
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = (*free_at).max(now);
        *free_at = begin + Duration::from_secs_f64(bytes as f64 / rate as f64);
        begin.checked_duration_since(now).filter(|delay| !delay.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_spreads_transfers_over_time() {
        let limit = Limit::new(Some(1000));
        let now = Instant::now() + Duration::from_secs(10);
        assert_eq!(limit.reserve(500, now), None);
        assert_eq!(limit.reserve(500, now), Some(Duration::from_millis(500)));
        assert_eq!(limit.reserve(1, now), Some(Duration::from_secs(1)));
        assert_eq!(limit.reserve(1, now + Duration::from_secs(5)), None, "time not used is lost");
        assert_eq!(Limit::new(None).reserve(1 << 40, now), None);
    }
}
