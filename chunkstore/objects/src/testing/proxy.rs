//! A proxy in front of the tests' S3 server that does to requests what networks, stores and crashes
//! do to them, and tells what was asked.
//!
//! Plain HTTP, and one connection for each request: so none is sent again but by the client, and each
//! fault hits the request that the rule chose. Bodies are held in memory.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use aws_lc_rs::{digest, hmac};

use super::server::TestServer;

/// One request, as it came.
#[derive(Debug, Clone)]
pub struct Request {
    /// How many came before.
    pub n: usize,
    /// `PUT`, `GET` and so on.
    pub method: String,
    /// As it was sent, percent-encoded, without the query.
    pub path: String,
    /// What follows the question mark.
    pub query: String,
    /// Names in small letters, and values.
    pub headers: Vec<(String, String)>,
}

impl Request {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| &**value)
    }

    /// What S3 calls this request.
    pub fn operation(&self) -> &'static str {
        let asks = |name: &str| {
            self.query.split('&').any(|part| part.split('=').next().unwrap_or_default() == name)
        };
        match &*self.method {
            "PUT" if asks("partNumber") => "UploadPart",
            "PUT" if self.path == "/" => "CreateBucket",
            "PUT" => "PutObject",
            "POST" if asks("delete") => "DeleteObjects",
            "POST" if asks("uploads") => "CreateMultipartUpload",
            "POST" if asks("uploadId") => "CompleteMultipartUpload",
            "DELETE" if asks("uploadId") => "AbortMultipartUpload",
            "DELETE" => "DeleteObject",
            "HEAD" if self.path == "/" => "HeadBucket",
            "HEAD" => "HeadObject",
            "GET" if asks("uploads") => "ListMultipartUploads",
            "GET" if self.path == "/" => "ListObjects",
            "GET" => "GetObject",
            _ => "unknown",
        }
    }
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is passed on, and so is the answer.
    Pass,
    /// The connection is closed before the store has heard of it: a reset, if it has a body.
    DropRequest,
    /// The store does what is asked; the connection is closed without an answer.
    DropAnswer,
    /// Its body is read only after this time, and then it is passed on, if it is still whole.
    Delay(Duration),
    /// The answer ends, with the connection, after half of its bytes.
    Truncate,
    /// It is passed on, and then once more; the first answer counts.
    Duplicate,
    /// This status and S3 error code are the answer; the store does not hear of it.
    Answer(u16, &'static str),
    /// It is passed on, and the answer gets this header line.
    Add(&'static str),
    /// It is passed on without this header, and signed anew, so that the store does not notice.
    Strip(&'static str),
}

type Rule = dyn Fn(&Request) -> Fault + Send + Sync;

struct Shared {
    server: TestServer,
    rule: RwLock<Arc<Rule>>,
    seen: Mutex<Vec<Request>>,
    stopped: AtomicBool,
}

/// A running proxy, which passes everything until it is given a rule, and stops when dropped.
pub struct Proxy {
    shared: Arc<Shared>,
    port: u16,
    accepting: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts one in front of `server`, which may be another proxy's.
    ///
    /// # Panics
    /// When there is no free port.
    pub fn start(server: &TestServer) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let shared = Arc::new(Shared {
            server: server.clone(),
            rule: RwLock::new(Arc::new(|_: &Request| Fault::Pass)),
            seen: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        let accepting = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared)
        });
        Self { shared, port, accepting: Some(accepting) }
    }

    /// One that hides from the store that objects are to be created only if they are absent, as a
    /// store does that ignores the condition.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    pub fn without_conditions(server: &TestServer) -> Self {
        let proxy = Self::start(server);
        proxy.rule(|request| match request.header("if-none-match") {
            Some(_) => Fault::Strip("if-none-match"),
            None => Fault::Pass,
        });
        proxy
    }

    /// From now on `rule` decides what becomes of each request. It is asked by many threads at once.
    pub fn rule(&self, rule: impl Fn(&Request) -> Fault + Send + Sync + 'static) {
        *self.shared.rule.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rule);
    }

    /// The server as it is reached through here, without TLS.
    pub fn server(&self) -> TestServer {
        TestServer { port: self.port, tls_port: None, ..self.shared.server.clone() }
    }

    /// What was asked so far, in the order in which it came.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // One more connection, for it to notice.
        let _woken = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        let _ended = self.accepting.take().map(JoinHandle::join);
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for client in listener.incoming() {
        if shared.stopped.load(Ordering::SeqCst) {
            return;
        }
        let (Ok(client), shared) = (client, Arc::clone(shared)) else { continue };
        // A connection that breaks is nothing new to a client of this proxy.
        std::thread::spawn(move || {
            let _broken = serve(&shared, &client);
        });
    }
}

