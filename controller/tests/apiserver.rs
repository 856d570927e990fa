//! The edge of the controller against a real API server: tokens, authority, leadership.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

#[path = "common/definitions.rs"]
mod definitions;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use controller::edge::authority::{self, Authority};
use controller::edge::identity::{Identify, Refusal, Reviewer};
use controller::edge::leader::{self, Candidate, Leadership, Times};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret, ServiceAccount};
use kube::api::{Api, DeleteParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};

const ACCOUNT: &str = "node-agent";
const NODE: &str = "node-1";

/// A namespace of a test's own.
struct Cluster {
    client: kube::Client,
    namespace: String,
}

impl Cluster {
    async fn start(test: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let variable = "EBACKUP_TEST_APISERVER_KUBECONFIG";
        let path = std::env::var(variable).unwrap_or_else(|_| {
            panic!(
                "{variable} is not set: this test needs an API server. Start one with 'cargo xtask \
                 apiserver up', and tell this shell with 'set -a; . target/apiserver/env'"
            )
        });
        let kubeconfig = Kubeconfig::read_from(path).unwrap();
        let options = KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
        let client = kube::Client::try_from(config).unwrap();
        let unique = (Timestamp::now().as_millisecond(), COUNT.fetch_add(1, Ordering::SeqCst));
        let namespace = format!("{test}-{}-{}", unique.0, unique.1);
        let cluster = Self { client, namespace };
        let named = serde_json::json!({ "metadata": { "name": cluster.namespace } });
        let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
        let named = serde_json::from_value(named).unwrap();
        namespaces.create(&PostParams::default(), &named).await.unwrap();
        cluster
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        <K as kube::Resource>::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    async fn create<K>(&self, object: serde_json::Value) -> K
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>
            + serde::de::DeserializeOwned
            + serde::Serialize
            + Clone
            + std::fmt::Debug,
        <K as kube::Resource>::DynamicType: Default,
    {
        let object = serde_json::from_value(object).unwrap();
        self.api::<K>().create(&PostParams::default(), &object).await.unwrap()
    }

    /// A pod of an agent, on a node if it has one.
    async fn pod(&self, name: &str, node: Option<&str>) -> Pod {
        self.create(serde_json::json!({
            "metadata": { "name": name },
            "spec": {
                "nodeName": node,
                "serviceAccountName": ACCOUNT,
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "containers": [{ "name": "agent", "image": "none" }],
            },
        }))
        .await
    }

    async fn account(&self, name: &str) {
        self.create::<ServiceAccount>(serde_json::json!({ "metadata": { "name": name } })).await;
    }

    async fn token(&self, account: &str, audience: &str, pod: Option<&Pod>) -> String {
        let bound = pod.map(|pod| {
            let (name, uid) = (&pod.metadata.name, &pod.metadata.uid);
            serde_json::json!({ "apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid })
        });
        let request = serde_json::from_value(serde_json::json!({
            "spec": {
                "audiences": [audience],
                "boundObjectRef": bound,
                "expirationSeconds": 600,
            },
        }));
        let request: TokenRequest = request.unwrap();
        let accounts = self.api::<ServiceAccount>();
        let made = accounts.create_token_request(account, &PostParams::default(), &request).await;
        made.unwrap().status.unwrap().token.unwrap()
    }

    fn reviewer(&self) -> Reviewer {
        Reviewer::new(self.client.clone(), &self.namespace, ACCOUNT)
    }

    async fn authority(&self) -> Authority {
        let names = vec!["ebackup-controller".to_owned()];
        let clock = Timestamp::now;
        Authority::start(self.client.clone(), &self.namespace, names, clock).await.unwrap()
    }

    async fn secret(&self) -> Secret {
        self.api::<Secret>().get(authority::NAME).await.unwrap()
    }

    async fn bundle(&self) -> String {
        let map = self.api::<ConfigMap>().get(authority::NAME).await.unwrap();
        map.data.unwrap().remove(authority::BUNDLE).unwrap()
    }

    fn candidate(&self, me: &str, times: Times) -> Candidate {
        let clock = Timestamp::now;
        Candidate::new(self.client.clone(), &self.namespace, me.to_owned(), times, clock)
    }

    async fn lead(&self, me: &str) -> Leadership {
        // A machine under load must not make anybody lose it.
        let times = Times { retry: Duration::from_millis(200), ..Times::default() };
        self.candidate(me, times).elect().await
    }

    async fn holder(&self) -> Option<String> {
        self.api::<Lease>().get(leader::NAME).await.unwrap().spec.unwrap().holder_identity
    }
}

#[tokio::test]
async fn a_token_bound_to_an_agents_pod_tells_its_node_and_its_end() {
    let cluster = Cluster::start("token").await;
    cluster.account(ACCOUNT).await;
    let pod = cluster.pod("agent-1", Some(NODE)).await;
    let token = cluster.token(ACCOUNT, proto::TOKEN_AUDIENCE, Some(&pod)).await;
    let identity = cluster.reviewer().identify(&token).await.unwrap();
    assert_eq!((identity.node.as_str(), identity.pod.as_str()), (NODE, "agent-1"));
    let left = identity.expires.unwrap().duration_since(Timestamp::now()).as_secs();
    assert!((1..=600).contains(&left), "{left}");
}

#[tokio::test]
async fn other_tokens_are_refused() {
    let cluster = Cluster::start("refused").await;
    cluster.account(ACCOUNT).await;
    cluster.account("other").await;
    let pod = cluster.pod("agent-1", Some(NODE)).await;
    let waiting = cluster.pod("agent-2", None).await;
    let reviewer = cluster.reviewer();
    let good = cluster.token(ACCOUNT, proto::TOKEN_AUDIENCE, Some(&pod)).await;
    let cut = &good[..good.len() - 8];
    let api = "https://kubernetes.default.svc";
    let wrong_audience = cluster.token(ACCOUNT, api, Some(&pod)).await;
    for token in ["", "garbage", cut, &wrong_audience] {
        let refusal = reviewer.identify(token).await.unwrap_err();
        assert!(matches!(refusal, Refusal::Invalid(_)), "{refusal:?}");
    }
    let unbound = cluster.token(ACCOUNT, proto::TOKEN_AUDIENCE, None).await;
    let other = cluster.token("other", proto::TOKEN_AUDIENCE, None).await;
    let on_no_node = cluster.token(ACCOUNT, proto::TOKEN_AUDIENCE, Some(&waiting)).await;
    for token in [&unbound, &other, &on_no_node] {
        let refusal = reviewer.identify(token).await.unwrap_err();
        assert!(matches!(refusal, Refusal::NotAnAgent(_)), "{refusal:?}");
    }
    let now = DeleteParams::default().grace_period(0);
    cluster.api::<Pod>().delete("agent-1", &now).await.unwrap();
    let again = cluster.pod("agent-1", Some("another")).await;
    assert_ne!(again.metadata.uid, pod.metadata.uid);
    let refusal = reviewer.identify(&good).await.unwrap_err();
    let is_refused = matches!(refusal, Refusal::Invalid(_) | Refusal::NotAnAgent(_));
    assert!(is_refused, "a pod of the same name is not the same: {refusal:?}");
}

#[tokio::test]
async fn the_authority_is_made_once_published_and_kept() {
    let cluster = Cluster::start("authority").await;
    let first = cluster.authority().await;
    let secret = cluster.secret().await;
    assert_eq!(secret.type_.as_deref(), Some("Opaque"));
    let bundle = cluster.bundle().await;
    assert!(bundle.contains("BEGIN CERTIFICATE") && !bundle.contains("PRIVATE"));
    cluster.authority().await;
    first.keep().await.unwrap();
    assert_eq!(cluster.secret().await, secret, "nothing is written without need");
    cluster.api::<ConfigMap>().delete(authority::NAME, &DeleteParams::default()).await.unwrap();
    first.keep().await.unwrap();
    assert_eq!(cluster.bundle().await, bundle);
}

#[tokio::test]
async fn a_damaged_authority_is_replaced_and_the_new_one_published() {
    let cluster = Cluster::start("damaged").await;
    let authority = cluster.authority().await;
    let before = cluster.bundle().await;
    let mut secret = cluster.secret().await;
    let garbage = ByteString(b"garbage".to_vec());
    secret.data.as_mut().unwrap().insert("ca.key".to_owned(), garbage);
    let how = PostParams::default();
    cluster.api::<Secret>().replace(authority::NAME, &how, &secret).await.unwrap();
    authority.keep().await.unwrap();
    assert_ne!(cluster.bundle().await, before);
}

#[tokio::test]
async fn replicas_that_begin_at_once_agree_on_one_authority() {
    let cluster = Cluster::start("race").await;
    let all = (0..8).map(|_| cluster.authority());
    let all = futures::future::join_all(all).await;
    let secret = cluster.secret().await;
    let certificate = &secret.data.as_ref().unwrap()["ca.crt"].0;
    assert_eq!(cluster.bundle().await.as_bytes(), certificate.as_slice());
    for authority in all {
        authority.keep().await.unwrap();
    }
    assert_eq!(cluster.secret().await, secret);
}

#[tokio::test]
async fn a_released_lease_goes_to_the_next_at_once() {
    let cluster = Cluster::start("lease").await;
    let first = cluster.lead("first").await;
    let next = cluster.lead("second");
    tokio::pin!(next);
    tokio::select! {
        _ = &mut next => panic!("there are two leaders"),
        // Two looks of the second one.
        () = tokio::time::sleep(Duration::from_millis(500)) => {}
    }
    assert_eq!(cluster.holder().await.as_deref(), Some("first"));
    first.release().await.unwrap();
    let _second = next.await;
    assert_eq!(cluster.holder().await.as_deref(), Some("second"));
}

#[tokio::test]
async fn a_lease_that_is_not_renewed_is_taken_over_and_its_holder_knows() {
    let cluster = Cluster::start("takeover").await;
    let seconds = Duration::from_secs;
    // A holder that is stuck: it renews too seldom.
    let stuck = Times { duration: seconds(1), deadline: seconds(600), retry: seconds(5) };
    let mut first = cluster.candidate("first", stuck).elect().await;
    let second = cluster.lead("second").await;
    assert_eq!(cluster.holder().await.as_deref(), Some("second"));
    let error = format!("{:#}", first.lost().await);
    assert!(error.contains("held by 'second'"), "{error}");
    second.release().await.unwrap();
}

#[tokio::test]
async fn whoever_loses_the_lease_is_told() {
    let cluster = Cluster::start("lost").await;
    let mut first = cluster.lead("first").await;
    let leases = cluster.api::<Lease>();
    // As somebody would who takes it by force; a renewal may come between.
    loop {
        let mut lease = leases.get(leader::NAME).await.unwrap();
        lease.spec.as_mut().unwrap().holder_identity = Some("thief".to_owned());
        match leases.replace(leader::NAME, &PostParams::default(), &lease).await {
            Ok(_) => break,
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => panic!("{error}"),
        }
    }
    let error = format!("{:#}", first.lost().await);
    assert!(error.contains("held by 'thief'"), "{error}");
}

/// The program itself.
struct Program {
    child: std::process::Child,
    http: std::net::SocketAddr,
    listen: std::net::SocketAddr,
}

impl Drop for Program {
    fn drop(&mut self) {
        // When a test failed; else it has ended already.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Program {
    fn start(cluster: &Cluster) -> Self {
        let free = || {
            let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
            listener.local_addr().unwrap()
        };
        let (http, listen) = (free(), free());
        let child = std::process::Command::new(env!("CARGO_BIN_EXE_ebackup-controller"))
            .args(["--namespace", &cluster.namespace])
            .args(["--http", &http.to_string(), "--listen", &listen.to_string()])
            .env("KUBECONFIG", std::env::var("EBACKUP_TEST_APISERVER_KUBECONFIG").unwrap())
            .spawn();
        Self { child: child.unwrap(), http, listen }
    }

    /// Whether it says that it is ready; none: it does not answer.
    fn is_ready(&self) -> Option<bool> {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(self.http).ok()?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer.starts_with("HTTP/1.1 200"))
    }

    async fn until(&mut self, ready: bool) {
        let begun = std::time::Instant::now();
        while self.is_ready() != Some(ready) {
            assert_eq!(self.child.try_wait().unwrap(), None, "the program ended");
            assert!(begun.elapsed() < Duration::from_secs(120), "ready: {ready}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Tells it to end, and waits.
    async fn end(&mut self) -> std::process::ExitStatus {
        let pid = self.child.id().to_string();
        assert!(std::process::Command::new("kill").arg(&pid).status().unwrap().success());
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn the_program_leads_serves_an_agent_and_hands_over_when_told_to_end() {
    use proto::v1::from_agent::Message as Said;
    use proto::v1::from_controller::Message;
    use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

    let cluster = Cluster::start("program").await;
    definitions::install(&cluster.client).await;
    cluster.account(ACCOUNT).await;
    let pod = cluster.pod("agent-1", Some(NODE)).await;
    let token = cluster.token(ACCOUNT, proto::TOKEN_AUDIENCE, Some(&pod)).await;
    let mut first = Program::start(&cluster);
    first.until(true).await;
    let mut second = Program::start(&cluster);
    second.until(false).await;

    let server = format!("ebackup-controller.{}.svc", cluster.namespace);
    let trust = Certificate::from_pem(cluster.bundle().await);
    let tls = ClientTlsConfig::new().ca_certificate(trust).domain_name(server);
    let endpoint = Endpoint::from_shared(format!("https://{}", first.listen)).unwrap();
    let channel = endpoint.tls_config(tls).unwrap().connect().await.unwrap();
    let mut client = proto::v1::mover_client::MoverClient::new(channel);
    let (say, said) = tokio::sync::mpsc::channel(1);
    let mut request = tonic::Request::new(tokio_stream::wrappers::ReceiverStream::new(said));
    let bearer = format!("Bearer {token}").parse().unwrap();
    request.metadata_mut().insert("authorization", bearer);
    let mut hear = client.connect(request).await.unwrap().into_inner();
    let hello = proto::v1::Hello { node: NODE.to_owned(), ..Default::default() };
    say.send(proto::v1::FromAgent { message: Some(Said::Hello(hello)) }).await.unwrap();
    let welcome = hear.message().await.unwrap().unwrap().message;
    assert!(matches!(welcome, Some(Message::Welcome(_))), "{welcome:?}");

    assert!(first.end().await.success());
    let end = hear.message().await.unwrap_err();
    assert_eq!(end.code(), tonic::Code::Unavailable, "{end}");
    second.until(true).await;
    assert!(second.end().await.success());
    assert_eq!(cluster.holder().await, None, "the lease is free");
}
