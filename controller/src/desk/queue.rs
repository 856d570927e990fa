//! Who is next: a pure planner. From the jobs that wait and run, the agents and the limits follow the jobs to
//! assign now, and, for each that goes on waiting, why.
//!
//! Restores come first: somebody waits for them. Among the others each backup gets its turn, so that a large one
//! does not hold up a small one; a new one has its first turn after those that are there, so that many small ones do
//! not hold up a large one either. Within a backup the oldest comes first. A job whose node cannot take it holds nobody
//! up.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

/// What kind of work a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Comes first.
    Restore,
    /// Comes after that.
    Backup,
}

/// A job that could be assigned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Its id.
    pub id: String,
    /// What it is.
    pub kind: Kind,
    /// Name of the backup or restore that it is part of.
    pub group: String,
    /// When it was created, in seconds.
    pub created: i64,
    /// The node that it must run on.
    pub node: String,
}

/// A job that runs, or is about to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// The node that it runs on.
    pub node: String,
    /// Whether it moves a volume, and so counts against the limits on those. Others only take room on their node.
    pub volume: bool,
}

/// How many volumes may be moved at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// In the cluster.
    pub cluster: u32,
    /// On each node. 0: no limit but that of the cluster.
    pub node: u32,
}

/// Why a job waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// No agent is connected from its node.
    NoAgent,
    /// The limit of the cluster is reached.
    Cluster,
    /// The limit of its node is reached.
    Node,
    /// Its node's agent has no memory for another job.
    Agent,
}

/// Whose turn it is: in which order groups were served, or first seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Turns {
    last: BTreeMap<(Kind, String), u64>,
    count: u64,
}

impl Turns {
    /// Notes that a job of the group was assigned.
    pub fn served(&mut self, kind: Kind, group: &str) {
        self.count += 1;
        self.last.insert((kind, group.to_owned()), self.count);
    }

    /// Forgets groups that no job is part of any more.
    pub fn retain(&mut self, alive: &BTreeSet<(Kind, String)>) {
        self.last.retain(|group, _| alive.contains(group));
    }

    /// New groups stand behind all others, in the order of `waiting`.
    fn welcome(&mut self, waiting: &[&Waiting]) {
        for job in waiting {
            let group = (job.kind, job.group.clone());
            if let Entry::Vacant(new) = self.last.entry(group) {
                self.count += 1;
                new.insert(self.count);
            }
        }
    }

    fn of(&self, waiting: &Waiting) -> u64 {
        self.last.get(&(waiting.kind, waiting.group.clone())).copied().unwrap_or(u64::MAX)
    }
}

/// What to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Ids of the jobs to assign, in this order.
    pub assign: Vec<String>,
    /// Why the others wait, by id.
    pub wait: BTreeMap<String, Why>,
}

/// Plans. `capacity` tells how many jobs the agent of each connected node can run at once.
pub fn plan(
    waiting: &[Waiting],
    running: &[Running],
    capacity: &BTreeMap<String, u32>,
    limits: Limits,
    turns: &mut Turns,
) -> Plan {
    let mut load = Load::new(running);
    let mut left: Vec<&Waiting> = waiting.iter().collect();
    // By age, so that the first of a group is its oldest.
    left.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
    turns.welcome(&left);
    let mut plan = Plan::default();
    loop {
        let free = left.iter().enumerate().filter(|(_, job)| {
            load.obstacle(&job.node, capacity.get(&job.node).copied(), limits).is_none()
        });
        // The first of several equal ones is taken: the oldest.
        let next = free.min_by_key(|(_, job)| (job.kind, turns.of(job)));
        let Some((at, job)) = next else {
            break;
        };
        load.add(&job.node, true);
        turns.served(job.kind, &job.group);
        plan.assign.push(job.id.clone());
        left.remove(at);
    }
    for job in left {
        let obstacle = load.obstacle(&job.node, capacity.get(&job.node).copied(), limits);
        plan.wait.extend(obstacle.map(|why| (job.id.clone(), why)));
    }
    plan
}

/// Jobs by node.
struct Load {
    volumes: u32,
    volumes_on: BTreeMap<String, u32>,
    jobs_on: BTreeMap<String, u32>,
}

