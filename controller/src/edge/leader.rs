//! Which of several controllers works: the holder of the Lease `ebackup-controller`.
//!
//! The rule is that of Kubernetes' own components: whoever does not hold the lease watches it, and takes it when it
//! did not change for its whole duration, by the watcher's own clock; the times written in it are for people. The
//! holder renews it well before, and stops to work when it could not do so in time: then nobody else has begun.

use std::time::Duration;

use anyhow::{Result, bail};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::cluster::{Clock, answer, lost_race};

/// Name of the Lease.
pub const NAME: &str = "ebackup-controller";

/// The times of a lease.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// How long a lease that is not renewed holds others off. Whole seconds.
    pub duration: Duration,
    /// When the holder stops to work if it could not renew: before others may begin.
    pub deadline: Duration,
    /// How often the holder renews, and others look.
    pub retry: Duration,
}

impl Default for Times {
    /// Those of Kubernetes' components.
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(15),
            deadline: Duration::from_secs(10),
            retry: Duration::from_secs(2),
        }
    }
}

/// What a look at the lease tells.
#[derive(Debug, Clone, Copy)]
struct Seen<'a> {
    /// Empty: nobody.
    holder: &'a str,
    /// As the lease says.
    duration: Duration,
    /// For how long it did not change, by this program's clock.
    unchanged: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Create,
    /// It is ours already.
    Renew,
    /// It is free, or its holder is dead.
    Take,
    Wait,
}

fn decide(seen: Option<Seen<'_>>, me: &str) -> Action {
    match seen {
        None => Action::Create,
        Some(seen) if seen.holder == me => Action::Renew,
        Some(seen) if seen.holder.is_empty() || seen.unchanged >= seen.duration => Action::Take,
        Some(_) => Action::Wait,
    }
}

/// The lease as it was seen first in this form.
#[derive(Debug)]
struct Observed {
    version: Option<String>,
    since: Instant,
}

/// One that would be leader.
#[derive(Debug)]
pub struct Candidate {
    leases: Api<Lease>,
    /// Unlike that of every other candidate, also of an earlier life.
    me: String,
    times: Times,
    clock: Clock,
    observed: Option<Observed>,
}

impl Candidate {
    /// `me` must be unlike that of every other candidate.
    pub fn new(
        client: kube::Client,
        namespace: &str,
        me: String,
        times: Times,
        clock: Clock,
    ) -> Self {
        let leases = Api::namespaced(client, namespace);
        Self { leases, me, times, clock, observed: None }
    }

    /// Waits until this one is the leader.
    pub async fn elect(mut self) -> Leadership {
        loop {
            // Counted from before the request: others count from when they see its result.
            let began = Instant::now();
            match self.attempt().await {
                Ok(true) => {
                    tracing::info!(me = self.me, "this controller is the leader");
                    return Leadership::begin(self, began);
                }
                Ok(false) => {}
                Err(error) => tracing::warn!("cannot become the leader: {error:#}"),
            }
            tokio::time::sleep(self.times.retry).await;
        }
    }

