//! Everything the desk does, told to a post that remembers.

use proto::v1::Repository;
use proto::v1::finished::Outcome;

use super::*;

const UNCOUNTED: Duration = Duration::from_secs(60);

/// A UID as the cluster makes them, from a short name.
fn uid(name: &str) -> String {
    let name: String = name.bytes().map(|byte| format!("{byte:02x}")).collect();
    let digits = format!("{name:0<32}");
    let part = |from: usize, to: usize| digits.get(from..to).unwrap().to_owned();
    [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-")
}

fn of_repository(name: &str) -> String {
    format!("{}-prune-1", uid(name))
}

#[derive(Default)]
struct Double {
    /// Nodes whose agents take nothing.
    deaf: BTreeSet<String>,
    sent: Vec<(String, Message)>,
    told: Vec<Notice>,
}

impl Post for Double {
    fn send(&mut self, node: &str, message: Message) -> bool {
        self.sent.push((node.to_owned(), message));
        !self.deaf.contains(node)
    }

    fn tell(&mut self, _: Owner, notice: Notice) {
        self.told.push(notice);
    }

    fn probed(&mut self, _: String, _: ProbeResult) {}
}

/// A ledger, and what it said since it was last asked.
struct Desk {
    ledger: Ledger,
    post: Double,
    begun: Instant,
    now: Instant,
}

impl Desk {
    fn new(cluster: u32) -> Self {
        let now = Instant::now();
        let limits = Limits { cluster, node: 0 };
        let ledger = Ledger::new(limits, UNCOUNTED, now);
        let mut desk = Self { ledger, post: Double::default(), begun: now, now };
        desk.ask(Request::Open(Owner::Volumes));
        desk.ask(Request::Open(Owner::Repositories));
        desk
    }

    fn at(&mut self, second: u64) {
        self.now = self.begun + Duration::from_secs(second);
        self.settle();
    }

    fn ask(&mut self, request: Request) {
        self.ledger.ask(request, &mut self.post, self.now);
        self.settle();
    }

    fn hear(&mut self, event: Event) {
        self.ledger.hear(event, &mut self.post, self.now);
        self.settle();
    }

    fn settle(&mut self) {
        self.ledger.settle(&mut self.post, self.now);
    }

    fn join(&mut self, node: &str, capacity: u32, running: &[&str], finished: Vec<Finished>) {
        let agent = Agent {
            node: node.to_owned(),
            stream: 1,
            version: String::new(),
            capabilities: Vec::new(),
            capacity,
            memory_bytes: 0,
            running: running.iter().map(|job| (*job).to_owned()).collect(),
        };
        self.hear(Event::Connected { agent, finished });
    }

    fn lose(&mut self, node: &str) {
        self.hear(Event::Lost { node: node.to_owned() });
    }

    fn enter(&mut self, name: &str, node: &str) {
        self.ask(Request::Enter(volume(name, node, Kind::Backup)));
    }

    fn give(&mut self, name: &str, key: &str) {
        let repository = Repository { credentials: Some(credentials(key)), ..Default::default() };
        let job = Job { id: uid(name), repository: Some(repository), ..Default::default() };
        self.ask(Request::Give(Box::new(job)));
    }

    /// Takes a place, and the job.
    fn run(&mut self, name: &str, node: &str) {
        self.ask(Request::Place(volume(name, node, Kind::Backup), node.to_owned()));
        self.give(name, "key");
    }

    fn told(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.post.told)
    }

    fn sent(&mut self) -> Vec<(String, Message)> {
        std::mem::take(&mut self.post.sent)
    }

    /// Who got places where, since it was last asked.
    fn granted(&mut self) -> Vec<(String, String)> {
        let place = |notice| match notice {
            Notice::Granted { job, node } => Some((job, node)),
            _ => None,
        };
        self.told().into_iter().filter_map(place).collect()
    }

    /// The keys that agents were told, since it was last asked.
    fn renewed(&mut self) -> Vec<(String, String)> {
        let key = |(node, message)| match message {
            Message::Renew(renew) => Some((node, renew.credentials?.access_key)),
            _ => None,
        };
        self.sent().into_iter().filter_map(key).collect()
    }

    fn exchange(&mut self, key: Option<&str>) {
        let keys = key.map(|key| ("l".to_owned(), credentials(key)));
        self.ledger.exchange(keys.into_iter().collect(), &mut self.post);
    }
}