fn serve(shared: &Shared, mut client: &TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(client);
    let Some(request) = read_request(&mut reader)? else {
        return Ok(());
    };
    let request = {
        let mut seen = shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let request = Request { n: seen.len(), ..request };
        seen.push(request.clone());
        request
    };
    let rule = Arc::clone(&shared.rule.read().unwrap_or_else(PoisonError::into_inner));
    let fault = rule(&request);
    if fault == Fault::DropRequest {
        return Ok(()); // with the body unread, which makes it a reset
    }
    if let Fault::Delay(time) = fault {
        std::thread::sleep(time);
    }
    let len = request.header("content-length").and_then(|len| len.parse().ok()).unwrap_or(0);
    let mut body = vec![0; len];
    reader.read_exact(&mut body)?;
    let forward = |request: &Request| forward(shared.server.port, request, &body);
    match fault {
        Fault::Pass | Fault::Delay(_) => client.write_all(&forward(&request)?),
        Fault::DropRequest => Ok(()),
        Fault::DropAnswer => forward(&request).map(drop),
        Fault::Truncate => {
            let answer = forward(&request)?;
            client.write_all(answer.get(..answer.len() / 2).unwrap_or_default())
        }
        Fault::Duplicate => {
            let answer = forward(&request)?;
            forward(&request)?;
            client.write_all(&answer)
        }
        Fault::Answer(status, code) => client.write_all(&own_answer(&request, status, code)),
        Fault::Add(line) => {
            let mut answer = forward(&request)?;
            let head = answer.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            answer.splice(head..head, format!("{line}\r\n").into_bytes());
            client.write_all(&answer)
        }
        Fault::Strip(header) => {
            client.write_all(&forward(&without(request, header, &shared.server.secret))?)
        }
    }
}

/// Lines up to the first empty one; none if the connection ends before.
fn read_head(reader: &mut impl BufRead) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(Vec::new());
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(lines);
        }
        lines.push(line.to_owned());
    }
}

fn read_request(reader: &mut impl BufRead) -> io::Result<Option<Request>> {
    let lines = read_head(reader)?;
    let Some((first, rest)) = lines.split_first() else {
        return Ok(None);
    };
    let mut words = first.split(' ');
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let headers = rest.iter().filter_map(|line| line.split_once(':'));
    let headers =
        headers.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
    Ok(Some(Request { n: 0, method, path: path.to_owned(), query: query.to_owned(), headers }))
}

/// Sends a request to the store, and gives its whole answer.
fn forward(port: u16, request: &Request, body: &[u8]) -> io::Result<Vec<u8>> {
    let mut store = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    store.set_nodelay(true)?;
    let Request { method, path, query, headers, .. } = request;
    let mark = if query.is_empty() { "" } else { "?" };
    let mut head = format!("{method} {path}{mark}{query} HTTP/1.1\r\nconnection: close\r\n");
    for (name, value) in headers.iter().filter(|(name, _)| name != "connection") {
        head += &format!("{name}: {value}\r\n");
    }
    // A store may answer and hang up before it has heard all.
    let sent = store.write_all(&[head.as_bytes(), b"\r\n", body].concat());
    let mut reader = BufReader::new(store);
    let lines = read_head(&mut reader)?;
    if lines.is_empty() {
        return Err(sent.err().unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into()));
    }
    let is_connection = |line: &str| line.to_ascii_lowercase().starts_with("connection:");
    let kept: Vec<_> = lines.into_iter().filter(|line| !is_connection(line)).collect();
    let mut answer = format!("{}\r\nconnection: close\r\n\r\n", kept.join("\r\n")).into_bytes();
    // What it cuts off, the client sees by the length.
    let _hung_up = reader.read_to_end(&mut answer);
    Ok(answer)
}

fn own_answer(request: &Request, status: u16, code: &str) -> Vec<u8> {
    let body = match &*request.method {
        "HEAD" => String::new(),
        _ => format!("<Error><Code>{code}</Code><Message>by the proxy</Message></Error>"),
    };
    let head = "content-type: application/xml\r\nconnection: close\r\ncontent-length:";
    format!("HTTP/1.1 {status} {code}\r\n{head} {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// The request without a header, signed with its own date (AWS Signature Version 4).
fn without(mut request: Request, header: &str, secret: &str) -> Request {
    request.headers.retain(|(name, _)| name != header);
    let Some(signature) = request.header("authorization").map(str::to_owned) else {
        return request;
    };
    let field = |name: &str| {
        let rest = signature.split_once(name).map_or("", |(_, rest)| rest);
        rest.split([',', ' ']).next().unwrap_or_default().to_owned()
    };
    let credential = field("Credential=");
    let scope = credential.split_once('/').map_or("", |(_, scope)| scope);
    let signed = field("SignedHeaders=");
    let signed: Vec<_> = signed.split(';').filter(|name| *name != header).collect();
    let value = |name: &str| request.header(name).unwrap_or_default();
    let mut parameters: Vec<_> = request
        .query
        .split('&')
        .filter(|part| !part.is_empty())
        .map(|part| if part.contains('=') { part.to_owned() } else { format!("{part}=") })
        .collect();
    parameters.sort();
    let lines: String = signed.iter().map(|name| format!("{name}:{}\n", value(name))).collect();
    let canonical = format!(
        "{}\n{}\n{}\n{lines}\n{}\n{}",
        request.method,
        request.path,
        parameters.join("&"),
        signed.join(";"),
        value("x-amz-content-sha256")
    );
    let hash = hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref());
    let text = format!("AWS4-HMAC-SHA256\n{}\n{scope}\n{hash}", value("x-amz-date"));
    let key = scope
        .split('/')
        .fold(format!("AWS4{secret}").into_bytes(), |key, part| mac(&key, part.as_bytes()));
    let signature = format!(
        "AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={}, Signature={}",
        signed.join(";"),
        hex(&mac(&key, text.as_bytes()))
    );
    for (_, value) in request.headers.iter_mut().filter(|(name, _)| name == "authorization") {
        value.clone_from(&signature);
    }
    request
}

fn mac(key: &[u8], text: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text).as_ref().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
