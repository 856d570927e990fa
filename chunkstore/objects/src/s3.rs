//! A store of objects in a bucket of an S3 service: OBS, AWS, Ceph, and what else speaks S3.
//!
//! Requests are made by the AWS SDK on a small runtime of the store's own, while the caller's thread
//! waits; so concurrency, and the memory for it, stays with the caller's threads. Retries are done
//! here, because it matters whether an attempt that failed may have taken effect: a `create` that
//! finds its own object there, stored by an attempt whose answer was lost, has created it.
//!
//! *What is sent.* Bodies go unsigned (`UNSIGNED-PAYLOAD`): hashing them would cost more than all else,
//! OBS documents this form, and what is stored is authenticated by those who read it. What the store
//! received is verified by TLS, or by MD5 where there is none. Never chunked signatures or trailers,
//! which OBS and older Ceph refuse. Listings use version 1, which every store has, with the last key
//! as marker, so that none is cut short silently.
//!
//! *Dated requests* are signed with the given date: the store refuses a signature that is more than
//! 15 minutes old or young by its own clock (`RequestTimeTooSkewed`).

use std::fmt;
use std::io::{IoSlice, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::{ByteStream, DateTime, SdkBody};
use aws_sdk_s3::types::{
    CompletedMultipartUpload, CompletedPart, Delete, MultipartUpload, ObjectIdentifier,
};
use aws_smithy_async::time::StaticTimeSource;
use md5::{Digest, Md5};

mod body;
mod client;
mod config;
mod credentials;
mod failure;

pub use config::{Addressing, S3Config, Stop};
pub use credentials::{AccessKey, CredentialSource, SharedKey};

use crate::{
    Created, Error, ErrorKind, Kind, ObjectMeta, ObjectStore, ReadCost, Result, Traffic, key,
};
use body::{Lender, Limit, lend};
use client::{FileSystemMark, WithMd5, base64, without_timeout};
use credentials::Provider;
use failure::{Failure, backoff, classify};

/// Bodies up to this size are copied rather than lent.
const SMALL: u64 = 256 << 10;

/// Bytes of a part of a multipart upload. Stores ask for at least 5 MiB.
const PART: usize = 8 << 20;

/// Metadata of an object that was uploaded in parts: what tells it from one that another uploaded.
const UPLOAD_MARK: &str = "upload";

/// Keys that a request is tried with: one may be exchanged between asking which it is and signing.
const KEYS_MAX: usize = 4;

/// How often a request that waits for another key looks for it.
const LOOK_FOR_KEY: Duration = Duration::from_millis(200);

/// Keys in one request to delete: the limit of S3 and OBS.
const DELETE_MAX: usize = 1000;

type Attempt<T> = std::result::Result<T, Failure>;

/// A store of objects below a prefix of a bucket.
pub struct S3Store {
    config: S3Config,
    client: Client,
    credentials: Arc<Provider>,
    /// Whether the store has accepted a key already.
    accepted: AtomicBool,
    upload: Limit,
    download: Limit,
    counters: Counters,
    /// Behind the client, which needs it to be dropped.
    runtime: tokio::runtime::Runtime,
}

#[derive(Default)]
struct Counters {
    requests: [AtomicU64; 5],
    done: [AtomicU64; 5],
    retries: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Store").field("config", &self.config).finish_non_exhaustive()
    }
}

/// A body to be sent.
#[derive(Clone, Copy)]
struct Payload<'a> {
    parts: &'a [IoSlice<'a>],
    len: u64,
}

impl<'a> Payload<'a> {
    fn new(parts: &'a [IoSlice<'a>]) -> Self {
        Self { parts, len: parts.iter().map(|part| part.len() as u64).sum() }
    }

    fn copy(&self) -> Vec<u8> {
        self.parts.iter().flat_map(|part| part.iter().copied()).collect()
    }

    fn md5(&self) -> String {
        let mut md5 = Md5::new();
        self.parts.iter().for_each(|part| md5.update(&**part));
        base64(&md5.finalize())
    }
}

/// On what condition, and with which date, an object is written.
#[derive(Clone, Copy, Default)]
struct Terms {
    if_absent: bool,
    date: Option<SystemTime>,
}

