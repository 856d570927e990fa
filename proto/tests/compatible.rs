//! What one version says, the next one understands: every field, message and value that `mover.v1.binpb` holds is
//! there still, with the same number and type.
//!
//! A change that only adds is taken into `mover.v1.binpb` by running with `EBACKUP_BLESS=1`; without that, the test
//! fails on additions too, so that the file stays complete.

use std::collections::BTreeMap;
use std::path::Path;

use prost::Message;
use prost_types::{DescriptorProto, FileDescriptorSet};
use proto::v1::{FromAgent, FromController, Hello, Job};

/// Every part of the protocol by its full name, with what must not change about it.
fn parts(set: &FileDescriptorSet) -> BTreeMap<String, String> {
    let mut parts = BTreeMap::new();
    for file in &set.file {
        let package = file.package();
        for message in &file.message_type {
            message_parts(package, message, &mut parts);
        }
        for list in &file.enum_type {
            for value in &list.value {
                let name = format!("{package}.{}.{}", list.name(), value.name());
                parts.insert(name, format!("value {}", value.number()));
            }
        }
        for service in &file.service {
            for method in &service.method {
                let name = format!("{package}.{}.{}", service.name(), method.name());
                let input = (method.input_type(), method.client_streaming());
                let output = (method.output_type(), method.server_streaming());
                parts.insert(name, format!("method {input:?} {output:?}"));
            }
        }
    }
    parts
}

fn message_parts(scope: &str, message: &DescriptorProto, parts: &mut BTreeMap<String, String>) {
    let scope = format!("{scope}.{}", message.name());
    parts.insert(scope.clone(), "message".to_owned());
    for field in &message.field {
        let oneof = field.oneof_index.map(|index| message.oneof_decl[index as usize].name());
        let what = format!(
            "field {} {:?} {:?} {} {oneof:?}",
            field.number(),
            field.label(),
            field.r#type(),
            field.type_name()
        );
        parts.insert(format!("{scope}.{}", field.name()), what);
    }
    message.nested_type.iter().for_each(|nested| message_parts(&scope, nested, parts));
}

#[test]
fn nothing_that_was_said_once_changes_its_meaning() {
    let now = include_bytes!(concat!(env!("OUT_DIR"), "/mover.v1.binpb"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/mover.v1.binpb");
    let new = parts(&FileDescriptorSet::decode(&now[..]).unwrap());
    assert!(new.len() > 50, "the whole protocol is there");
    if let Ok(recorded) = std::fs::read(&path) {
        let old = parts(&FileDescriptorSet::decode(&recorded[..]).unwrap());
        for (name, what) in &old {
            assert_eq!(new.get(name), Some(what), "{name} must not change or go");
        }
        if old == new {
            return;
        }
    }
    assert!(
        std::env::var_os("EBACKUP_BLESS").is_some(),
        "the protocol has grown: record it by running this test with EBACKUP_BLESS=1"
    );
    std::fs::write(path, now).unwrap();
}

#[test]
fn what_a_newer_version_adds_is_passed_over() {
    // Field 999 with three bytes.
    let added = [0xba, 0x3e, 3, b'n', b'e', b'w'];
    assert_eq!(FromController::decode(&added[..]).unwrap().message, None);
    assert_eq!(FromAgent::decode(&added[..]).unwrap().message, None);
    let hello = Hello { node: "a".to_owned(), capacity: 3, ..Default::default() };
    let newer = [&hello.encode_to_vec()[..], &added].concat();
    assert_eq!(Hello::decode(&newer[..]).unwrap(), hello);
    // Work of a new kind is a job without work, which an agent refuses.
    let job = Job { id: "j".to_owned(), ..Default::default() };
    let newer = [&job.encode_to_vec()[..], &added].concat();
    assert_eq!(Job::decode(&newer[..]).unwrap(), job);
}

#[test]
fn everything_that_can_be_said_is_documented() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto/mover/v1/mover.proto");
    let text = std::fs::read_to_string(path).unwrap();
    let mut above = "";
    let mut documented = 0;
    for line in text.lines().map(str::trim) {
        let declares =
            ["message ", "enum ", "rpc ", "service "].iter().any(|it| line.starts_with(it));
        let is_part = line.ends_with(';') && line.contains(" = ") && !line.starts_with("syntax");
        if declares && line.ends_with(['{', '}', ';']) || is_part {
            assert!(above.starts_with("//"), "'{line}' has no comment");
            documented += 1;
        }
        above = line;
    }
    assert!(documented > 100, "{documented} declarations");
}
