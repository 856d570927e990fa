//! A node with an agent on it, and the controller's side of its stream: the real program, over TLS, on a
//! folder that looks like the kubelet's, with repositories on the tests' S3 server.

#![allow(clippy::unwrap_used, unreachable_pub, reason = "tests fail by panicking")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use chunkstore::key_slot::Unlock;
use chunkstore::repository::Repository;
use objects::ObjectStore;
use objects::s3::S3Store;
use objects::testing::proxy::Proxy;
use objects::testing::server::{TestServer, fresh};
use proto::v1::finished::Outcome;
use proto::v1::from_agent::Message as Said;
use proto::v1::from_controller::Message;
use proto::v1::job::Work;
use proto::v1::mover_server::{Mover, MoverServer};
use proto::v1::{
    Addressing, Assign, Cancel, Credentials, FailureKind, Finished, FromAgent, FromController,
    Heartbeat, Hello, Job, OpenRepository, Recorded, Saved, Volume, Welcome,
};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

const BUCKET: &str = "ebackup-agent";
const NAME: &str = "ebackup-controller.velero.svc";
const PATIENCE: Duration = Duration::from_secs(60);
pub const TOKEN: &str = "token-of-the-agent";
pub const PASSPHRASE: &str = "passphrase of the test";

/// An authority, and what it signed for the controller.
pub struct Authority {
    pub certificate: String,
    identity: Identity,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let ca = params.self_signed(&key).unwrap();
        let issuer = rcgen::Issuer::from_params(&params, &key);
        let own = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![NAME.to_owned()]).unwrap();
        let signed = params.signed_by(&own, &issuer).unwrap();
        let identity = Identity::from_pem(signed.pem(), own.serialize_pem());
        Self { certificate: ca.pem(), identity }
    }
}

/// What happened on the streams.
#[derive(Default)]
struct Seen {
    /// What was said, with the number of the stream.
    said: Vec<(usize, Said)>,
    streams: usize,
    refused: usize,
    outgoing: Option<mpsc::Sender<Result<FromController, Status>>>,
    token: String,
    mute: bool,
}

#[derive(Clone, Default)]
struct Double(Arc<(Mutex<Seen>, Condvar)>);

impl Double {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.0.lock().unwrap()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Seen) -> T) -> T {
        let changed = change(&mut self.lock());
        self.0.1.notify_all();
        changed
    }
}

#[tonic::async_trait]
impl Mover for Double {
    type ConnectStream = Pin<Box<dyn Stream<Item = Result<FromController, Status>> + Send>>;

    async fn connect(
        &self,
        request: Request<Streaming<FromAgent>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let token = request.metadata().get("authorization").map(|value| value.to_str().unwrap());
        if token != Some(&*format!("Bearer {}", self.lock().token)) {
            self.change(|seen| seen.refused += 1);
            return Err(Status::unauthenticated("the token is not valid"));
        }
        let (outgoing, queue) = mpsc::channel(64);
        let number = self.change(|seen| {
            seen.streams += 1;
            seen.outgoing = Some(outgoing.clone());
            seen.streams
        });
        let mut incoming = request.into_inner();
        let double = self.clone();
        // What is sent goes through 'queue' alone, so that dropping its only lasting sender ends the stream.
        let weak = outgoing.downgrade();
        drop(outgoing);
        let beats = weak.clone();
        tokio::spawn(async move {
            while let Ok(Some(FromAgent { message: Some(message) })) = incoming.message().await {
                if matches!(message, Said::Hello(_))
                    && let Some(outgoing) = weak.upgrade()
                {
                    let welcome = Welcome {
                        version: "of the test".to_owned(),
                        capabilities: Vec::new(),
                        heartbeat_seconds: 2,
                    };
                    let message = FromController { message: Some(Message::Welcome(welcome)) };
                    let _ended = outgoing.send(Ok(message)).await;
                }
                double.change(|seen| seen.said.push((number, message)));
            }
        });
        let double = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(300)).await;
                let Some(outgoing) = beats.upgrade() else { return };
                if !double.lock().mute {
                    let beat = Message::Heartbeat(Heartbeat {});
                    let message = FromController { message: Some(beat) };
                    let _ended = outgoing.send(Ok(message)).await;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }
}

