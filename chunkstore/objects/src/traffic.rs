//! Requests and bytes by kind, because object stores bill them.

use std::fmt;

/// What a request asks of the store, as price lists divide them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// PUT and the requests of a multipart upload.
    Write,
    /// GET of an object.
    Read,
    /// HEAD of an object.
    Stat,
    /// Pages of listings.
    List,
    /// DELETE, of one object or of many at once.
    Delete,
}

/// Requests sent and bytes transferred. Every attempt counts, those that failed included, because
/// every attempt is billed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Requests by [`Kind`], in its order.
    pub requests: [u64; 5],
    /// How many of them did what was asked, by [`Kind`].
    pub done: [u64; 5],
    /// How many of them repeated one that had failed.
    pub retries: u64,
    /// Bytes of bodies sent.
    pub bytes_sent: u64,
    /// Bytes of bodies received.
    pub bytes_received: u64,
}

impl Traffic {
    /// Requests of `kind`.
    pub fn of(&self, kind: Kind) -> u64 {
        self.requests[kind as usize]
    }

    /// Requests of every kind.
    pub fn total(&self) -> u64 {
        self.requests.iter().sum()
    }
}

impl std::ops::Add for Traffic {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        for (own, others) in [(&mut self.requests, other.requests), (&mut self.done, other.done)] {
            own.iter_mut().zip(others).for_each(|(requests, more)| *requests += more);
        }
        Self {
            retries: self.retries + other.retries,
            bytes_sent: self.bytes_sent + other.bytes_sent,
            bytes_received: self.bytes_received + other.bytes_received,
            ..self
        }
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |kind| self.of(kind);
        write!(
            f,
            "{} requests ({} write, {} read, {} stat, {} list, {} delete; {} repeated)",
            self.total(),
            of(Kind::Write),
            of(Kind::Read),
            of(Kind::Stat),
            of(Kind::List),
            of(Kind::Delete),
            self.retries
        )
    }
}