impl S3Store {
    /// Opens the store: looks at the bucket once, so that a wrong key, a missing bucket or a wrong
    /// endpoint is told now.
    ///
    /// # Errors
    /// `Invalid` or `PermissionDenied` with what to change; `Unavailable` when nobody answers.
    pub fn open(config: S3Config) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("s3")
            .enable_all()
            .build()
            .map_err(|error| Error::from_io("open", config.location(), error))?;
        let credentials = Arc::new(Provider::new(config.credentials.clone()));
        let client = client::client(&config, Arc::clone(&credentials))?;
        let store = Self {
            upload: Limit::new(config.limit_upload),
            download: Limit::new(config.limit_download),
            counters: Counters::default(),
            config,
            client,
            credentials,
            accepted: AtomicBool::new(false),
            runtime,
        };
        let known = store.credentials.get();
        known.map_err(|why| {
            Error::new(ErrorKind::PermissionDenied, "open", store.location()).because(why)
        })?;
        store.look_at_bucket()?;
        Ok(store)
    }

    /// One listing tells what asking for the bucket itself does not: some stores answer that
    /// whatever the addressing. But only the bucket itself tells that it is a parallel file system.
    fn look_at_bucket(&self) -> Result<()> {
        self.run("open", &self.location(), Kind::List, async |_: &mut History| {
            let listing = self.client.list_objects().bucket(&self.config.bucket).max_keys(1);
            let listed = listing.prefix(&self.config.prefix).send().await;
            listed.map(drop).map_err(|error| classify(&error))
        })?;
        self.run("open", &self.location(), Kind::Stat, async |_: &mut History| {
            let mark = FileSystemMark::default();
            let head = self.client.head_bucket().bucket(&self.config.bucket).customize();
            let answer = head.interceptor(mark.clone()).send().await;
            if mark.is_set() {
                return Err(parallel_file_system());
            }
            match answer.map_err(|error| classify(&error)) {
                // The listing has shown that the bucket can be used; this may be forbidden.
                Err(failure) if failure.retryable => Err(failure),
                _ => Ok(()),
            }
        })
    }

    fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.config.prefix)
    }

    /// Makes attempts until one succeeds or trying again cannot help.
    fn run<T>(
        &self,
        operation: &'static str,
        key: &str,
        kind: Kind,
        mut attempt: impl AsyncFnMut(&mut History) -> Attempt<T>,
    ) -> Result<T> {
        let stopped =
            || Failure::new(ErrorKind::Unavailable, "the program has stopped waiting for it");
        let done = async {
            tokio::select! {
                biased;
                () = self.config.stop.stopped() => Err(stopped()),
                done = self.attempts(kind, &mut attempt) => done,
            }
        };
        self.runtime
            .block_on(done)
            .map_err(|failure| Error::new(failure.kind, operation, key).because(failure.message))
    }

    async fn attempts<T>(
        &self,
        kind: Kind,
        attempt: &mut impl AsyncFnMut(&mut History) -> Attempt<T>,
    ) -> Attempt<T> {
        let mut history = History::default();
        let mut keys = 1;
        let begun = Instant::now();
        loop {
            self.counters.requests[kind as usize].fetch_add(1, Ordering::Relaxed);
            if history.attempts > 0 {
                self.counters.retries.fetch_add(1, Ordering::Relaxed);
            }
            history.attempts += 1;
            let generation = self.credentials.generation();
            let failure = match attempt(&mut history).await {
                Ok(done) => {
                    self.counters.done[kind as usize].fetch_add(1, Ordering::Relaxed);
                    self.accepted.store(true, Ordering::Relaxed);
                    return Ok(done);
                }
                Err(failure) => failure,
            };
            history.unknown |= failure.unknown;
            if failure.credentials && keys < KEYS_MAX && self.finds_another_key(generation).await {
                keys += 1;
                continue;
            }
            if !failure.retryable {
                return Err(failure);
            }
            let enough = history.attempts >= self.config.attempts.max(1);
            if enough && begun.elapsed() >= self.config.patience {
                let message = format!("{}; tried {} times", failure.message, history.attempts);
                return Err(Failure { message, ..failure });
            }
            let mut random = [0; 8];
            // Without randomness the wait is merely less spread.
            let _unneeded = getrandom::fill(&mut random);
            tokio::time::sleep(backoff(history.attempts, u64::from_le_bytes(random))).await;
        }
    }

    /// After the store refused the key of `generation`: whether there is another one, or will be soon.
    async fn finds_another_key(&self, generation: u64) -> bool {
        let accepted = self.accepted.load(Ordering::Relaxed);
        let patience = if accepted { self.credentials.patience() } else { Duration::ZERO };
        let begun = Instant::now();
        while !self.credentials.refresh(generation) {
            if begun.elapsed() >= patience {
                return false;
            }
            tokio::time::sleep(LOOK_FOR_KEY).await;
        }
        true
    }

    fn write(
        &self,
        operation: &'static str,
        key: &str,
        payload: Payload<'_>,
        terms: Terms,
    ) -> Result<Created> {
        let full_key = self.full_key(key);
        let md5 = self.config.sends_md5().then(|| payload.md5());
        let found =
            self.run(operation, key, Kind::Write, async |history: &mut History| {
                match self.put(&full_key, payload, md5.as_deref(), terms).await {
                    Ok(()) => Ok(Found::Nothing),
                    Err(failure) if terms.if_absent && failure.status == Some(412) => {
                        Ok(if history.unknown { Found::Perhaps } else { Found::Other })
                    }
                    Err(failure) => Err(failure),
                }
            })?;
        match found {
            Found::Nothing => Ok(Created::New),
            Found::Other => Ok(Created::AlreadyExists),
            // An attempt whose answer was lost may have stored what is there.
            Found::Perhaps if self.is_stored(key, payload)? => Ok(Created::New),
            Found::Perhaps => Ok(Created::AlreadyExists),
        }
    }

    /// One PUT.
    async fn put(
        &self,
        full_key: &str,
        payload: Payload<'_>,
        md5: Option<&str>,
        terms: Terms,
    ) -> Attempt<()> {
        let request = self
            .client
            .put_object()
            .bucket(&self.config.bucket)
            .key(full_key)
            .content_length(payload.len.cast_signed())
            .set_content_md5(md5.map(str::to_owned))
            .set_if_none_match(terms.if_absent.then(|| "*".to_owned()));
        let send = async |body: SdkBody, mut config: aws_sdk_s3::config::Builder| {
            if let Some(date) = terms.date {
                config = config.time_source(StaticTimeSource::new(date));
            }
            let request = request.body(ByteStream::new(body)).customize().disable_payload_signing();
            let answer = request.config_override(config).send().await;
            answer.map(drop).map_err(|error| classify(&error))
        };
        self.counters.sent.fetch_add(payload.len, Ordering::Relaxed);
        if payload.len <= SMALL {
            self.upload.wait(payload.len as usize).await;
            return send(SdkBody::from(payload.copy()), aws_sdk_s3::Config::builder()).await;
        }
        let (lent, lender) = lend(payload.len);
        self.lend_to(send(SdkBody::from_body_1_x(lent), without_timeout()), lender, payload).await
    }

    /// Hands out pieces while the request is under way, and not longer; ends it when it does not get
    /// on.
    async fn lend_to<T>(
        &self,
        sending: impl Future<Output = Attempt<T>>,
        lender: Lender,
        payload: Payload<'_>,
    ) -> Attempt<T> {
        let patience = self.config.answer_within;
        let mut sending = std::pin::pin!(sending);
        let mut lending = std::pin::pin!(lender.hand_out(payload.parts, &self.upload, patience));
        let lent = tokio::select! {
            done = &mut sending => return done,
            lent = &mut lending => lent,
        };
        let answer = match lent {
            Ok(()) => tokio::time::timeout(patience, sending).await,
            Err(stalled) => Err(stalled),
        };
        answer.unwrap_or_else(|_| Err(Failure::passing("the upload did not get on")))
    }

    /// Whether the object has just these bytes.
    fn is_stored(&self, key: &str, payload: Payload<'_>) -> Result<bool> {
        if self.stat(key)?.size != payload.len {
            return Ok(false);
        }
        let mut theirs = vec![0; (payload.len as usize).min(1 << 20)];
        let mut offset = 0;
        for ours in payload.parts.iter().flat_map(|part| part.chunks(1 << 20)) {
            let theirs = theirs.get_mut(..ours.len()).unwrap_or_default();
            self.read_at(key, offset, theirs)?;
            if theirs != ours {
                return Ok(false);
            }
            offset += ours.len() as u64;
        }
        Ok(true)
    }

    /// Reads a range into `into`, which tells where to go on after an attempt that broke off.
    fn get(&self, key: &str, range: Range, limit: u64, into: &mut dyn Sink) -> Result<()> {
        let full_key = self.full_key(key);
        let mut done = 0;
        let mut size = None;
        let mut etag: Option<String> = None;
        self.run("read", key, Kind::Read, async |_: &mut History| {
            if done > 0 && into.check().is_ok() {
                // It broke off behind its last byte.
                return Ok(());
            }
            let request = self
                .client
                .get_object()
                .bucket(&self.config.bucket)
                .key(&full_key)
                .set_range(range.header(done, size))
                // What follows must belong to what came before.
                .set_if_match(etag.clone().filter(|_| done > 0));
            let answer = request.send().await.map_err(|error| classify(&error))?;
            let whole = match answer.content_range() {
                Some(range) => range.rsplit_once('/').and_then(|(_, size)| size.parse().ok()),
                None => answer.content_length().and_then(|len| u64::try_from(len).ok()),
            };
            let whole = whole.ok_or_else(|| Failure::passing("the answer has no length"))?;
            if whole > limit {
                let why = format!("it has {whole} bytes, the limit is {limit}");
                return Err(Failure::new(ErrorKind::TooLarge, why));
            }
            into.size(whole);
            size = Some(whole);
            etag = answer.e_tag().map(str::to_owned);
            let mut body = answer.body;
            loop {
                let piece = body.try_next().await;
                let piece = piece
                    .map_err(|error| Failure::passing(format!("the answer broke off: {error}")))?;
                let Some(piece) = piece else {
                    return into.check().map_err(|why| {
                        // A connection closed early looks like an end.
                        let failure = Failure::passing(why);
                        Failure { kind: ErrorKind::Truncated, ..failure }
                    });
                };
                self.counters.received.fetch_add(piece.len() as u64, Ordering::Relaxed);
                self.download.wait(piece.len()).await;
                into.put(&piece);
                done += piece.len() as u64;
            }
        })
    }

    async fn delete_batch(&self, keys: &[String], date: Option<SystemTime>) -> Attempt<()> {
        let objects = keys.iter().map(|key| {
            let id = ObjectIdentifier::builder().key(self.full_key(key)).build();
            id.map_err(|error| Failure::new(ErrorKind::Invalid, error.to_string()))
        });
        let delete = Delete::builder()
            .set_objects(Some(objects.collect::<Attempt<Vec<_>>>()?))
            .quiet(true)
            .build()
            .map_err(|error| Failure::new(ErrorKind::Invalid, error.to_string()))?;
        let request = self.client.delete_objects().bucket(&self.config.bucket).delete(delete);
        let mut request = request.customize().interceptor(WithMd5);
        if let Some(date) = date {
            request = request.config_override(dated(date));
        }
        let answer = request.send().await.map_err(|error| classify(&error))?;
        let failed = answer.errors().iter().find(|error| error.code() != Some("NoSuchKey"));
        failed.map_or(Ok(()), |error| {
            let code = error.code().unwrap_or_default();
            let status = match code {
                "AccessDenied" => 403,
                "InternalError" | "SlowDown" => 503,
                _ => 400,
            };
            let failure = failure::answered(status, code, error.message(), None);
            let key = error.key().unwrap_or("?");
            Err(Failure { message: format!("'{key}': {}", failure.message), ..failure })
        })
    }

    fn delete_keys(&self, keys: &[String], date: Option<SystemTime>) -> Result<()> {
        keys.iter().try_for_each(|key| key::validate("delete", key))?;
        for keys in keys.chunks(DELETE_MAX) {
            if let [key] = keys {
                self.delete_one(key, date)?;
                continue;
            }
            let first = keys.first().map_or("", |key| key);
            self.run("delete", first, Kind::Delete, async |_: &mut History| {
                self.delete_batch(keys, date).await
            })?;
        }
        Ok(())
    }

    fn delete_one(&self, key: &str, date: Option<SystemTime>) -> Result<()> {
        let full_key = self.full_key(key);
        self.run("delete", key, Kind::Delete, async |_: &mut History| {
            let request = self.client.delete_object().bucket(&self.config.bucket).key(&full_key);
            let mut request = request.customize();
            if let Some(date) = date {
                request = request.config_override(dated(date));
            }
            match request.send().await {
                Ok(_) => Ok(()),
                Err(error) => match classify(&error) {
                    failure if failure.kind == ErrorKind::NotFound => Ok(()),
                    failure => Err(failure),
                },
            }
        })
    }

    /// Uploads `first`, which is a whole part, and the rest of `body` in parts.
    fn multipart(&self, key: &str, first: Vec<u8>, body: &mut dyn Read) -> Result<Created> {
        let full_key = self.full_key(key);
        // Older servers do not look at the condition of a multipart upload.
        match self.stat(key) {
            Ok(_) => return Ok(Created::AlreadyExists),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mark = random_name()
            .map_err(|why| Error::new(ErrorKind::Io, "create", key).because(why.to_string()))?;
        let id = self.run("create", key, Kind::Write, async |_: &mut History| {
            let request = self.client.create_multipart_upload().bucket(&self.config.bucket);
            let request = request.key(&full_key).metadata(UPLOAD_MARK, &mark);
            let answer = request.send().await.map_err(|error| classify(&error))?;
            let id = answer.upload_id().map(str::to_owned);
            id.ok_or_else(|| Failure::new(ErrorKind::Io, "the store gave the upload no name"))
        })?;
        let parts = self.upload_parts(key, &full_key, &id, first, body);
        let result = parts.and_then(|parts| self.complete(key, &id, parts, &mark));
        if !matches!(result, Ok(Created::New)) {
            // If that fails, it goes as one that was never finished.
            let _left = self.abort(&full_key, &id);
        }
        result
    }

    fn upload_parts(
        &self,
        key: &str,
        full_key: &str,
        id: &str,
        first: Vec<u8>,
        body: &mut dyn Read,
    ) -> Result<Vec<CompletedPart>> {
        let mut parts = Vec::new();
        let mut part = first;
        while !part.is_empty() {
            let number = parts.len() as i32 + 1;
            let slices = [IoSlice::new(&part)];
            let payload = Payload::new(&slices);
            let md5 = self.config.sends_md5().then(|| payload.md5());
            let etag = self.run("create", key, Kind::Write, async |_: &mut History| {
                self.put_part(full_key, id, number, payload, md5.clone()).await
            })?;
            parts.push(CompletedPart::builder().part_number(number).set_e_tag(etag).build());
            part.clear();
            fill(&mut part, body).map_err(|error| Error::from_io("create", key, error))?;
        }
        Ok(parts)
    }

    /// Makes the object of its parts.
    fn complete(
        &self,
        key: &str,
        id: &str,
        parts: Vec<CompletedPart>,
        mark: &str,
    ) -> Result<Created> {
        let full_key = self.full_key(key);
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let found = self.run("create", key, Kind::Write, async |history: &mut History| {
            let request = self
                .client
                .complete_multipart_upload()
                .bucket(&self.config.bucket)
                .key(&full_key)
                .upload_id(id)
                .if_none_match("*")
                .multipart_upload(parts.clone());
            match request.send().await.map_err(|error| classify(&error)) {
                Ok(_) => Ok(Found::Nothing),
                // An upload that has been completed is no more.
                Err(failure)
                    if history.unknown
                        && (failure.status == Some(412) || failure.kind == ErrorKind::NotFound) =>
                {
                    Ok(Found::Perhaps)
                }
                Err(failure) if failure.status == Some(412) => Ok(Found::Other),
                Err(failure) => Err(failure),
            }
        })?;
        match found {
            Found::Nothing => Ok(Created::New),
            Found::Other => Ok(Created::AlreadyExists),
            Found::Perhaps => {
                let theirs = self.run("stat", key, Kind::Stat, async |_: &mut History| {
                    let request =
                        self.client.head_object().bucket(&self.config.bucket).key(&full_key);
                    let answer = request.send().await.map_err(|error| classify(&error))?;
                    Ok(answer.metadata().and_then(|all| all.get(UPLOAD_MARK)).cloned())
                })?;
                Ok(if theirs.as_deref() == Some(mark) {
                    Created::New
                } else {
                    Created::AlreadyExists
                })
            }
        }
    }

    async fn put_part(
        &self,
        full_key: &str,
        id: &str,
        number: i32,
        payload: Payload<'_>,
        md5: Option<String>,
    ) -> Attempt<Option<String>> {
        self.counters.sent.fetch_add(payload.len, Ordering::Relaxed);
        let (lent, lender) = lend(payload.len);
        let sending = async {
            let request = self
                .client
                .upload_part()
                .bucket(&self.config.bucket)
                .key(full_key)
                .upload_id(id)
                .part_number(number)
                .content_length(payload.len.cast_signed())
                .set_content_md5(md5)
                .body(ByteStream::new(SdkBody::from_body_1_x(lent)));
            let request = request.customize().disable_payload_signing();
            let answer = request.config_override(without_timeout()).send().await;
            answer.map(|part| part.e_tag().map(str::to_owned)).map_err(|error| classify(&error))
        };
        self.lend_to(sending, lender, payload).await
    }

    fn abort(&self, full_key: &str, id: &str) -> Result<()> {
        self.run("abort the upload of", full_key, Kind::Delete, async |_: &mut History| {
            let request = self.client.abort_multipart_upload().bucket(&self.config.bucket);
            match request.key(full_key).upload_id(id).send().await {
                Ok(_) => Ok(()),
                Err(error) => match classify(&error) {
                    failure if failure.kind == ErrorKind::NotFound => Ok(()),
                    failure => Err(failure),
                },
            }
        })
    }
}

