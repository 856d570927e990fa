//! The simulated world: one store, one clock, several actors of which one runs at a time.
//!
//! Actors are threads that hand a baton on: at each call to the store, a seeded generator decides who
//! goes on, how far the clock moves, and what goes wrong. So a run follows from its seed alone.

mod client;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use objects::{DATE_TOLERANCE, ObjectMeta};

pub(crate) use client::Client;

/// Something taken out of the protocol, to see that the simulation notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sabotage {
    None,
    /// W1: a writer's announcement appears only when it uploads its first pack.
    AnnounceLate,
    /// W2: a writer does not read tombstones.
    NoTombstones,
    /// W3: a writer takes packs for present that once were.
    StaleListing,
    /// W3: a tree refers to nodes of an older one without asking.
    NoGate,
    /// W5: an upload is acknowledged before it is durable.
    EarlyReceipt,
    /// P4: a prune takes every session for decided.
    NoWait,
    /// P5: a prune judges by the snapshots it saw first.
    NoSecondMark,
    /// A writer that was silent for weeks commits all the same.
    AnySilence,
    /// Create-if-absent replaces, although the repository relies on it.
    NoRegister,
    /// C3: a writer does not look for a fence before it commits.
    NoFenceCheck,
    /// C4: the store takes requests of any date.
    AnyDate,
}

/// How long things take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tempo {
    /// By how much sleeps are longer than usual.
    pub(crate) sleep: u64,
    /// Most seconds of a pause, of which one is drawn.
    pub(crate) pauses: [u64; 4],
}

/// What may go wrong with one call, and how often: in a thousand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Faults {
    pub(crate) lost_request: u64,
    pub(crate) lost_answer: u64,
    pub(crate) late_request: u64,
    pub(crate) repeated_request: u64,
    pub(crate) pause: u64,
    pub(crate) crash: u64,
}

/// How often the interesting things happened.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Coverage {
    pub(crate) calls: u64,
    pub(crate) late_effects: u64,
    pub(crate) refused_late: u64,
    pub(crate) late_commits: u64,
    pub(crate) crashes: u64,
    pub(crate) fences: u64,
    pub(crate) pack_deletes: u64,
    pub(crate) relocations: u64,
    pub(crate) commits: u64,
    pub(crate) reused_doomed: u64,
    pub(crate) prunes_at_once: u64,
    pub(crate) reads: u64,
    pub(crate) leaves_taken_over: u64,
    pub(crate) leaves_refused: u64,
}

type Objects = BTreeMap<String, (Arc<[u8]>, SystemTime)>;

#[derive(Debug, Clone)]
enum Effect {
    Create(String, Arc<[u8]>),
    Replace(String, Arc<[u8]>, Option<SystemTime>),
    Delete(Vec<String>, Option<SystemTime>),
}

struct Actor {
    name: String,
    is_writer: bool,
    resumes: u64,
    done: bool,
    crashed: bool,
    offset: i64,
    /// Sabotage: its announcement that is held back.
    held: Option<(String, Arc<[u8]>)>,
    /// Sabotage: what a listing showed first.
    seen: Option<Vec<ObjectMeta>>,
}

struct State {
    objects: Objects,
    /// Every pack there ever was.
    ever: BTreeMap<String, ObjectMeta>,
    late: BTreeMap<(u64, u64), Effect>,
    seconds: u64,
    turn: usize,
    actors: Vec<Actor>,
    random: u64,
    trace: VecDeque<String>,
    coverage: Coverage,
    dirty: bool,
}

/// One run.
pub(crate) struct World {
    state: Mutex<State>,
    baton: Condvar,
    faults: Faults,
    sabotage: Sabotage,
    /// Whether create-if-absent means anything.
    conditional: bool,
    tempo: Tempo,
}