fn credentials(key: &str) -> Credentials {
    Credentials { access_key: key.to_owned(), ..Default::default() }
}

fn volume(name: &str, node: &str, kind: Kind) -> Ticket {
    let need = Need::Slot { node: node.to_owned(), kind, group: "backup".to_owned(), created: 0 };
    Ticket { job: uid(name), location: "l".to_owned(), need }
}

fn room(job: &str, avoid: &[&str], first: bool) -> Ticket {
    let avoid = avoid.iter().map(|node| (*node).to_owned()).collect();
    Ticket { job: job.to_owned(), location: "l".to_owned(), need: Need::Room { avoid, first } }
}

fn finished(job: &str) -> Finished {
    let outcome = Some(Outcome::Saved(proto::v1::Saved::default()));
    Finished { job_id: job.to_owned(), outcome, ..Default::default() }
}

fn says_finished(node: &str, job: &str) -> Event {
    Event::Finished { node: node.to_owned(), finished: finished(job) }
}

fn recorded(node: &str, job: &str) -> (String, Message) {
    (node.to_owned(), Message::Recorded(Recorded { job_id: job.to_owned() }))
}

fn cancelled(node: &str, job: &str) -> (String, Message) {
    (node.to_owned(), Message::Cancel(Cancel { job_id: job.to_owned() }))
}

#[test]
fn the_id_of_a_job_tells_whose_it_is() {
    assert_eq!(Owner::of(&uid("a")), Owner::Volumes);
    assert_eq!(Owner::of(&of_repository("a")), Owner::Repositories);
    assert_eq!(Owner::of("a-job-of-nobody"), Owner::Volumes);
    assert_eq!(Owner::of(""), Owner::Volumes);
}

#[test]
fn a_slot_is_taken_from_its_grant_until_its_outcome_is_recorded() {
    let mut desk = Desk::new(1);
    desk.join("n", 9, &[], Vec::new());
    desk.enter("a", "n");
    assert_eq!(desk.granted(), [(uid("a"), "n".to_owned())]);
    desk.enter("b", "n");
    let waits = Notice::Waits { job: uid("b"), why: Why::Cluster };
    assert_eq!(desk.told(), std::slice::from_ref(&waits));
    desk.ask(Request::Place(volume("a", "n", Kind::Backup), "n".to_owned()));
    assert_eq!(desk.told(), [Notice::Agent { job: uid("a"), has: Has::No }]);
    desk.give("a", "key");
    assert_eq!(desk.told(), [Notice::Agent { job: uid("a"), has: Has::Yes }]);
    assert!(matches!(&*desk.sent(), [(node, Message::Assign(_))] if node == "n"));
    desk.hear(says_finished("n", &uid("a")));
    assert!(matches!(&*desk.told(), [Notice::Finished { .. }]), "and nobody is granted");
    desk.ask(Request::Record { node: "n".to_owned(), job: uid("a") });
    assert_eq!(desk.sent(), [recorded("n", &uid("a"))]);
    assert_eq!(desk.granted(), [(uid("b"), "n".to_owned())]);
}

#[test]
fn a_place_that_is_not_wanted_goes_to_the_next_and_the_agent_is_told() {
    let mut desk = Desk::new(1);
    desk.join("n", 9, &[], Vec::new());
    desk.enter("a", "n");
    desk.enter("b", "n");
    desk.told();
    desk.ask(Request::Withdraw(uid("a")));
    assert_eq!(desk.granted(), [(uid("b"), "n".to_owned())]);
    assert!(desk.sent().is_empty(), "the agent never heard of it");
    desk.give("b", "key");
    desk.sent();
    desk.ask(Request::Withdraw(uid("b")));
    assert_eq!(desk.sent(), [cancelled("n", &uid("b"))]);
    // One that has ended is not ended once more.
    desk.run("c", "n");
    desk.hear(says_finished("n", &uid("c")));
    desk.sent();
    desk.ask(Request::Withdraw(uid("c")));
    assert_eq!(desk.sent(), [recorded("n", &uid("c"))]);
}