/// The SDK's client alone, for what tests do that a store never does.
///
/// # Panics
/// When the configuration is wrong.
#[cfg(feature = "testing")]
pub(crate) fn test_client(config: &S3Config) -> Client {
    let credentials = Arc::new(Provider::new(config.credentials.clone()));
    client::client(config, credentials).expect("the test's configuration is right")
}

fn random_name() -> std::result::Result<String, getrandom::Error> {
    let mut random = [0; 16];
    getrandom::fill(&mut random)?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What earlier attempts of a request came to.
#[derive(Default)]
struct History {
    attempts: u32,
    /// One of them may have taken effect.
    unknown: bool,
}

/// What a create-if-absent came upon.
enum Found {
    Nothing,
    Other,
    /// Something, and an earlier attempt may have stored it.
    Perhaps,
}

/// Which bytes of an object.
#[derive(Clone, Copy)]
enum Range {
    All,
    From(u64, u64),
    Last(u64),
}

impl Range {
    /// The header that asks for what is missing when `done` bytes are there, of an object of `size` bytes,
    /// if that is known.
    fn header(self, done: u64, size: Option<u64>) -> Option<String> {
        match (self, size) {
            (Self::All, _) if done == 0 => None,
            (Self::All, _) => Some(format!("bytes={done}-")),
            (Self::From(from, len), _) => {
                Some(format!("bytes={}-{}", from + done, (from + len).saturating_sub(1)))
            }
            // The object may be shorter than what is asked for.
            (Self::Last(len), Some(size)) if done > 0 => {
                Some(format!("bytes={}-", size.saturating_sub(len) + done))
            }
            (Self::Last(len), _) => Some(format!("bytes=-{len}")),
        }
    }
}

/// Takes what is read.
trait Sink {
    /// Is told the size of the whole object.
    fn size(&mut self, _: u64) {}
    fn put(&mut self, piece: &[u8]);
    /// Whether everything has come.
    fn check(&self) -> std::result::Result<(), String>;
}

/// A buffer to be filled.
struct Buffer<'a> {
    buffer: &'a mut [u8],
    filled: usize,
}