pub(crate) fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_735_689_600 + seconds)
}

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl State {
    fn below(&mut self, n: u64) -> u64 {
        next(&mut self.random) % n.max(1)
    }

    fn chance(&mut self, thousandth: u64) -> bool {
        self.below(1000) < thousandth
    }

    fn now(&self) -> SystemTime {
        at(self.seconds)
    }

    fn note(&mut self, actor: usize, text: String) {
        if self.trace.len() == 300 {
            self.trace.pop_front();
        }
        let name = &self.actors[actor].name;
        self.trace.push_back(format!("{:>8} {name:<8} {text}", self.seconds));
    }

    fn put(&mut self, key: &str, body: Arc<[u8]>) {
        if key.starts_with("packs/") || key.starts_with("meta/") {
            let meta =
                ObjectMeta { key: key.to_owned(), size: body.len() as u64, modified: self.now() };
            self.ever.insert(key.to_owned(), meta);
        }
        self.dirty |= key.starts_with("snapshots/");
        let now = self.now();
        self.objects.insert(key.to_owned(), (body, now));
    }

    fn is_in_time(&self, date: Option<SystemTime>, sabotage: Sabotage) -> bool {
        let Some(date) = date.filter(|_| sabotage != Sabotage::AnyDate) else {
            return true;
        };
        let now = self.now();
        let apart = now.duration_since(date).unwrap_or_else(|early| early.duration());
        apart <= DATE_TOLERANCE
    }

    fn apply(&mut self, effect: &Effect, conditional: bool, sabotage: Sabotage) -> Applied {
        match effect {
            Effect::Create(key, body) => {
                let register = key.starts_with("snapshots/") || key.starts_with("relocations/");
                let ignored = !conditional || (sabotage == Sabotage::NoRegister && register);
                if self.objects.contains_key(key) && !ignored {
                    return Applied::Exists;
                }
                self.put(key, body.clone());
            }
            Effect::Replace(key, body, date) => {
                if !self.is_in_time(*date, sabotage) {
                    return Applied::Expired;
                }
                self.put(key, body.clone());
            }
            Effect::Delete(keys, date) => {
                if !self.is_in_time(*date, sabotage) {
                    return Applied::Expired;
                }
                for key in keys {
                    let pack = key.starts_with("packs/") || key.starts_with("meta/");
                    self.coverage.pack_deletes += u64::from(pack);
                    self.dirty |= pack || key.starts_with("relocations/");
                    self.objects.remove(key);
                }
            }
        }
        Applied::Done
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Applied {
    Done,
    Exists,
    Expired,
}

impl Effect {
    fn text(&self) -> String {
        let short = |key: &str| key[..key.len().min(26)].to_owned();
        match self {
            Self::Create(key, _) => format!("create {}", short(key)),
            Self::Replace(key, _, _) => format!("replace {}", short(key)),
            Self::Delete(keys, _) => {
                let keys: Vec<_> = keys.iter().map(|key| short(key)).collect();
                format!("delete {}", keys.join(" "))
            }
        }
    }

    fn touches(&self, folder: &str) -> bool {
        match self {
            Self::Create(key, _) | Self::Replace(key, _, _) => key.starts_with(folder),
            Self::Delete(keys, _) => keys.iter().any(|key| key.starts_with(folder)),
        }
    }
}

impl World {
    pub(crate) fn new(
        seed: u64,
        faults: Faults,
        sabotage: Sabotage,
        conditional: bool,
        tempo: Tempo,
        base: &[(String, Arc<[u8]>)],
    ) -> Arc<Self> {
        let objects = base.iter().map(|(key, body)| (key.clone(), (body.clone(), at(0)))).collect();
        let state = State {
            objects,
            ever: BTreeMap::new(),
            late: BTreeMap::new(),
            seconds: 0,
            turn: usize::MAX,
            actors: Vec::new(),
            random: seed,
            trace: VecDeque::new(),
            coverage: Coverage::default(),
            dirty: false,
        };
        let (state, baton) = (Mutex::new(state), Condvar::new());
        Arc::new(Self { state, baton, faults, sabotage, conditional, tempo })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn coverage(&self) -> Coverage {
        self.state().coverage
    }

    pub(crate) fn cover(&self, count: impl FnOnce(&mut Coverage)) {
        count(&mut self.state().coverage);
    }

    pub(crate) fn trace(&self) -> String {
        self.state().trace.iter().map(|line| format!("{line}\n")).collect()
    }

    /// A new actor.
    pub(crate) fn actor(self: &Arc<Self>, name: &str, is_writer: bool) -> Arc<Client> {
        let mut state = self.state();
        // Without create-if-absent, a clock that is far off can write nothing at all.
        let most = if self.conditional { 20_000 } else { 300 };
        let offset = state.below(2 * most).cast_signed() - most.cast_signed();
        let id = state.actors.len();
        state.actors.push(Actor {
            name: name.to_owned(),
            is_writer,
            resumes: 0,
            done: false,
            crashed: false,
            offset,
            held: None,
            seen: None,
        });
        Arc::new(Client { world: self.clone(), id: Some(id) })
    }

    /// A view of the store to which nothing happens and which takes no time.
    pub(crate) fn outside(self: &Arc<Self>) -> Arc<Client> {
        Arc::new(Client { world: self.clone(), id: None })
    }

    /// Begins: the first actor gets the baton.
    pub(crate) fn begin(&self) {
        let mut state = self.state();
        self.hand_on(&mut state);
    }

    /// The actor has ended.
    pub(crate) fn end(&self, id: usize) {
        let mut state = self.state();
        state.actors[id].done = true;
        self.hand_on(&mut state);
    }

    /// Gives the baton to whoever is to go on.
    fn hand_on(&self, state: &mut State) {
        let step = state.below(8);
        state.seconds += step;
        loop {
            let now = state.seconds;
            let ready: Vec<usize> = state
                .actors
                .iter()
                .enumerate()
                .filter(|(_, actor)| !actor.done && actor.resumes <= now)
                .map(|(id, _)| id)
                .collect();
            if !ready.is_empty() {
                // To go on is the cheapest.
                let same = ready.contains(&state.turn) && state.chance(500);
                if !same {
                    let pick = state.below(ready.len() as u64) as usize;
                    state.turn = ready[pick];
                }
                break;
            }
            let waiting = state.actors.iter().filter(|actor| !actor.done);
            match waiting.map(|actor| actor.resumes).min() {
                Some(resumes) => state.seconds = resumes,
                None => {
                    state.turn = usize::MAX;
                    break;
                }
            }
        }
        self.baton.notify_all();
    }

    /// Waits until the actor has the baton.
    pub(crate) fn wait_turn(&self, id: usize) {
        let mut state = self.state();
        while state.turn != id {
            state = self.baton.wait(state).unwrap();
        }
    }

    /// Lets time pass for the actor.
    pub(crate) fn sleep(&self, id: usize, seconds: u64) {
        let mut state = self.state();
        state.actors[id].resumes = state.seconds + seconds * self.tempo.sleep;
        self.hand_on(&mut state);
        while state.turn != id {
            state = self.baton.wait(state).unwrap();
        }
    }

    /// Lets a day pass after everybody has ended, with all requests that were still under way.
    pub(crate) fn settle(&self) {
        let mut state = self.state();
        state.seconds += 86_400;
        self.arrive(&mut state);
    }

    /// Late requests take effect.
    fn arrive(&self, state: &mut State) {
        while let Some(entry) = state.late.first_entry() {
            let due = entry.key().0;
            if due > state.seconds {
                return;
            }
            let effect = entry.remove();
            // When it was due, not when somebody next looks.
            let now = std::mem::replace(&mut state.seconds, due);
            let applied = state.apply(&effect, self.conditional, self.sabotage);
            state.seconds = now;
            state.coverage.late_effects += u64::from(applied == Applied::Done);
            state.coverage.refused_late += u64::from(applied == Applied::Expired);
            state.coverage.late_commits +=
                u64::from(applied != Applied::Done && effect.touches("snapshots/"));
            let line = format!("{:>8} (late)   {} -> {applied:?}", state.seconds, effect.text());
            state.trace.push_back(line);
        }
    }

    /// Whether something happened after which snapshots may have been damaged.
    pub(crate) fn take_dirty(&self) -> bool {
        std::mem::take(&mut self.state().dirty)
    }

    /// Whether an object is there.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.state().objects.contains_key(key)
    }
}
