//! Kubernetes Events on the objects: what `kubectl describe` shows below them.
//!
//! Of the core group rather than `events.k8s.io`, which clusters before 1.19 do not have in version 1.

use std::fmt;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, PostParams};
use kube::{Client, Resource};

use crate::api::Timestamp;

/// Bytes of a message: what Kubernetes accepts.
const MESSAGE_MAX: usize = 1000;

/// Whether somebody should look at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// All goes as it should.
    Normal,
    /// Somebody should look at it.
    Warning,
}

/// Writes events.
#[derive(Clone)]
pub struct Events {
    client: Client,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}

impl Events {
    /// Writes by this client.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// Writes one in the background. An event that cannot be written is only logged: it is for people.
    pub fn tell<K>(&self, object: &K, tone: Tone, reason: &str, message: &str, now: Timestamp)
    where
        K: Resource<DynamicType = ()>,
    {
        let regarding = object.object_ref(&());
        let event = event(regarding, tone, reason, message, now);
        let namespace = event.metadata.namespace.clone().unwrap_or_default();
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        tokio::spawn(async move {
            if let Err(error) = api.create(&PostParams::default(), &event).await {
                tracing::warn!(%error, "cannot write an event");
            }
        });
    }
}

fn event(
    regarding: ObjectReference,
    tone: Tone,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> Event {
    let mut end = message.len().min(MESSAGE_MAX);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let name = regarding.name.clone().unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}.", name.get(..200).unwrap_or(&name))),
            namespace: regarding.namespace.clone(),
            ..ObjectMeta::default()
        },
        involved_object: regarding,
        reason: Some(reason.to_owned()),
        message: message.get(..end).map(str::to_owned),
        type_: Some(format!("{tone:?}")),
        source: Some(EventSource { component: Some("ebackup".to_owned()), host: None }),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        count: Some(1),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_are_cut_between_characters() {
        let long = "ü".repeat(MESSAGE_MAX);
        let made =
            event(ObjectReference::default(), Tone::Warning, "R", &long, Timestamp::UNIX_EPOCH);
        let message = made.message.unwrap();
        assert!(message.len() <= MESSAGE_MAX && message.starts_with('ü'));
        assert_eq!(made.type_.as_deref(), Some("Warning"));
    }
}