impl Sink for Buffer<'_> {
    fn put(&mut self, piece: &[u8]) {
        let room = self.buffer.get_mut(self.filled..).unwrap_or_default();
        let len = piece.len().min(room.len());
        let (into, piece) = (room.get_mut(..len), piece.get(..len));
        if let Some((into, piece)) = into.zip(piece) {
            into.copy_from_slice(piece);
        }
        self.filled += len;
    }

    fn check(&self) -> std::result::Result<(), String> {
        let (filled, wanted) = (self.filled, self.buffer.len());
        if filled == wanted {
            Ok(())
        } else {
            Err(format!("it ended after {filled} of {wanted} bytes"))
        }
    }
}

/// Everything that comes.
#[derive(Default)]
struct Collected {
    bytes: Vec<u8>,
    size: u64,
    /// At most so many bytes are wanted.
    limit: u64,
}

impl Sink for Collected {
    fn size(&mut self, size: u64) {
        self.size = size;
    }

    fn put(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
    }

    fn check(&self) -> std::result::Result<(), String> {
        let (got, wanted) = (self.bytes.len() as u64, self.size.min(self.limit));
        if got == wanted { Ok(()) } else { Err(format!("it ended after {got} of {wanted} bytes")) }
    }
}

/// The configuration of a request that is signed with this date.
fn dated(date: SystemTime) -> aws_sdk_s3::config::Builder {
    aws_sdk_s3::Config::builder().time_source(StaticTimeSource::new(date))
}

