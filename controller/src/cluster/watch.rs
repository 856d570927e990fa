//! Watching a kind of custom resource: its events, and which objects there are.

use std::collections::BTreeSet;
use std::fmt;

use futures::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::NamespaceResourceScope;
use kube::api::Api;
use kube::core::{DeserializeGuard, error_boundary::InvalidObject};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};

/// How long a watch goes on before it is asked for again: a connection that died unnoticed hides changes for no
/// longer. Less than what the client waits for an answer.
const WATCH_SECONDS: u32 = 30;

/// The watch of a kind; it begins again by itself after errors, and does not end.
pub fn watch<K>(
    client: &Client,
    namespace: &str,
) -> impl Stream<Item = watcher::Event<K>> + Send + use<K>
where
    K: kube::Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + fmt::Debug
        + serde::de::DeserializeOwned
        + Send
        + 'static,
{
    let api: Api<DeserializeGuard<K>> = Api::namespaced(client.clone(), namespace);
    watcher(api, watcher::Config::default().timeout(WATCH_SECONDS))
        .default_backoff()
        // Who changed what when is half of an object, and all of them are kept.
        .modify(|object| object.managed_fields_mut().clear())
        .inspect_err(|error| {
            let kind = K::kind(&());
            tracing::warn!(%kind, %error, "a watch broke off, beginning again");
        })
        .filter_map(async |event| valid(event.ok()?))
}

/// The event without an object that is not of its kind: made by another version, before the definition refused it. It
/// must not hide all others.
fn valid<K: kube::Resource<DynamicType = ()>>(
    event: watcher::Event<DeserializeGuard<K>>,
) -> Option<watcher::Event<K>> {
    let object = |guarded: DeserializeGuard<K>| {
        let told = |invalid: &InvalidObject| {
            let (kind, name) = (K::kind(&()), invalid.metadata.name.as_deref().unwrap_or_default());
            tracing::warn!(%kind, name, error = invalid.error, "an object is not of its kind, and left alone");
        };
        guarded.0.inspect_err(told).ok()
    };
    Some(match event {
        watcher::Event::Init => watcher::Event::Init,
        watcher::Event::InitDone => watcher::Event::InitDone,
        watcher::Event::InitApply(guarded) => watcher::Event::InitApply(object(guarded)?),
        watcher::Event::Apply(guarded) => watcher::Event::Apply(object(guarded)?),
        watcher::Event::Delete(guarded) => watcher::Event::Delete(object(guarded)?),
    })
}

/// Which objects of a kind were listed, since the list began.
#[derive(Debug, Default)]
pub struct Listing {
    complete: bool,
    seen: BTreeSet<String>,
}

/// What came of an event of a watch, for the map that follows it.
#[derive(Debug)]
pub enum Change<K> {
    /// It is so now.
    Seen(K),
    /// It is gone: its key.
    Gone(String),
    /// The list is complete: others do not exist.
    Only(BTreeSet<String>),
    /// The list begins.
    Nothing,
}

impl Listing {
    /// Whether all objects are known.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Takes in an event. `key` is what the map goes by.
    pub fn take<K>(&mut self, event: watcher::Event<K>, key: fn(&K) -> String) -> Change<K> {
        match event {
            watcher::Event::Init => {
                self.seen.clear();
                Change::Nothing
            }
            watcher::Event::InitApply(object) => {
                self.seen.insert(key(&object));
                Change::Seen(object)
            }
            watcher::Event::InitDone => {
                self.complete = true;
                Change::Only(std::mem::take(&mut self.seen))
            }
            watcher::Event::Apply(object) => Change::Seen(object),
            watcher::Event::Delete(object) => Change::Gone(key(&object)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::PodVolumeRestore;

    #[test]
    fn an_object_of_another_version_hides_no_other() {
        let restore = |spec: serde_json::Value| -> DeserializeGuard<PodVolumeRestore> {
            serde_json::from_value(json!({
                "apiVersion": "velero.io/v1", "kind": "PodVolumeRestore",
                "metadata": {"name": "r"}, "spec": spec,
            }))
            .unwrap()
        };
        let whole = json!({"pod": {}, "volume": "v", "backupStorageLocation": "l",
                           "snapshotID": "s", "sourceNamespace": "n"});
        let old =
            json!({"pod": {}, "volume": "v", "backupStorageLocation": "l", "snapshotID": "s"});
        let listed = |spec| valid(watcher::Event::InitApply(restore(spec)));
        assert!(matches!(listed(whole), Some(watcher::Event::InitApply(_))));
        assert!(listed(old).is_none());
        let done: Option<watcher::Event<PodVolumeRestore>> = valid(watcher::Event::InitDone);
        assert!(matches!(done, Some(watcher::Event::InitDone)));
    }
}
