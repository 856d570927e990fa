//! The memory and processors this process was given: by its control group, or by the machine.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of memory the process may use: the smallest limit of its control groups, or the memory of
/// the machine. `None` if neither can be read.
pub fn memory_bytes() -> Option<u64> {
    limit_bytes().into_iter().chain(machine_memory()).min()
}

/// The smallest memory limit of the process's control groups; `None` if there is none below what the
/// machine has.
pub fn limit_bytes() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limit = group_folders(&own, Path::new("/sys/fs/cgroup"))
        .into_iter()
        .flat_map(|folder| {
            ["memory.max", "memory.limit_in_bytes"].map(|name| read_number(&folder.join(name)))
        })
        .flatten()
        .min();
    // Version 1 has no word for "none" but a very large number.
    limit.filter(|limit| machine_memory().is_none_or(|machine| *limit < machine))
}

/// Processors the process may use, rounded up.
pub fn cpus() -> usize {
    // The standard library honours the quota of the control group and the affinity mask.
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The folders of the process's groups and of all groups around them, in both versions of the
/// hierarchy. Within a container the group's own path may not exist; its root then is the limit.
fn group_folders(own: &str, root: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let base = match controllers {
            "" => root.to_owned(),
            _ if controllers.split(',').any(|name| name == "memory") => root.join("memory"),
            _ => continue,
        };
        let path = Path::new(path.trim_start_matches('/'));
        folders.extend(path.ancestors().map(|part| base.join(part)));
    }
    folders
}

fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn machine_memory() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_both_hierarchies_are_found() {
        let own = "5:cpu,cpuacct:/x\n4:memory:/pod/a\n0::/pod/a\n";
        let folders = group_folders(own, Path::new("/cg"));
        let expected =
            ["/cg/memory/pod/a", "/cg/memory/pod", "/cg/memory", "/cg/pod/a", "/cg/pod", "/cg"];
        assert_eq!(folders, expected.map(PathBuf::from));
    }

    #[test]
    fn this_machine_has_memory_and_processors() {
        assert!(memory_bytes().unwrap() > 1 << 20);
        assert!(cpus() >= 1);
    }
}
