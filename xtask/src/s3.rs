//! The S3 server of the tests: Ceph's object gateway, run by `radosgw.sh`.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::service::{Service, Variables, require, root};

/// Port of the plain endpoint; the next ones are taken too.
const PORT: u16 = 18_096;

/// Programs it consists of, and the packages they come from.
const PROGRAMS: &[(&str, &str)] = &[
    ("radosgw", "radosgw"),
    ("ceph-mon", "ceph-mon"),
    ("ceph-osd", "ceph-osd"),
    ("ceph", "ceph-common"),
    ("openssl", "openssl"),
];

fn service() -> Result<Service> {
    Service::new("s3", "the S3 server, Ceph's object gateway", Duration::from_secs(120))
}

/// Starts the server, unless it runs, and returns the variables that tests find it by.
pub(crate) fn up() -> Result<Variables> {
    require("the S3 server of the tests", PROGRAMS)?;
    let service = service()?;
    if let Some(variables) = service.running() {
        return Ok(variables);
    }
    // What an interrupted run left.
    down()?;
    let script = root()?.join("chunkstore/objects/tests/radosgw.sh");
    service.start(Command::new(script).arg(&service.folder).arg(PORT.to_string()))
}

/// Stops the server and forgets what it stored.
pub(crate) fn down() -> Result<()> {
    let service = service()?;
    service.stop()?;
    service.forget()
}