/// The controller's side.
pub struct Controller {
    double: Double,
    address: SocketAddr,
    pub authority: Authority,
    _runtime: tokio::runtime::Runtime,
}

impl Controller {
    pub fn start() -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let double = Double::default();
        double.change(|seen| seen.token = TOKEN.to_owned());
        let authority = Authority::new();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let tls = ServerTlsConfig::new().identity(authority.identity.clone());
        let service = MoverServer::new(double.clone());
        runtime.spawn(async move {
            let mut server = Server::builder().tls_config(tls).unwrap();
            let incoming = TcpIncoming::from(listener);
            server.add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        Self { double, address, authority, _runtime: runtime }
    }

    /// Waits until `find` finds something in what happened.
    #[track_caller]
    fn wait<T>(&self, what: &str, mut find: impl FnMut(&Seen) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        let mut seen = self.double.lock();
        loop {
            if let Some(found) = find(&seen) {
                return found;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} does not come; seen: {:?}", seen.said);
            seen = self.double.0.1.wait_timeout(seen, left).unwrap().0;
        }
    }

    /// Streams so far.
    pub fn streams(&self) -> usize {
        self.double.lock().streams
    }

    /// The Hello of the first stream after number `after`, and its number.
    #[track_caller]
    pub fn hello_after(&self, after: usize) -> (usize, Hello) {
        self.wait("a Hello", |seen| {
            seen.said.iter().find_map(|(number, said)| match said {
                Said::Hello(hello) if *number > after => Some((*number, hello.clone())),
                _ => None,
            })
        })
    }

    /// Waits until a dial was refused for its token.
    #[track_caller]
    pub fn refused(&self) {
        self.wait("a refused dial", |seen| (seen.refused > 0).then_some(()));
    }

    pub fn accept_token(&self, token: &str) {
        self.double.change(|seen| token.clone_into(&mut seen.token));
    }

    /// Whether to say nothing unasked.
    pub fn mute(&self, mute: bool) {
        self.double.change(|seen| seen.mute = mute);
    }

    #[track_caller]
    pub fn send(&self, message: Message) {
        let outgoing = self.double.lock().outgoing.clone().unwrap();
        outgoing.blocking_send(Ok(FromController { message: Some(message) })).unwrap();
    }

    /// Sends what a message comes as that the agent does not know.
    #[track_caller]
    pub fn send_unknown(&self) {
        let outgoing = self.double.lock().outgoing.clone().unwrap();
        outgoing.blocking_send(Ok(FromController { message: None })).unwrap();
    }

    #[track_caller]
    pub fn assign(&self, job: &Job) {
        self.send(Message::Assign(Assign { job: Some(job.clone()) }));
    }

    #[track_caller]
    pub fn cancel(&self, id: &str) {
        self.send(Message::Cancel(Cancel { job_id: id.to_owned() }));
    }

    #[track_caller]
    pub fn record(&self, id: &str) {
        self.send(Message::Recorded(Recorded { job_id: id.to_owned() }));
    }

    /// Ends the stream, and waits for the next one.
    #[track_caller]
    pub fn cut(&self) -> Hello {
        let before = self.double.change(|seen| {
            seen.outgoing = None;
            seen.streams
        });
        self.hello_after(before).1
    }

    /// How often it was said that a job ended.
    pub fn times_finished(&self, id: &str) -> usize {
        self.double.lock().said.iter().filter_map(|(_, said)| end_of(said, id)).count()
    }

    /// Waits until it was said so for the `n`th time.
    #[track_caller]
    pub fn finished_times(&self, id: &str, n: usize) -> Finished {
        self.wait(&format!("the end of job '{id}'"), |seen| {
            seen.said.iter().filter_map(|(_, said)| end_of(said, id)).nth(n - 1).cloned()
        })
    }

    /// Waits until some of a job is done.
    #[track_caller]
    pub fn progress(&self, id: &str) -> u64 {
        self.wait(&format!("progress of job '{id}'"), |seen| {
            seen.said.iter().find_map(|(_, said)| match said {
                Said::Progress(progress) if progress.job_id == id => Some(progress.bytes_done),
                _ => None,
            })
        })
    }

    /// Waits for the answer to a probe.
    #[track_caller]
    pub fn probed(&self, id: &str) -> String {
        self.wait(&format!("the answer to probe '{id}'"), |seen| {
            seen.said.iter().find_map(|(_, said)| match said {
                Said::ProbeResult(result) if result.id == id => Some(result.error.clone()),
                _ => None,
            })
        })
    }

    /// Assigns a job, waits for its end, and records it.
    #[track_caller]
    pub fn run(&self, job: &Job) -> Finished {
        let before = self.times_finished(&job.id);
        self.assign(job);
        let finished = self.finished_times(&job.id, before + 1);
        self.record(&job.id);
        finished
    }

    /// The same for a backup that succeeds.
    #[track_caller]
    pub fn save(&self, job: &Job) -> Saved {
        saved(&self.run(job))
    }

    /// The same for a job that fails.
    #[track_caller]
    pub fn fail(&self, job: &Job) -> (FailureKind, String) {
        failure(&self.run(job))
    }
}

/// How a job ended, if that is said, by itself or in a Hello.
fn end_of<'a>(said: &'a Said, id: &str) -> Option<&'a Finished> {
    match said {
        Said::Finished(finished) => Some(finished).filter(|finished| finished.job_id == id),
        Said::Hello(hello) => hello.finished.iter().find(|finished| finished.job_id == id),
        _ => None,
    }
}