impl Load {
    fn new(running: &[Running]) -> Self {
        let mut load = Self { volumes: 0, volumes_on: BTreeMap::new(), jobs_on: BTreeMap::new() };
        for job in running {
            load.add(&job.node, job.volume);
        }
        load
    }

    fn add(&mut self, node: &str, volume: bool) {
        *self.jobs_on.entry(node.to_owned()).or_default() += 1;
        if volume {
            self.volumes += 1;
            *self.volumes_on.entry(node.to_owned()).or_default() += 1;
        }
    }

    fn obstacle(&self, node: &str, capacity: Option<u32>, limits: Limits) -> Option<Why> {
        let on = |counts: &BTreeMap<String, u32>| counts.get(node).copied().unwrap_or(0);
        match capacity {
            None => Some(Why::NoAgent),
            Some(_) if self.volumes >= limits.cluster => Some(Why::Cluster),
            Some(_) if limits.node > 0 && on(&self.volumes_on) >= limits.node => Some(Why::Node),
            Some(capacity) if on(&self.jobs_on) >= capacity.max(1) => Some(Why::Agent),
            Some(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn job(id: &str, kind: Kind, group: &str, created: i64, node: &str) -> Waiting {
        Waiting { id: id.to_owned(), kind, group: group.to_owned(), created, node: node.to_owned() }
    }

    fn nodes(all: &[(&str, u32)]) -> BTreeMap<String, u32> {
        all.iter().map(|(node, capacity)| ((*node).to_owned(), *capacity)).collect()
    }

    const THREE: Limits = Limits { cluster: 3, node: 0 };

    #[test]
    fn restores_come_first_and_backups_take_turns() {
        let waiting = [
            job("a1", Kind::Backup, "a", 1, "n"),
            job("a2", Kind::Backup, "a", 2, "n"),
            job("a3", Kind::Backup, "a", 3, "n"),
            job("b1", Kind::Backup, "b", 9, "n"),
            job("r1", Kind::Restore, "r", 10, "n"),
        ];
        let mut turns = Turns::default();
        let first = plan(&waiting, &[], &nodes(&[("n", 9)]), THREE, &mut turns);
        assert_eq!(first.assign, ["r1", "a1", "b1"]);
        assert_eq!(first.wait["a2"], Why::Cluster);
        let mut more = vec![waiting[1].clone(), waiting[2].clone()];
        more.push(job("b2", Kind::Backup, "b", 10, "n"));
        more.push(job("c1", Kind::Backup, "c", 11, "n"));
        let second = plan(&more, &[], &nodes(&[("n", 9)]), THREE, &mut turns);
        assert_eq!(second.assign, ["a2", "b2", "c1"], "by turns, and who is new comes last");
    }

    #[test]
    fn each_obstacle_is_named_and_holds_nobody_else_up() {
        let waiting = [
            job("lost", Kind::Restore, "r", 1, "gone"),
            job("full", Kind::Backup, "a", 1, "small"),
            job("busy", Kind::Backup, "a", 1, "busy"),
            job("good", Kind::Backup, "a", 2, "n"),
        ];
        let running = [
            Running { node: "small".to_owned(), volume: false },
            Running { node: "busy".to_owned(), volume: true },
        ];
        let capacity = nodes(&[("small", 1), ("busy", 4), ("n", 1)]);
        let limits = Limits { cluster: 9, node: 1 };
        let plan = plan(&waiting, &running, &capacity, limits, &mut Turns::default());
        assert_eq!(plan.assign, ["good"]);
        let why: Vec<Why> = ["lost", "full", "busy"].map(|id| plan.wait[id]).to_vec();
        assert_eq!(why, [Why::NoAgent, Why::Agent, Why::Node]);
    }

    #[test]
    fn a_steady_stream_of_small_backups_does_not_starve_a_large_one() {
        let mut turns = Turns::default();
        let one = Limits { cluster: 1, node: 0 };
        let mut left: Vec<Waiting> =
            (0..5).map(|n| job(&format!("large{n}"), Kind::Backup, "large", n, "n")).collect();
        let mut rounds = 0;
        // In each round two small ones come, and one job is assigned.
        while left.iter().any(|job| job.group == "large") {
            for n in 0..2 {
                let name = format!("small{rounds}-{n}");
                left.push(job(&name, Kind::Backup, &name, 100 + rounds, "n"));
            }
            let alive = left.iter().map(|job| (job.kind, job.group.clone())).collect();
            turns.retain(&alive);
            let plan = plan(&left, &[], &nodes(&[("n", 9)]), one, &mut turns);
            left.retain(|job| !plan.assign.contains(&job.id));
            rounds += 1;
            assert!(rounds < 200, "{left:?}");
        }
    }

    fn jobs() -> impl Strategy<Value = Vec<Waiting>> {
        let one = (any::<bool>(), 0..4_u8, 0..20_i64, 0..4_u8);
        prop::collection::vec(one, 0..40).prop_map(|all| {
            let made = |(at, (restore, group, created, node))| {
                let kind = if restore { Kind::Restore } else { Kind::Backup };
                job(&format!("j{at}"), kind, &format!("g{group}"), created, &format!("n{node}"))
            };
            all.into_iter().enumerate().map(made).collect()
        })
    }

    fn agents() -> impl Strategy<Value = BTreeMap<String, u32>> {
        prop::collection::btree_map((0..4_u8).prop_map(|node| format!("n{node}")), 1..4_u32, 0..4)
    }

    fn runs() -> impl Strategy<Value = Vec<Running>> {
        let one = (0..4_u8, any::<bool>());
        prop::collection::vec(one, 0..6).prop_map(|all| {
            let made = |(node, volume)| Running { node: format!("n{node}"), volume };
            all.into_iter().map(made).collect()
        })
    }

    proptest! {
        #[test]
        fn limits_hold_and_no_slot_idles(
            waiting in jobs(), running in runs(), capacity in agents(),
            cluster in 1..8_u32, node in 0..3_u32,
        ) {
            let limits = Limits { cluster, node };
            let plan = plan(&waiting, &running, &capacity, limits, &mut Turns::default());
            let by_id: BTreeMap<_, _> = waiting.iter().map(|job| (&job.id, job)).collect();
            prop_assert_eq!(plan.assign.len() + plan.wait.len(), waiting.len());
            let count = |on: Option<&str>, volumes_only: bool| {
                let is_on = |node: &str| on.is_none_or(|on| on == node);
                let old = running.iter().filter(|job| is_on(&job.node) && (job.volume || !volumes_only));
                let new = plan.assign.iter().filter(|id| is_on(&by_id[id].node));
                (old.count() as u32, new.count() as u32)
            };
            let (old, new) = count(None, true);
            prop_assert!(new == 0 || old + new <= cluster);
            for (name, capacity) in &capacity {
                let (old, new) = count(Some(name), false);
                prop_assert!(new == 0 || old + new <= *capacity);
                let (old, new) = count(Some(name), true);
                prop_assert!(new == 0 || node == 0 || old + new <= node);
            }
            for (id, why) in &plan.wait {
                let on = &by_id[id].node;
                let (old, new) = count(None, true);
                let (volumes, more) = count(Some(on), true);
                let (jobs, _) = count(Some(on), false);
                let holds = match why {
                    Why::NoAgent => !capacity.contains_key(on),
                    Why::Cluster => old + new >= cluster,
                    Why::Node => node > 0 && volumes + more >= node,
                    Why::Agent => jobs + more >= capacity[on],
                };
                prop_assert!(holds, "{} waits, though {:?} does not hold", id, why);
            }
        }

        #[test]
        fn every_group_gets_its_turn(waiting in jobs(), capacity in agents(), cluster in 1..4_u32) {
            // One step: what was assigned ends, and another job of the busiest group appears for it.
            let limits = Limits { cluster, node: 0 };
            let backups = |job: &&Waiting| {
                job.kind == Kind::Backup && capacity.contains_key(&job.node)
            };
            let mut left: Vec<Waiting> = waiting.iter().filter(backups).cloned().collect();
            let mut missing: BTreeSet<String> = left.iter().map(|job| job.id.clone()).collect();
            let mut turns = Turns::default();
            for round in 0..400 {
                left.push(job(&format!("z{round}"), Kind::Backup, "zzz", 99, "n0"));
                let plan = plan(&left, &[], &capacity, limits, &mut turns);
                left.retain(|job| !plan.assign.contains(&job.id));
                missing.retain(|id| !plan.assign.contains(id));
            }
            prop_assert!(missing.is_empty(), "{:?} starve", missing);
        }
    }
}