#[test]
fn who_connects_is_sent_what_it_lacks_and_told_to_end_what_nobody_wants() {
    let mut desk = Desk::new(9);
    for name in ["has", "ended", "lacks"] {
        desk.ask(Request::Place(volume(name, "n", Kind::Backup), "n".to_owned()));
    }
    let away = Has::Unknown { since: desk.begun };
    let unknown = |name: &str| Notice::Agent { job: uid(name), has: away };
    assert_eq!(desk.told(), ["has", "ended", "lacks"].map(unknown));
    let (has, stray, prune) = (uid("has"), uid("stray"), of_repository("r"));
    desk.join("n", 9, &[&has, &stray, &prune], vec![finished(&uid("ended"))]);
    let told = desk.told();
    for (name, has) in [("has", Has::Yes), ("ended", Has::Yes), ("lacks", Has::No)] {
        assert!(told.contains(&Notice::Agent { job: uid(name), has }), "{name}: {told:?}");
    }
    assert!(told.contains(&Notice::Stray { job: prune, node: "n".to_owned() }), "{told:?}");
    let ended =
        Notice::Finished { node: "n".to_owned(), finished: Box::new(finished(&uid("ended"))) };
    assert!(told.contains(&ended), "{told:?}");
    assert_eq!(desk.sent(), [cancelled("n", &stray)]);
}

#[test]
fn agents_are_not_heard_before_all_jobs_are_known() {
    let now = Instant::now();
    let mut ledger = Ledger::new(Limits { cluster: 1, node: 0 }, UNCOUNTED, now);
    let mut post = Double::default();
    assert!(!ledger.is_open());
    ledger.ask(Request::Open(Owner::Volumes), &mut post, now);
    assert!(!ledger.is_open());
    ledger.ask(Request::Open(Owner::Repositories), &mut post, now);
    assert!(ledger.is_open());
}

#[test]
fn what_is_accepted_while_its_agent_is_connected_is_known_to_be_lacking_or_there() {
    let mut desk = Desk::new(9);
    let has = uid("has");
    desk.join("n", 9, &[&has], Vec::new());
    assert_eq!(desk.sent(), [cancelled("n", &has)], "nobody wants it yet");
    for (name, has) in [("lacks", Has::No), ("has", Has::Yes)] {
        desk.ask(Request::Place(volume(name, "n", Kind::Backup), "n".to_owned()));
        assert_eq!(desk.told(), [Notice::Agent { job: uid(name), has }]);
    }
}

#[test]
fn jobs_of_a_lost_agent_hold_their_slots_for_a_minute() {
    let mut desk = Desk::new(1);
    desk.join("gone", 9, &[], Vec::new());
    desk.join("n", 9, &[], Vec::new());
    desk.run("a", "gone");
    desk.enter("b", "n");
    desk.told();
    desk.lose("gone");
    let away = Has::Unknown { since: desk.begun };
    assert_eq!(desk.told(), [Notice::Agent { job: uid("a"), has: away }]);
    desk.at(59);
    assert!(desk.granted().is_empty());
    desk.at(60);
    assert_eq!(desk.granted(), [(uid("b"), "n".to_owned())]);
}

#[test]
fn an_outcome_from_a_wrong_node_changes_nothing() {
    let mut desk = Desk::new(9);
    desk.join("n", 9, &[], Vec::new());
    desk.join("liar", 9, &[], Vec::new());
    desk.run("a", "n");
    desk.told();
    desk.sent();
    desk.hear(says_finished("liar", &uid("a")));
    assert_eq!((desk.told(), desk.sent()), (vec![], vec![recorded("liar", &uid("a"))]));
}

#[test]
fn an_outcome_of_what_nobody_holds_goes_to_its_owner() {
    let mut desk = Desk::new(9);
    desk.join("n", 9, &[], Vec::new());
    desk.hear(says_finished("n", &uid("old")));
    let told = Notice::Finished { node: "n".to_owned(), finished: Box::new(finished(&uid("old"))) };
    assert_eq!(desk.told(), [told]);
    assert!(desk.sent().is_empty(), "only its owner has it recorded");
}

