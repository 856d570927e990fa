//! What went wrong with a request, whether to try again, and what to tell the user.

use std::time::{Duration, SystemTime};

use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;

use crate::ErrorKind;

/// A failed attempt.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) kind: ErrorKind,
    /// Whether the same request may succeed later.
    pub(super) retryable: bool,
    /// Whether it may have taken effect all the same.
    pub(super) unknown: bool,
    /// Whether another access key may help.
    pub(super) credentials: bool,
    /// Status of the answer, if there was one.
    pub(super) status: Option<u16>,
    /// What happened and what helps.
    pub(super) message: String,
}

impl Failure {
    pub(super) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            retryable: false,
            unknown: false,
            credentials: false,
            status: None,
            message: message.into(),
        }
    }

    /// A transfer that broke off, or another passing trouble.
    pub(super) fn passing(message: impl Into<String>) -> Self {
        let failure = Self::new(ErrorKind::Unavailable, message);
        Self { retryable: true, unknown: true, ..failure }
    }
}

/// Sorts what the client reports.
pub(super) fn classify<E>(error: &SdkError<E, HttpResponse>) -> Failure
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    match error {
        SdkError::ServiceError(service) => {
            let raw = service.raw();
            let status = raw.status().as_u16();
            let meta = service.err().meta();
            let date = raw.headers().get("date").map(str::to_owned);
            answered(status, meta.code().unwrap_or_default(), meta.message(), date.as_deref())
        }
        SdkError::ResponseError(response) => {
            let status = response.raw().status().as_u16();
            // An answer that is no S3 answer: a proxy's page, a body cut off.
            Failure { status: Some(status), ..Failure::passing(text(error)) }
        }
        SdkError::TimeoutError(_) => Failure::passing("the request took too long"),
        SdkError::DispatchFailure(dispatch) => {
            let text = text(error);
            let about_tls = ["certificate", "UnknownIssuer", "tls", "TLS", "InvalidCertificate"];
            let about_dns = ["dns error", "failed to lookup", "perform DNS lookup"];
            if text.contains("InvalidContentType") {
                let why =
                    "the endpoint does not speak TLS: give it as 'http://…', if that is meant";
                Failure::new(ErrorKind::Invalid, why)
            } else if about_tls.iter().any(|part| text.contains(part)) {
                let message = format!(
                    "no secure connection: {text}; if the store has a certificate of your own \
                     authority, give it with --ca-file"
                );
                Failure::new(ErrorKind::Invalid, message)
            } else if about_dns.iter().any(|part| text.contains(part)) {
                Failure::passing(format!(
                    "the name of the endpoint or bucket does not resolve: {text}; check --endpoint"
                ))
            } else if dispatch.is_user() {
                Failure::new(ErrorKind::Invalid, text)
            } else {
                Failure::passing(text)
            }
        }
        _ => {
            let text = text(error);
            let about_key = ["credential", "access key", "Credential"];
            let kind = if about_key.iter().any(|part| text.contains(part)) {
                ErrorKind::PermissionDenied
            } else {
                ErrorKind::Invalid
            };
            Failure::new(kind, text)
        }
    }
}

/// The chain of causes on one line. The client puts neither keys nor signatures into it.
fn text<E: std::error::Error>(error: E) -> String {
    let mut text = DisplayErrorContext(error).to_string();
    // Behind the causes it prints its structures.
    if let Some(at) =
        text.find(" (DispatchFailure(").or_else(|| text.find(" (ConstructionFailure("))
    {
        text.truncate(at);
    }
    text
}