#[track_caller]
pub fn saved(finished: &Finished) -> Saved {
    match &finished.outcome {
        Some(Outcome::Saved(saved)) => saved.clone(),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
pub fn failure(finished: &Finished) -> (FailureKind, String) {
    match &finished.outcome {
        Some(Outcome::Failure(failure)) => (failure.kind(), failure.message.clone()),
        other => panic!("{other:?}"),
    }
}

/// A location: a prefix of its own in the bucket.
pub struct Location {
    pub server: TestServer,
    prefix: String,
    pub repository: proto::v1::Repository,
}

impl Location {
    pub fn new() -> Self {
        let server = TestServer::from_env();
        server.make_bucket(&server.config(BUCKET, ""));
        let prefix = fresh("location");
        let repository = proto::v1::Repository {
            location: "default".to_owned(),
            url: format!("s3://{BUCKET}/{prefix}"),
            endpoint: server.endpoint("127.0.0.1"),
            addressing: Addressing::Path.into(),
            ca_certificates: fs::read(&server.ca).unwrap(),
            credentials: Some(credentials(&server.key, &server.secret)),
            passphrase: PASSPHRASE.as_bytes().to_vec(),
            ..Default::default()
        };
        Self { server, prefix, repository }
    }

    /// As [`new`](Self::new), reached through a proxy.
    pub fn behind(proxy: &Proxy) -> Self {
        let mut location = Self::new();
        location.repository.endpoint = proxy.server().endpoint("127.0.0.1");
        location
    }

    pub fn job(&self, id: &str, work: Work) -> Job {
        Job {
            id: id.to_owned(),
            subject: format!("PodVolumeBackup/velero/{id}"),
            repository: Some(self.repository.clone()),
            work: Some(work),
            ..Default::default()
        }
    }

    /// A job that makes the repository.
    pub fn create(&self) -> Job {
        let work = OpenRepository { create: true, ..Default::default() };
        self.job("create", Work::Open(work))
    }

    pub fn store(&self) -> Arc<S3Store> {
        Arc::new(S3Store::open(self.server.path_config(BUCKET, &self.prefix)).unwrap())
    }

    /// The repository, opened by the test itself.
    pub fn open(&self) -> Arc<Repository> {
        let unlock = Unlock::Passphrase(self.repository.passphrase.clone());
        Arc::new(Repository::open(self.store(), &unlock).unwrap())
    }

    /// Names of objects in a folder of the repository.
    pub fn names(&self, store: &S3Store, folder: &str) -> Vec<String> {
        let mut names = Vec::new();
        store
            .list(folder, &mut |meta| {
                names.push(meta.key);
                Ok(())
            })
            .unwrap();
        names
    }
}

pub fn credentials(key: &str, secret: &str) -> Credentials {
    Credentials {
        access_key: key.to_owned(),
        secret_key: secret.to_owned(),
        session_token: String::new(),
    }
}

/// A node: a folder like the kubelet's, and an agent.
pub struct Node {
    dir: TempDir,
    child: Option<Child>,
    options: Vec<String>,
}

impl Node {
    /// A node whose agent is about to be started.
    pub fn new(controller: &Controller, options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::create_dir_all(dir.path().join("kubelet/pods/agent-uid")).unwrap();
        fs::write(dir.path().join("token"), TOKEN).unwrap();
        fs::write(dir.path().join("ca.crt"), &controller.authority.certificate).unwrap();
        let pairs = [
            ("--controller", controller.address.to_string()),
            ("--server-name", NAME.to_owned()),
            ("--node", "node-1".to_owned()),
            ("--pod-uid", "agent-uid".to_owned()),
            ("--kubelet-root", path("kubelet")),
            ("--token-file", path("token")),
            ("--ca-file", path("ca.crt")),
            ("--cache-dir", path("cache")),
            ("--scratch", path("scratch")),
            ("--http", "127.0.0.1:0".to_owned()),
        ];
        let mut all: Vec<_> =
            pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]).collect();
        all.extend(options.iter().map(|option| (*option).to_owned()));
        Self { dir, child: None, options: all }
    }

    /// A node whose agent is connected.
    pub fn connected(controller: &Controller, options: &[&str]) -> (Self, Hello) {
        let mut node = Self::new(controller, options);
        let before = controller.streams();
        node.start();
        let (_, hello) = controller.hello_after(before);
        (node, hello)
    }

    pub fn start(&mut self) {
        let log = File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ebackup"));
        command.arg("agent").args(&self.options).env_clear();
        self.child = Some(command.stdin(Stdio::null()).stderr(log).spawn().unwrap());
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits until the log has `part`.
    #[track_caller]
    pub fn logs(&self, part: &str) {
        eventually(part, || self.log().contains(part));
    }

    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Waits for the agent to end by itself.
    pub fn ended(&mut self) -> ExitStatus {
        self.child.take().unwrap().wait().unwrap()
    }

    pub fn terminate(&mut self) -> ExitStatus {
        use rustix::process::{Pid, Signal, kill_process};
        let child = self.child.as_ref().unwrap();
        kill_process(Pid::from_child(child), Signal::TERM).unwrap();
        self.ended()
    }

    /// Bytes that the agent had in memory at most, apart from its program file, which the kernel drops
    /// when memory is scarce.
    pub fn peak_memory(&self) -> u64 {
        let pid = self.child.as_ref().unwrap().id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let kib = |name: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        (kib("VmHWM:") - kib("RssFile:")) << 10
    }

    /// Makes the folder of a volume.
    pub fn volume(&self, pod: &str, plugin: &str, name: &str) -> (PathBuf, Volume) {
        let path = self.path("kubelet/pods").join(pod).join("volumes").join(plugin).join(name);
        fs::create_dir_all(&path).unwrap();
        let volume = Volume {
            pod_uid: pod.to_owned(),
            plugin: plugin.to_owned(),
            directory: name.to_owned(),
            in_mount: false,
        };
        (path, volume)
    }

    /// Answers an HTTP request: the whole answer.
    pub fn http(&self, path: &str) -> String {
        self.logs("metrics and health at http://");
        let log = self.log();
        let address = log.rsplit("metrics and health at http://").next().unwrap();
        let is_address = |char: char| char.is_ascii_digit() || ".:".contains(char);
        let address = address.split(|char| !is_address(char)).next().unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        if std::thread::panicking() {
            let log = format!("---- log of the agent ----\n{}\n", self.log());
            // The test fails anyway.
            let _unseen = std::io::stderr().write_all(log.as_bytes());
        }
    }
}

/// Waits until `is` holds.
#[track_caller]
pub fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < until, "'{what}' does not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

#[track_caller]
pub fn assert_same(a: &Path, b: &Path) {
    let diff = Command::new("diff").args(["-r", "-x", ".velero"]).arg(a).arg(b).output().unwrap();
    assert!(diff.status.success(), "{}", String::from_utf8_lossy(&diff.stdout));
}
