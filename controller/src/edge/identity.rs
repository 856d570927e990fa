//! Who is at the other end of a stream: from a bearer token to a node.
//!
//! The API server is asked whether the token is valid for this controller and whose it is. A token of an agent is
//! bound to its pod, and the pod tells the node; what the agent says of itself is not asked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ObjectMeta, PostParams};
use tokio::sync::Semaphore;

use crate::cluster::answer;

/// Reviews at once. The API server allows a few hundred requests at once to all of its clients.
const REVIEWS: usize = 8;

/// How long a caller waits for its turn. All agents of a large cluster may come at once after a restart.
const TURN: Duration = Duration::from_secs(10);

/// Longest token that is looked at. They have about 1 KiB; headers are bounded too.
const TOKEN_BYTES_MAX: usize = 8 << 10;

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// An agent that proved who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Name of the node its pod runs on.
    pub node: String,
    /// Name of its pod.
    pub pod: String,
    /// When its token expires; none that says so never does.
    pub expires: Option<Timestamp>,
}

/// Why somebody is refused. No variant holds the token.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The API server does not know the token, or it is not for this controller.
    #[error("the token is not valid for this controller: {0}")]
    Invalid(String),
    /// Valid, but not that of an agent.
    #[error("the token is not an agent's: {0}")]
    NotAnAgent(String),
    /// Too many came at once.
    #[error("too many agents are being identified: dial again")]
    Busy,
    /// The API server cannot be asked.
    #[error("the token cannot be reviewed: {0:#}")]
    Unavailable(anyhow::Error),
}

/// Tells who holds a token.
#[tonic::async_trait]
pub trait Identify: Send + Sync + 'static {
    /// Whose it is.
    async fn identify(&self, token: &str) -> Result<Identity, Refusal>;
}

/// Asks the API server.
#[derive(Debug)]
pub struct Reviewer {
    reviews: Api<TokenReview>,
    pods: Api<Pod>,
    /// The user that agents are: `system:serviceaccount:<namespace>:<name>`.
    user: String,
    turns: Arc<Semaphore>,
}

impl Reviewer {
    /// For agents that run in this namespace under this ServiceAccount.
    pub fn new(client: kube::Client, namespace: &str, service_account: &str) -> Self {
        Self {
            reviews: Api::all(client.clone()),
            pods: Api::namespaced(client, namespace),
            user: format!("system:serviceaccount:{namespace}:{service_account}"),
            turns: Arc::new(Semaphore::new(REVIEWS)),
        }
    }

    async fn review(&self, token: &str) -> Result<TokenReviewStatus, Refusal> {
        let review = TokenReview {
            metadata: ObjectMeta::default(),
            spec: TokenReviewSpec {
                audiences: Some(vec![proto::TOKEN_AUDIENCE.to_owned()]),
                token: token.to_owned(),
            },
            status: None,
        };
        let how = PostParams::default();
        let asking = || "cannot ask the API server whose a token is".to_owned();
        let review = answer(asking, self.reviews.create(&how, &review)).await;
        let status = review.and_then(|review| review.status.context("the review has no status"));
        status.map_err(Refusal::Unavailable)
    }
}

#[tonic::async_trait]
impl Identify for Reviewer {
    async fn identify(&self, token: &str) -> Result<Identity, Refusal> {
        if token.is_empty() || token.len() > TOKEN_BYTES_MAX {
            return Err(Refusal::Invalid("it has no token's length".to_owned()));
        }
        let turn = tokio::time::timeout(TURN, self.turns.acquire()).await;
        let _turn = turn.map_err(|_| Refusal::Busy)?.map_err(|_| Refusal::Busy)?;
        let status = self.review(token).await?;
        let pod = bound_pod(status, &self.user)?;
        let reading = || format!("cannot read pod '{}'", pod.name);
        let found = answer(reading, self.pods.get_opt(&pod.name)).await;
        let node = node_of(found.map_err(Refusal::Unavailable)?, &pod)?;
        Ok(Identity { node, pod: pod.name, expires: expiry(token) })
    }
}

/// The pod that a token is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct BoundPod {
    name: String,
    uid: String,
}

/// Reads the answer to a review.
fn bound_pod(status: TokenReviewStatus, agents: &str) -> Result<BoundPod, Refusal> {
    if status.authenticated != Some(true) {
        let why = status.error.unwrap_or_else(|| "it is not authenticated".to_owned());
        return Err(Refusal::Invalid(why));
    }
    // An API server that knows no audiences would have ignored ours.
    let audiences = status.audiences.unwrap_or_default();
    if audiences.iter().all(|audience| audience != proto::TOKEN_AUDIENCE) {
        return Err(Refusal::Invalid(format!("it is for the audiences {audiences:?}")));
    }
    let user = status.user.unwrap_or_default();
    let name = user.username.unwrap_or_default();
    if name != agents {
        return Err(Refusal::NotAnAgent(format!("it belongs to '{name}', agents are '{agents}'")));
    }
    let extra = user.extra.unwrap_or_default();
    match (only(&extra, POD_NAME), only(&extra, POD_UID)) {
        (Some(name), Some(uid)) => Ok(BoundPod { name, uid }),
        _ => Err(Refusal::NotAnAgent("it is not bound to a pod".to_owned())),
    }
}

/// The one value of a key.
fn only(extra: &BTreeMap<String, Vec<String>>, key: &str) -> Option<String> {
    match extra.get(key)?.as_slice() {
        [value] if !value.is_empty() => Some(value.clone()),
        _ => None,
    }
}