#[test]
fn a_replaced_key_reaches_running_jobs_also_when_the_old_one_was_found_bad_before() {
    let mut desk = Desk::new(9);
    desk.exchange(Some("key"));
    desk.join("n", 9, &[], Vec::new());
    desk.join("idle", 9, &[], Vec::new());
    desk.run("a", "n");
    assert!(desk.renewed().is_empty(), "the job brought it");
    // The key is revoked: the location is unavailable for a while.
    desk.exchange(None);
    desk.exchange(Some("next"));
    let next = [("n".to_owned(), "next".to_owned())];
    assert_eq!(desk.renewed(), next, "and nobody else is told");
    desk.exchange(Some("next"));
    assert!(desk.renewed().is_empty());
    // Who is back may have missed it.
    desk.lose("n");
    desk.join("n", 9, &[&uid("a")], Vec::new());
    assert_eq!(desk.renewed(), next);
    desk.give("a", "key");
    assert_eq!(desk.renewed(), next, "a job that brings an old one");
}

#[test]
fn work_on_repositories_goes_where_there_is_most_room_and_the_store_is_reached() {
    let mut desk = Desk::new(9);
    desk.join("busy", 9, &[], Vec::new());
    desk.join("cut-off", 9, &[], Vec::new());
    desk.join("full", 1, &[], Vec::new());
    desk.run("a", "busy");
    desk.run("b", "full");
    desk.told();
    desk.ask(Request::Enter(room(&of_repository("r"), &["cut-off"], true)));
    assert_eq!(desk.granted(), [(of_repository("r"), "busy".to_owned())]);
}

#[test]
fn what_volumes_wait_for_may_go_where_they_wait() {
    let mut desk = Desk::new(9);
    desk.join("n", 1, &[], Vec::new());
    // Accepted before a restart, and not given again: its repository is to be opened first.
    desk.ask(Request::Place(volume("a", "n", Kind::Backup), "n".to_owned()));
    desk.told();
    desk.ask(Request::Enter(room(&of_repository("prune"), &[], false)));
    assert!(desk.granted().is_empty(), "it would hold the volume up");
    desk.ask(Request::Enter(room(&of_repository("open"), &[], true)));
    assert_eq!(desk.granted(), [(of_repository("open"), "n".to_owned())]);
}

#[test]
fn a_prune_takes_no_agent_from_a_waiting_restore_for_an_hour() {
    let mut desk = Desk::new(1);
    desk.join("n", 9, &[], Vec::new());
    desk.join("other", 9, &[], Vec::new());
    desk.run("a", "other");
    desk.ask(Request::Enter(volume("restore", "n", Kind::Restore)));
    desk.ask(Request::Place(volume("x", "other", Kind::Backup), "other".to_owned()));
    desk.lose("other");
    desk.told();
    desk.ask(Request::Enter(room(&of_repository("r"), &[], false)));
    assert!(desk.granted().is_empty());
    // Meanwhile the restore gets its slot, and the prune has its turn beside it.
    desk.at(60);
    let both = [(uid("restore"), "n".to_owned()), (of_repository("r"), "n".to_owned())];
    assert_eq!(desk.granted(), both);
}

#[test]
fn who_takes_no_messages_has_nothing() {
    let mut desk = Desk::new(9);
    desk.join("n", 9, &[], Vec::new());
    desk.post.deaf.insert("n".to_owned());
    desk.ask(Request::Place(volume("a", "n", Kind::Backup), "n".to_owned()));
    desk.told();
    desk.give("a", "key");
    assert!(matches!(&*desk.told(), [Notice::Agent { has: Has::Unknown { .. }, .. }]));
}

#[test]
fn waiting_is_told_once() {
    let mut desk = Desk::new(9);
    desk.enter("a", "n");
    assert_eq!(desk.told(), [Notice::Waits { job: uid("a"), why: Why::NoAgent }]);
    desk.enter("b", "n");
    assert_eq!(desk.told(), [Notice::Waits { job: uid("b"), why: Why::NoAgent }]);
}
