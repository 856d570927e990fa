//! The S3 server of the tests: Ceph's object gateway, run by `radosgw.sh`.

use std::process::Command;

use anyhow::Result;

use crate::service::{READY, Service, Variables, free_ports, require, root};

/// One server.
pub(crate) struct Instance {
    name: &'static str,
    title: &'static str,
}

/// What tests share.
pub(crate) const FOR_ALL: Instance =
    Instance { name: "s3", title: "the S3 server, Ceph's object gateway" };

/// What the suite on the cluster uses alone, which kills it.
pub(crate) const FOR_CLUSTER: Instance =
    Instance { name: "s3-cluster", title: "the S3 server of the cluster, Ceph's object gateway" };

/// Programs it consists of, and the packages they come from.
const PROGRAMS: &[(&str, &str)] = &[
    ("radosgw", "radosgw"),
    ("ceph-mon", "ceph-mon"),
    ("ceph-osd", "ceph-osd"),
    ("ceph", "ceph-common"),
    ("openssl", "openssl"),
];

/// Starts the server, unless it runs, and returns the variables that tests find it by.
pub(crate) fn up(instance: &Instance) -> Result<Variables> {
    require("the S3 server of the tests", PROGRAMS)?;
    let service = service(instance)?;
    if let Some(variables) = service.running() {
        return Ok(variables);
    }
    // What an interrupted run left.
    down(instance)?;
    let script = root()?.join("chunkstore/objects/tests/radosgw.sh");
    service.start(Command::new(script).arg(&service.folder).arg(free_ports()?.to_string()))
}

/// Stops the server and forgets what it stored.
pub(crate) fn down(instance: &Instance) -> Result<()> {
    let service = service(instance)?;
    service.stop()?;
    service.forget()
}

fn service(instance: &Instance) -> Result<Service> {
    Service::new(instance.name, instance.title, READY)
}