/// The node of the pod, if that is the one that the token was made for.
fn node_of(found: Option<Pod>, bound: &BoundPod) -> Result<String, Refusal> {
    let gone = || Refusal::NotAnAgent(format!("its pod '{}' is gone", bound.name));
    let pod = found.ok_or_else(gone)?;
    if pod.metadata.uid.as_deref() != Some(&bound.uid) {
        return Err(gone());
    }
    let node = pod.spec.and_then(|spec| spec.node_name).filter(|node| !node.is_empty());
    node.ok_or_else(|| Refusal::NotAnAgent(format!("its pod '{}' runs on no node", bound.name)))
}

/// When a token expires that was found valid: read from it as it says, for the API server vouched for all of it.
fn expiry(token: &str) -> Option<Timestamp> {
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: i64,
    }
    let claims = token.split('.').nth(1)?;
    let claims = URL_SAFE_NO_PAD.decode(claims).ok()?;
    let claims: Claims = serde_json::from_slice(&claims).ok()?;
    Timestamp::from_second(claims.exp).ok()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;
    use k8s_openapi::api::core::v1::PodSpec;

    use super::*;

    const AGENTS: &str = "system:serviceaccount:velero:node-agent";

    fn valid() -> TokenReviewStatus {
        let extra = [(POD_NAME, "agent-1"), (POD_UID, "u-1")];
        let extra = extra.map(|(key, value)| (key.to_owned(), vec![value.to_owned()]));
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![proto::TOKEN_AUDIENCE.to_owned()]),
            user: Some(UserInfo {
                username: Some(AGENTS.to_owned()),
                extra: Some(extra.into()),
                ..Default::default()
            }),
            error: None,
        }
    }

    fn changed(change: impl FnOnce(&mut TokenReviewStatus)) -> TokenReviewStatus {
        let mut status = valid();
        change(&mut status);
        status
    }

    #[test]
    fn only_a_valid_token_for_us_of_an_agent_bound_to_a_pod_names_a_pod() {
        let pod = BoundPod { name: "agent-1".to_owned(), uid: "u-1".to_owned() };
        assert_eq!(bound_pod(valid(), AGENTS).unwrap(), pod);
        fn extra(status: &mut TokenReviewStatus) -> &mut BTreeMap<String, Vec<String>> {
            status.user.as_mut().unwrap().extra.as_mut().unwrap()
        }
        let invalid = [
            changed(|status| status.authenticated = Some(false)),
            changed(|status| status.authenticated = None),
            changed(|status| status.audiences = None),
            changed(|status| status.audiences = Some(vec!["https://kubernetes".to_owned()])),
            TokenReviewStatus::default(),
        ];
        for status in invalid {
            let refusal = bound_pod(status.clone(), AGENTS).unwrap_err();
            assert!(matches!(refusal, Refusal::Invalid(_)), "{status:?}: {refusal}");
        }
        let user = |name: &str| {
            let name = Some(name.to_owned());
            changed(|status| status.user.as_mut().unwrap().username = name)
        };
        let strangers = [
            user("system:serviceaccount:velero:velero"),
            user("system:serviceaccount:other:node-agent"),
            user("system:serviceaccount:velero:node-agent2"),
            user(""),
            changed(|status| status.user = None),
            changed(|status| extra(status).clear()),
            changed(|status| drop(extra(status).remove(POD_UID))),
            changed(|status| extra(status).get_mut(POD_NAME).unwrap().push("b".to_owned())),
            changed(|status| extra(status).get_mut(POD_NAME).unwrap()[0].clear()),
        ];
        for status in strangers {
            let refusal = bound_pod(status.clone(), AGENTS).unwrap_err();
            assert!(matches!(refusal, Refusal::NotAnAgent(_)), "{status:?}: {refusal}");
        }
    }

    #[test]
    fn the_node_is_that_of_the_very_pod() {
        let bound = BoundPod { name: "agent-1".to_owned(), uid: "u-1".to_owned() };
        let pod = |uid: &str, node: Option<&str>| Pod {
            metadata: ObjectMeta { uid: Some(uid.to_owned()), ..Default::default() },
            spec: Some(PodSpec { node_name: node.map(str::to_owned), ..Default::default() }),
            status: None,
        };
        assert_eq!(node_of(Some(pod("u-1", Some("a"))), &bound).unwrap(), "a");
        let wrong = [
            None,
            Some(pod("u-2", Some("a"))),
            Some(pod("u-1", None)),
            Some(pod("u-1", Some(""))),
            Some(Pod::default()),
        ];
        for pod in wrong {
            let refusal = node_of(pod.clone(), &bound).unwrap_err();
            assert!(matches!(refusal, Refusal::NotAnAgent(_)), "{pod:?}: {refusal}");
        }
    }

    #[test]
    fn the_expiry_is_read_from_the_claims_and_garbage_has_none() {
        let token = |claims: &str| format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims));
        let expires = Timestamp::from_second(1_700_000_000).unwrap();
        assert_eq!(expiry(&token(r#"{"exp":1700000000,"aud":["x"]}"#)), Some(expires));
        let garbage = [
            token("{}"),
            token("7"),
            token(r#"{"exp":"x"}"#),
            "a.%%.c".into(),
            "".into(),
            "..".into(),
        ];
        for text in garbage {
            assert_eq!(expiry(&text), None, "{text}");
        }
        assert_eq!(expiry(&token(&format!(r#"{{"exp":{}}}"#, i64::MAX))), None);
    }
}