    /// Looks at the lease and does what is to be done. Returns whether it is ours now.
    async fn attempt(&mut self) -> Result<bool> {
        let reading = || format!("cannot read Lease '{NAME}'");
        let lease = answer(reading, self.leases.get_opt(NAME)).await?;
        let action = decide(lease.as_ref().map(|lease| self.look(lease)), &self.me);
        let wanted = match (action, lease) {
            (Action::Wait, _) => return Ok(false),
            (_, None) => self.lease(None),
            (Action::Renew, Some(lease)) => self.renewed(lease),
            (_, Some(lease)) => self.lease(Some(lease)),
        };
        match self.write(wanted).await {
            Ok(()) => Ok(true),
            Err(error) if lost_race(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn look<'a>(&mut self, lease: &'a Lease) -> Seen<'a> {
        let version = lease.metadata.resource_version.clone();
        if self.observed.as_ref().is_none_or(|observed| observed.version != version) {
            self.observed = Some(Observed { version, since: Instant::now() });
        }
        let spec = lease.spec.as_ref();
        let seconds = spec.and_then(|spec| spec.lease_duration_seconds).unwrap_or_default();
        Seen {
            holder: spec.and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default(),
            duration: Duration::from_secs(u64::try_from(seconds).unwrap_or_default()),
            unchanged: self.observed.as_ref().map_or(Duration::ZERO, |it| it.since.elapsed()),
        }
    }

    /// The lease, newly ours.
    fn lease(&self, old: Option<Lease>) -> Lease {
        let old = old.unwrap_or_else(|| Lease {
            metadata: ObjectMeta { name: Some(NAME.to_owned()), ..Default::default() },
            spec: None,
        });
        let transitions = old
            .spec
            .as_ref()
            .map_or(0, |spec| spec.lease_transitions.unwrap_or_default().saturating_add(1));
        let now = self.now();
        let spec = LeaseSpec {
            holder_identity: Some(self.me.clone()),
            lease_duration_seconds: i32::try_from(self.times.duration.as_secs()).ok(),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: Some(transitions),
            ..Default::default()
        };
        Lease { spec: Some(spec), ..old }
    }

    fn renewed(&self, mut lease: Lease) -> Lease {
        let spec = lease.spec.get_or_insert_default();
        spec.lease_duration_seconds = i32::try_from(self.times.duration.as_secs()).ok();
        spec.renew_time = Some(self.now());
        lease
    }

    fn now(&self) -> MicroTime {
        use k8s_openapi::jiff::Timestamp;
        // The API's type is of an earlier version of the same library.
        let micros = (self.clock)().as_microsecond();
        MicroTime(Timestamp::from_microsecond(micros).unwrap_or(Timestamp::UNIX_EPOCH))
    }

    async fn write(&self, lease: Lease) -> Result<()> {
        let how = PostParams::default();
        let writing = || format!("cannot write Lease '{NAME}'");
        if lease.metadata.resource_version.is_some() {
            answer(writing, self.leases.replace(NAME, &how, &lease)).await?;
        } else {
            answer(writing, self.leases.create(&how, &lease)).await?;
        }
        Ok(())
    }

    /// Renews until that fails for too long, or `stop` resolves.
    async fn hold(&mut self, mut renewed: Instant, mut stop: oneshot::Receiver<()>) -> Result<()> {
        loop {
            tokio::select! {
                _released = &mut stop => return Ok(()),
                () = tokio::time::sleep(self.times.retry) => {}
            }
            let began = Instant::now();
            let until = renewed + self.times.deadline;
            match tokio::time::timeout_at(until, self.renew()).await {
                Ok(Ok(())) => renewed = began,
                Ok(Err(error)) if error.is::<Taken>() => return Err(error),
                Ok(Err(error)) if Instant::now() < until => {
                    tracing::warn!("cannot renew the lease, trying again: {error:#}");
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => bail!("Lease '{NAME}' could not be renewed in time"),
            }
        }
    }

    async fn renew(&self) -> Result<()> {
        let reading = || format!("cannot read Lease '{NAME}'");
        let lease = answer(reading, self.leases.get_opt(NAME)).await?.unwrap_or_default();
        let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.clone());
        let holder = holder.unwrap_or_default();
        if holder != self.me {
            return Err(Taken(holder).into());
        }
        self.write(self.renewed(lease)).await
    }

    /// Lets the next one begin at once.
    async fn release(&self) -> Result<()> {
        let reading = || format!("cannot read Lease '{NAME}'");
        let Some(mut lease) = answer(reading, self.leases.get_opt(NAME)).await? else {
            return Ok(());
        };
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() == Some(&self.me) {
            spec.holder_identity = None;
            spec.renew_time = Some(self.now());
            self.write(lease).await?;
        }
        Ok(())
    }
}

/// Somebody else holds the lease.
#[derive(Debug, thiserror::Error)]
#[error("Lease '{NAME}' is held by '{0}'")]
struct Taken(String);

/// Being the leader. Dropped, it is renewed no more, and others wait until it is over: see
/// [`Leadership::release`].
#[derive(Debug)]
pub struct Leadership {
    stop: oneshot::Sender<()>,
    task: JoinHandle<(Candidate, Result<()>)>,
}

impl Leadership {
    fn begin(mut candidate: Candidate, renewed: Instant) -> Self {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let ended = candidate.hold(renewed, stopped).await;
            (candidate, ended)
        });
        Self { stop, task }
    }

    /// Waits until it is lost, and tells why. The program must end at once then.
    pub async fn lost(&mut self) -> anyhow::Error {
        match (&mut self.task).await {
            Ok((_, Err(error))) => error.context("this controller is no longer the leader"),
            Ok((_, Ok(()))) => anyhow::Error::msg("this controller released its lease"),
            Err(panic) => anyhow::Error::new(panic).context("nobody renews the lease"),
        }
    }

    /// Gives it up, after all work has ended.
    ///
    /// # Errors
    /// When the lease cannot be written: others wait until it is over.
    pub async fn release(self) -> Result<()> {
        let _ended = self.stop.send(());
        let (candidate, _) = self.task.await?;
        candidate.release().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_taken_only_when_it_is_free_or_did_not_change_for_its_duration() {
        let seen = |holder, duration, unchanged| {
            let seconds = Duration::from_secs;
            Some(Seen { holder, duration: seconds(duration), unchanged: seconds(unchanged) })
        };
        let table = [
            ("none", None, Action::Create),
            ("released", seen("", 15, 0), Action::Take),
            ("just seen", seen("other", 15, 0), Action::Wait),
            ("not long enough", seen("other", 15, 14), Action::Wait),
            ("long enough", seen("other", 15, 15), Action::Take),
            ("a longer one", seen("other", 60, 15), Action::Wait),
            ("no duration", seen("other", 0, 0), Action::Take),
            ("ours", seen("me", 15, 0), Action::Renew),
            ("ours, long ago", seen("me", 15, 99), Action::Renew),
        ];
        for (name, seen, action) in table {
            assert_eq!(decide(seen, "me"), action, "{name}");
        }
    }

    #[test]
    fn the_holder_stops_before_another_may_begin() {
        let times = Times::default();
        assert!(times.deadline + times.retry < times.duration);
        // One connection that hangs costs a try, not the lease.
        assert!(times.retry + crate::cluster::ANSWER + times.retry < times.deadline);
    }
}