/// Sorts an answer by its status and S3 error code.
pub(super) fn answered(
    status: u16,
    code: &str,
    message: Option<&str>,
    date: Option<&str>,
) -> Failure {
    let message = message.filter(|message| !message.is_empty());
    let said = match (code, message) {
        ("", None) => format!("the store answered {status}"),
        (code, None) => format!("the store answered {status} {code}"),
        (code, Some(message)) => format!("the store answered {status} {code}: {message}"),
    };
    let about = |kind, advice: &str| Failure::new(kind, format!("{said}; {advice}"));
    let failure = match (code, status) {
        ("RequestTimeTooSkewed" | "RequestExpired", _) => {
            let here = crate::system_clock()
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or_else(|_| "before 1970".to_owned(), |now| utc(now.as_secs()));
            let there = date.unwrap_or("unknown");
            about(
                ErrorKind::Expired,
                &format!(
                    "the clocks differ by more than 15 minutes: here it is {here}, there {there}; set \
                     this machine's clock, for instance with NTP"
                ),
            )
        }
        ("InvalidAccessKeyId" | "NoSuchKeyId", _) => Failure {
            credentials: true,
            ..about(ErrorKind::PermissionDenied, "the store does not know this access key")
        },
        ("SignatureDoesNotMatch", _) => Failure {
            credentials: true,
            ..about(
                ErrorKind::PermissionDenied,
                "the secret key is wrong, or the endpoint contains the name of the bucket",
            )
        },
        ("ExpiredToken" | "InvalidToken", _) => Failure {
            credentials: true,
            ..about(ErrorKind::PermissionDenied, "get a new session token")
        },
        ("VirtualHostDomainRequired", _) => about(
            ErrorKind::Invalid,
            "this store wants the bucket in the host name: drop --path-style",
        ),
        ("NoSuchBucket", _) => about(
            ErrorKind::Invalid,
            "make the bucket, or check its name and the endpoint's region",
        ),
        ("PermanentRedirect" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraint", _)
        | (_, 301 | 307) => {
            about(ErrorKind::Invalid, "the bucket is in another region: check --endpoint, --region")
        }
        (
            "QuotaExceeded" | "InsufficientStorage" | "StorageQuotaExceeded" | "XMinioStorageFull",
            _,
        )
        | (_, 507) => about(ErrorKind::Full, "the bucket's or the user's quota is reached"),
        ("EntityTooLarge", _) => {
            about(ErrorKind::Invalid, "the object is too large for this store")
        }
        // No byte of the range exists.
        ("InvalidRange", _) | (_, 416) => Failure::new(ErrorKind::Truncated, said.clone()),
        ("PreconditionFailed", _) | (_, 412) => Failure::new(ErrorKind::Invalid, said.clone()),
        ("NoSuchKey" | "NoSuchUpload" | "NotFound", _) | (_, 404) => {
            Failure::new(ErrorKind::NotFound, said.clone())
        }
        (
            "SlowDown"
            | "Throttling"
            | "TooManyRequests"
            | "RequestTimeout"
            | "BadDigest"
            | "OperationAborted"
            | "ConditionalRequestConflict",
            _,
        )
        | (_, 408 | 409 | 429 | 500..=599) => Failure::passing(said.clone()),
        ("AccessDenied", _) | (_, 401 | 403) => Failure {
            credentials: true,
            ..about(
                ErrorKind::PermissionDenied,
                "the access key lacks the right to do this on this bucket",
            )
        },
        _ => Failure::new(ErrorKind::Io, said.clone()),
    };
    Failure { status: Some(status), ..failure }
}

/// A time of day for people, in UTC.
fn utc(seconds: u64) -> String {
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02} UTC", seconds % 60)
}

/// How long to wait before attempt `n` (from 1) is repeated: doubled each time, and at random between
/// half and all of it, so that many clients do not come back at once ("full jitter" halves: Brooker,
/// "Exponential Backoff And Jitter", 2015).
pub(super) fn backoff(attempt: u32, random: u64) -> Duration {
    let most = (100_u64 << attempt.min(8)).min(20_000);
    Duration::from_millis(most / 2 + random % (most / 2 + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_sorted_by_what_helps() {
        let table = [
            (403, "InvalidAccessKeyId", ErrorKind::PermissionDenied, false, "does not know"),
            (403, "SignatureDoesNotMatch", ErrorKind::PermissionDenied, false, "secret key"),
            (403, "AccessDenied", ErrorKind::PermissionDenied, false, "lacks the right"),
            (403, "RequestTimeTooSkewed", ErrorKind::Expired, false, "clock"),
            (403, "VirtualHostDomainRequired", ErrorKind::Invalid, false, "--path-style"),
            (403, "QuotaExceeded", ErrorKind::Full, false, "quota"),
            (404, "NoSuchBucket", ErrorKind::Invalid, false, "make the bucket"),
            (404, "NoSuchKey", ErrorKind::NotFound, false, ""),
            (404, "", ErrorKind::NotFound, false, ""),
            (301, "PermanentRedirect", ErrorKind::Invalid, false, "region"),
            (500, "InternalError", ErrorKind::Unavailable, true, ""),
            (503, "SlowDown", ErrorKind::Unavailable, true, ""),
            (429, "", ErrorKind::Unavailable, true, ""),
            (409, "ConditionalRequestConflict", ErrorKind::Unavailable, true, ""),
            (507, "", ErrorKind::Full, false, "quota"),
            (416, "InvalidRange", ErrorKind::Truncated, false, ""),
            (416, "", ErrorKind::Truncated, false, ""),
            (400, "EntityOf416", ErrorKind::Io, false, "416"),
            (400, "Strange", ErrorKind::Io, false, "400 Strange: why"),
        ];
        for (status, code, kind, retryable, part) in table {
            let failure = answered(status, code, Some("why"), Some("Mon, 01 Jan"));
            assert_eq!((failure.kind, failure.retryable), (kind, retryable), "{status} {code}");
            assert!(failure.message.contains(part), "{}", failure.message);
        }
    }

    #[test]
    fn waiting_grows_and_is_bounded() {
        for attempt in 0..40 {
            for random in [0, 1, u64::MAX] {
                let wait = backoff(attempt, random);
                assert!((50..=20_000).contains(&wait.as_millis()), "{attempt}: {wait:?}");
            }
        }
        assert!(backoff(8, 0) >= Duration::from_secs(10));
    }
}
