//! The container image, tried out in a changed root folder, as the user it runs as.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::thread;

/// Makes the image of the programs beside this test, and returns a copy of its files.
fn image() -> tempfile::TempDir {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let files = MADE.get_or_init(|| {
        let xtask = Path::new(env!("CARGO_BIN_EXE_xtask"));
        // Not where it is for the cluster, which may be in use.
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target/image-of-test");
        let mut make = Command::new(xtask);
        let made = make.arg("image").arg(xtask.parent().unwrap()).arg(&folder).output().unwrap();
        assert!(
            made.status.success(),
            "programs must be built first, with 'cargo build --workspace': {}",
            String::from_utf8_lossy(&made.stderr)
        );
        folder.join("root")
    });
    let copy = tempfile::tempdir().unwrap();
    let cp = Command::new("cp").arg("-aT").arg(files).arg(copy.path()).status().unwrap();
    assert!(cp.success());
    copy
}

fn run_in(root: &Path, program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("chroot");
    command.arg("--userspec=65532:65532").arg(root).arg(program).args(arguments);
    let output = command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .env("AWS_ACCESS_KEY_ID", "key")
        .env("AWS_SECRET_ACCESS_KEY", "secret")
        .env("EBACKUP_PASSWORD", "password")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!text.contains("Operation not permitted"), "this test needs root: {text}");
    output
}

#[test]
fn the_programs_run_with_nothing_but_the_image() {
    let root = image();
    for program in ["ebackup", "ebackup-controller"] {
        let output = run_in(root.path(), &format!("/usr/bin/{program}"), &["--version"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn names_are_looked_up_in_the_file_of_hosts() {
    let root = image();
    std::fs::write(root.path().join("etc/hosts"), "127.0.0.1 listed.test\n").unwrap();
    std::fs::write(root.path().join("etc/resolv.conf"), "").unwrap();
    assert_reaches(root.path(), "listed.test");
}

#[test]
fn names_are_looked_up_by_dns() {
    let root = image();
    let server = UdpSocket::bind((Ipv4Addr::new(127, 0, 81, 53), 53));
    let server = server.expect("this test needs root, for a name server's port");
    std::fs::write(root.path().join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
    std::fs::write(root.path().join("etc/resolv.conf"), "nameserver 127.0.81.53\n").unwrap();
    // Ends with the test's process.
    thread::spawn(move || serve_names(&server));
    assert_reaches(root.path(), "asked.test");
}

/// The program opens a connection to the server of that name.
fn assert_reaches(root: &Path, name: &str) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let seen = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
        let host = lines.find(|line| line.to_ascii_lowercase().starts_with("host:")).unwrap();
        // A refusal that is not tried again.
        stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").unwrap();
        host
    });
    let endpoint = format!("http://{name}:{port}");
    let arguments = ["snapshots", "--repo", "s3://bucket/prefix", "--path-style", "--endpoint"];
    let output = run_in(root, "/usr/bin/ebackup", &[&arguments[..], &[&endpoint]].concat());
    // Before the thread is waited for, which waits for a connection.
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("403") || text.to_ascii_lowercase().contains("denied"), "{text}");
    assert!(seen.join().unwrap().ends_with(&format!("{name}:{port}")));
}

/// Answers every question for an address with 127.0.0.1.
fn serve_names(server: &UdpSocket) {
    let mut packet = [0; 512];
    while let Ok((length, client)) = server.recv_from(&mut packet) {
        // A header of 12 bytes, a name of labels that ends with a zero, type and class.
        let name = packet[12..length].iter().position(|byte| *byte == 0).unwrap();
        let end = 12 + name + 5;
        let is_for_address = packet[end - 4..end] == [0, 1, 0, 1];
        let mut answer = packet[..end].to_vec();
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_for_address), 0, 0, 0, 0]);
        if is_for_address {
            // The name above, type A, class IN, a minute, four bytes.
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
        }
        server.send_to(&answer, client).unwrap();
    }
}