fn parallel_file_system() -> Failure {
    let why = "the bucket is a parallel file system, which lacks what a repository needs: make an \
               object bucket";
    Failure::new(ErrorKind::Invalid, why)
}

/// In whole seconds: an answer about one object has no more, and a listing must not tell another time.
fn system_time(time: Option<&DateTime>) -> SystemTime {
    let whole = time.map(|time| DateTime::from_secs(time.secs()));
    whole.and_then(|time| time.try_into().ok()).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Reads until the part is full or the body ends.
fn fill(part: &mut Vec<u8>, body: &mut dyn Read) -> std::io::Result<()> {
    let room = (PART - part.len()) as u64;
    body.take(room).read_to_end(part).map(drop)
}

impl ObjectStore for S3Store {
    fn create(&self, key: &str, parts: &[IoSlice<'_>]) -> Result<Created> {
        key::validate("create", key)?;
        self.write("create", key, Payload::new(parts), Terms { if_absent: true, date: None })
    }

    fn replace(&self, key: &str, body: &[u8]) -> Result<()> {
        key::validate("replace", key)?;
        let parts = [IoSlice::new(body)];
        self.write("replace", key, Payload::new(&parts), Terms::default()).map(|_| ())
    }

    fn create_from(&self, key: &str, body: &mut dyn Read) -> Result<Created> {
        key::validate("create", key)?;
        let mut first = Vec::new();
        fill(&mut first, body).map_err(|error| Error::from_io("create", key, error))?;
        if first.len() < PART {
            return self.create(key, &[IoSlice::new(&first)]);
        }
        self.multipart(key, first, body)
    }

    fn replace_dated(&self, key: &str, body: &[u8], date: SystemTime) -> Result<()> {
        key::validate("replace", key)?;
        let parts = [IoSlice::new(body)];
        let terms = Terms { if_absent: false, date: Some(date) };
        self.write("replace", key, Payload::new(&parts), terms).map(|_| ())
    }

    fn delete_dated(&self, keys: &[String], date: SystemTime) -> Result<()> {
        self.delete_keys(keys, Some(date))
    }

    fn delete_all(&self, keys: &[String]) -> Result<()> {
        self.delete_keys(keys, None)
    }

    fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        key::validate("read", key)?;
        let mut all = Collected { limit: u64::MAX, ..Collected::default() };
        self.get(key, Range::All, limit, &mut all)?;
        Ok(all.bytes)
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        key::validate("read", key)?;
        if buf.is_empty() {
            return self.stat(key).map(drop);
        }
        let range = Range::From(offset, buf.len() as u64);
        let truncated = || {
            let end = offset.saturating_add(range_len(range));
            Error::new(ErrorKind::Truncated, "read", key).because(format!("it ends before {end}"))
        };
        if offset.checked_add(buf.len() as u64).is_none() {
            return Err(truncated());
        }
        let mut into = Buffer { buffer: buf, filled: 0 };
        match self.get(key, range, u64::MAX, &mut into) {
            Err(error) if error.kind() == ErrorKind::Truncated => Err(truncated()),
            result => result,
        }
    }

    fn read_tail(&self, key: &str, limit: usize) -> Result<(u64, Vec<u8>)> {
        key::validate("read", key)?;
        let mut tail = Collected { limit: limit as u64, ..Collected::default() };
        if limit == 0 {
            return Ok((self.stat(key)?.size, Vec::new()));
        }
        match self.get(key, Range::Last(limit as u64), u64::MAX, &mut tail) {
            // An empty object has no last byte.
            Err(error) if error.kind() == ErrorKind::Truncated => {
                let size = self.stat(key)?.size;
                if size == 0 { Ok((0, Vec::new())) } else { Err(error) }
            }
            result => result.map(|()| (tail.size, tail.bytes)),
        }
    }

    fn stat(&self, key: &str) -> Result<ObjectMeta> {
        key::validate("stat", key)?;
        let full_key = self.full_key(key);
        self.run("stat", key, Kind::Stat, async |_: &mut History| {
            let request = self.client.head_object().bucket(&self.config.bucket).key(&full_key);
            let answer = request.send().await.map_err(|error| classify(&error))?;
            Ok(ObjectMeta {
                key: key.to_owned(),
                size: answer.content_length().and_then(|len| len.try_into().ok()).unwrap_or(0),
                modified: system_time(answer.last_modified()),
            })
        })
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()> {
        key::validate_prefix("list", prefix)?;
        let full_prefix = self.full_key(prefix);
        let mut marker: Option<String> = None;
        loop {
            let page = self.run("list", prefix, Kind::List, async |_: &mut History| {
                let request = self
                    .client
                    .list_objects()
                    .bucket(&self.config.bucket)
                    .prefix(&full_prefix)
                    .set_marker(marker.clone());
                request.send().await.map_err(|error| classify(&error))
            })?;
            let last = page.contents().last().and_then(|object| object.key()).map(str::to_owned);
            for object in page.contents() {
                let key = object.key().and_then(|key| key.strip_prefix(&self.config.prefix));
                let Some(key) = key.filter(|key| key::validate("list", key).is_ok()) else {
                    continue; // not ours
                };
                each(ObjectMeta {
                    key: key.to_owned(),
                    size: object.size().and_then(|size| size.try_into().ok()).unwrap_or(0),
                    modified: system_time(object.last_modified()),
                })?;
            }
            if !page.is_truncated().unwrap_or(false) {
                return Ok(());
            }
            // A listing that does not go on would be taken for a complete one, or never end.
            if last.is_none() || last <= marker {
                let why = "the store says that there is more, and does not say where it goes on";
                return Err(Error::new(ErrorKind::Io, "list", prefix).because(why));
            }
            marker = last;
        }
    }

    fn delete(&self, key: &str) -> Result<()> {
        key::validate("delete", key)?;
        self.delete_one(key, None)
    }

    fn remove_unfinished(&self, older_than: Duration, now: SystemTime) -> Result<u64> {
        const OPERATION: &str = "list unfinished uploads below";
        let mut after: Option<(String, String)> = None;
        let mut removed = 0;
        loop {
            let prefix = &self.config.prefix;
            let page = self.run(OPERATION, prefix, Kind::List, async |_: &mut History| {
                let (key, id) = after.clone().unzip();
                let request = self.client.list_multipart_uploads().bucket(&self.config.bucket);
                let request = request.prefix(prefix).set_key_marker(key).set_upload_id_marker(id);
                request.send().await.map_err(|error| classify(&error))
            })?;
            let names = |upload: &MultipartUpload| {
                Some((upload.key()?.to_owned(), upload.upload_id()?.to_owned()))
            };
            for upload in page.uploads() {
                let begun = system_time(upload.initiated());
                let stale = begun.checked_add(older_than).is_some_and(|expiry| expiry <= now);
                if let (true, Some((key, id))) = (stale, names(upload)) {
                    self.abort(&key, &id)?;
                    removed += 1;
                }
            }
            let last = page.uploads().last().and_then(names);
            // What a listing that does not go on leaves out is for the next time.
            if !page.is_truncated().unwrap_or(false) || last.is_none() || last == after {
                return Ok(removed);
            }
            after = last;
        }
    }

    fn location(&self) -> String {
        self.config.location()
    }

    fn read_cost(&self) -> ReadCost {
        ReadCost { gap_bytes: 1 << 20, read_bytes: 8 << 20, parallel: 8 }
    }

    fn traffic(&self) -> Option<Traffic> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Some(Traffic {
            requests: self.counters.requests.each_ref().map(get),
            done: self.counters.done.each_ref().map(get),
            retries: get(&self.counters.retries),
            bytes_sent: get(&self.counters.sent),
            bytes_received: get(&self.counters.received),
        })
    }
}

fn range_len(range: Range) -> u64 {
    match range {
        Range::From(_, len) | Range::Last(len) => len,
        Range::All => 0,
    }
}
