//! What the room of volumes does to the cluster, and what it gives to agents.

use std::collections::BTreeMap;
use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use kube::api::Api;
use proto::v1::job::Work;
use proto::v1::{Backup, Job as Order, Restore};

use super::inspect::inspect;
use super::job::{Place, Ready};
use super::object::{Object, Update, patch};
use super::{Note, Room};
use crate::api::{BACKUP_NAME, PodVolumeBackup, PodVolumeRestore};
use crate::cluster::write::{Precondition, Refused, RequestTurns, write_status};
use crate::desk::queue::Kind;
use crate::desk::{Has, Request};
use crate::repositories;

impl Room {
    pub(super) fn look_for(&mut self, uid: &str) {
        let Some(job) = self.live.get_mut(uid) else {
            return;
        };
        job.place = Place::Asked;
        let (uid, object) = (uid.to_owned(), job.object.clone());
        let (client, turns) = (self.context.client.clone(), self.turns.clone());
        self.spawn(async move {
            let _turn = turns.take().await;
            let found = inspect(client, &object).await;
            Note::Inspected { uid, found }
        });
    }

    pub(super) fn write(&mut self, uid: &str, update: Update) {
        let now = (self.context.clock)();
        let Some(job) = self.live.get_mut(uid) else {
            return;
        };
        job.writing = true;
        if let Update::Progress { .. } = update {
            job.progress = None;
        }
        let status = patch(&job.object, &update, now);
        // What is not the end must not undo what somebody else wrote meanwhile: another leader, for instance.
        let version = update.needs_version().then(|| job.object.version_text()).flatten();
        let precondition = Precondition { uid: uid.to_owned(), version };
        let (name, is_backup) = (job.object.name(), job.object.kind() == Kind::Backup);
        let (uid, turns) = (uid.to_owned(), self.turns.clone());
        let (client, namespace) = (self.context.client.clone(), self.context.namespace.clone());
        self.spawn(async move {
            let (done, latest) = if is_backup {
                let api = Api::<PodVolumeBackup>::namespaced(client, &namespace);
                write_or_look(&api, &turns, &name, &precondition, &status).await
            } else {
                let api = Api::<PodVolumeRestore>::namespaced(client, &namespace);
                write_or_look(&api, &turns, &name, &precondition, &status).await
            };
            Note::Written { uid, update, done, latest }
        });
    }

    pub(super) fn give(&mut self, uid: &str, repeated: bool) {
        let Some(job) = self.live.get(uid) else {
            return;
        };
        let shelf = self.shelves.as_ref().and_then(|all| all.get(job.object.location()));
        let repository = shelf.and_then(|shelf| shelf.open.as_ref().ok());
        let (Place::Ready(ready), Some(repository)) = (&job.place, repository) else {
            return;
        };
        let work = match &job.object {
            Object::Backup(object) => Work::Backup(self.backup(object, ready)),
            Object::Restore(object) => Work::Restore(Restore {
                volume: Some(ready.found.volume.clone()),
                snapshot: object.spec.snapshot_id.clone(),
                done_marker: job.object.mark(),
            }),
        };
        let order = Order {
            id: uid.to_owned(),
            subject: job.object.subject(),
            repeated,
            work: Some(work),
            ..repositories::order(&self.context.settings, repository)
        };
        self.desk.ask(Request::Give(Box::new(order)));
        // The desk says so if not.
        self.change(uid, |job| (job.has, job.fresh) = (Some(Has::Yes), false));
    }

    fn backup(&self, object: &PodVolumeBackup, ready: &Ready) -> Backup {
        let pod = &object.spec.pod;
        let named = |name: &Option<String>| name.clone().unwrap_or_default();
        let mut tags: BTreeMap<String, String> = object.spec.tags.clone().unwrap_or_default();
        let backup = object.metadata.labels.as_ref().and_then(|labels| labels.get(BACKUP_NAME));
        if let Some(backup) = backup {
            tags.entry("backup".to_owned()).or_insert_with(|| backup.clone());
        }
        let given = object.spec.parent_snapshot.as_deref().filter(|parent| !parent.is_empty());
        let claim = ready.found.claim.as_ref();
        let last = claim.and_then(|claim| {
            self.ended.newest_snapshot(&claim.uid, &object.spec.backup_storage_location)
        });
        Backup {
            volume: Some(ready.found.volume.clone()),
            lineage: ready.found.lineage.clone(),
            host: format!("{}/{}", named(&pod.namespace), named(&pod.name)),
            tags: tags.into_iter().collect(),
            parent: given.or(last).unwrap_or_default().to_owned(),
        }
    }
}

/// Changes a status; where that was refused because the object has changed, also tells what it is now.
async fn write_or_look<K>(
    api: &Api<K>,
    turns: &RequestTurns,
    name: &str,
    precondition: &Precondition,
    status: &serde_json::Value,
) -> (Result<Object, Refused>, Option<Object>)
where
    K: kube::Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + Debug
        + serde::de::DeserializeOwned
        + Into<Object>,
{
    let done = write_status(api, turns, name, precondition, status).await.map(Into::into);
    let latest = match done {
        // Without an answer the watch tells, a little later.
        Err(Refused::Conflict) => api.get(name).await.ok().map(Into::into),
        _ => None,
    };
    (done, latest.filter(|object: &Object| object.uid() == precondition.uid))
}
