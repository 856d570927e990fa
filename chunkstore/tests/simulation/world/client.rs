//! How an actor sees the store: what may go wrong with a call, and what a sabotaged actor does instead.

use std::io::{IoSlice, Read};
use std::ops::Bound;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, SystemTime};

use chunkstore::record;
use objects::{Created, Error, ErrorKind, ObjectMeta, ObjectStore, Result};

use super::{Applied, Effect, Sabotage, State, World, at};

/// How an actor sees the store.
pub(crate) struct Client {
    pub(crate) world: Arc<World>,
    /// None for the outside view.
    pub(crate) id: Option<usize>,
}

impl Client {
    /// Takes part in the schedule; fails if the actor has crashed.
    fn step(&self, operation: &'static str, key: &str) -> Result<MutexGuard<'_, State>> {
        let world = &*self.world;
        let mut state = world.state();
        let Some(id) = self.id else {
            return Ok(state);
        };
        let dead = || Err(Error::new(ErrorKind::Io, operation, key).because("crashed"));
        if state.actors[id].crashed {
            return dead();
        }
        if state.chance(world.faults.pause) {
            let longest = world.tempo.pauses[state.below(4) as usize];
            let pause = state.below(longest);
            state.actors[id].resumes = state.seconds + pause;
            state.note(id, format!("pauses for {pause} s"));
        }
        world.hand_on(&mut state);
        while state.turn != id {
            state = world.baton.wait(state).unwrap();
        }
        world.arrive(&mut state);
        state.coverage.calls += 1;
        if state.chance(world.faults.crash) {
            state.actors[id].crashed = true;
            state.coverage.crashes += 1;
            state.note(id, format!("crashes at {operation} {key}"));
            // A last request may still be under way; see `change`.
        }
        Ok(state)
    }

    fn change(&self, operation: &'static str, key: &str, effect: Effect) -> Result<Applied> {
        let world = &*self.world;
        let mut state = self.step(operation, key)?;
        let Some(id) = self.id else {
            return Ok(state.apply(&effect, world.conditional, Sabotage::None));
        };
        let lost = || Error::new(ErrorKind::Unavailable, operation, key).because("injected");
        let faults = world.faults;
        let later = |state: &mut State, most: u64| {
            let due = state.seconds + 1 + state.below(most);
            let number = state.below(u64::MAX);
            state.late.insert((due, number), effect.clone());
        };
        if state.actors[id].crashed {
            match state.below(3) {
                0 => {}
                1 => later(&mut state, 72_000),
                _ => drop(state.apply(&effect, world.conditional, world.sabotage)),
            }
            return Err(lost());
        }
        if let Some(applied) = self.sabotaged(&mut state, id, &effect) {
            return Ok(applied);
        }
        if state.chance(faults.lost_request) {
            state.note(id, format!("{} is lost", effect.text()));
            return Err(lost());
        }
        if state.chance(faults.late_request) {
            state.note(id, format!("{} is held up", effect.text()));
            later(&mut state, 72_000);
            return Err(lost());
        }
        let applied = state.apply(&effect, world.conditional, world.sabotage);
        state.note(id, format!("{} -> {applied:?}", effect.text()));
        if state.chance(faults.repeated_request) {
            later(&mut state, 40_000);
        }
        if state.chance(faults.lost_answer) {
            state.note(id, "but its answer is lost".to_owned());
            return Err(lost());
        }
        Ok(applied)
    }

    /// What a sabotaged client does instead.
    fn sabotaged(&self, state: &mut State, id: usize, effect: &Effect) -> Option<Applied> {
        let Effect::Create(key, body) = effect else {
            return None;
        };
        if !state.actors[id].is_writer {
            if key.starts_with("sessions/") {
                state.actors[id].seen = None;
            }
            return None;
        }
        match self.world.sabotage {
            Sabotage::AnnounceLate if key.starts_with("sessions/") => {
                state.actors[id].held = Some((key.clone(), body.clone()));
                Some(Applied::Done)
            }
            Sabotage::AnnounceLate if key.starts_with("packs/") || key.starts_with("meta/") => {
                if let Some((key, body)) = state.actors[id].held.take() {
                    state.put(&key, body);
                }
                None
            }
            Sabotage::EarlyReceipt if key.starts_with("packs/") && state.chance(300) => {
                // Acknowledged, and then the server dies.
                Some(Applied::Done)
            }
            _ => None,
        }
    }

    fn body(&self, operation: &'static str, key: &str) -> Result<(Arc<[u8]>, SystemTime)> {
        let state = self.step(operation, key)?;
        let held = self.id.and_then(|id| state.actors[id].held.as_ref());
        if let Some((name, body)) = held
            && name == key
        {
            return Ok((body.clone(), state.now()));
        }
        let writer = self.id.is_some_and(|id| state.actors[id].is_writer);
        let blind = self.world.sabotage == Sabotage::NoFenceCheck && writer;
        let found = state.objects.get(key).filter(|_| !(blind && key.starts_with("fences/")));
        let missing = || Error::new(ErrorKind::NotFound, operation, key);
        found.cloned().ok_or_else(missing)
    }

    /// What a sabotaged client takes an object for without looking.
    fn imagined(&self, key: &str) -> Option<ObjectMeta> {
        let state = self.world.state();
        let writer = state.actors[self.id?].is_writer;
        let there = match self.world.sabotage {
            Sabotage::NoWait => !writer && key.starts_with(record::SNAPSHOTS),
            Sabotage::AnySilence => writer && key.starts_with(record::SESSIONS),
            _ => false,
        };
        there.then(|| ObjectMeta { key: key.to_owned(), size: 0, modified: at(0) })
    }
}

impl ObjectStore for Client {
    fn create(&self, key: &str, parts: &[IoSlice<'_>]) -> Result<Created> {
        let body: Arc<[u8]> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        match self.change("create", key, Effect::Create(key.to_owned(), body))? {
            Applied::Exists => Ok(Created::AlreadyExists),
            _ => Ok(Created::New),
        }
    }

    fn replace(&self, key: &str, body: &[u8]) -> Result<()> {
        self.change("replace", key, Effect::Replace(key.to_owned(), body.into(), None)).map(|_| ())
    }

    fn create_from(&self, key: &str, body: &mut dyn Read) -> Result<Created> {
        let mut bytes = Vec::new();
        body.read_to_end(&mut bytes).map_err(|error| Error::from_io("create", key, error))?;
        self.create(key, &[IoSlice::new(&bytes)])
    }

    fn replace_dated(&self, key: &str, body: &[u8], date: SystemTime) -> Result<()> {
        // With create-if-absent nothing relies on dates, and clocks may be wrong.
        let date = Some(date).filter(|_| !self.world.conditional);
        match self.change("replace", key, Effect::Replace(key.to_owned(), body.into(), date))? {
            Applied::Expired => Err(Error::new(ErrorKind::Expired, "replace", key)),
            _ => Ok(()),
        }
    }

    fn delete_dated(&self, keys: &[String], date: SystemTime) -> Result<()> {
        let Some(first) = keys.first() else {
            return Ok(());
        };
        let date = Some(date).filter(|_| !self.world.conditional);
        match self.change("delete", first, Effect::Delete(keys.to_vec(), date))? {
            Applied::Expired => Err(Error::new(ErrorKind::Expired, "delete", first)),
            _ => Ok(()),
        }
    }

    fn clock(&self) -> SystemTime {
        let state = self.world.state();
        let offset = self.id.map_or(0, |id| state.actors[id].offset);
        at(state.seconds.saturating_add_signed(offset))
    }

    fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        let (body, _) = self.body("read", key)?;
        if body.len() as u64 > limit {
            return Err(Error::new(ErrorKind::TooLarge, "read", key));
        }
        Ok(body.to_vec())
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (body, _) = self.body("read", key)?;
        let from = offset as usize;
        let bytes = body.get(from..from + buf.len());
        let bytes = bytes.ok_or_else(|| Error::new(ErrorKind::Truncated, "read", key))?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn stat(&self, key: &str) -> Result<ObjectMeta> {
        if let Some(imagined) = self.imagined(key) {
            return Ok(imagined);
        }
        let (body, modified) = self.body("stat", key)?;
        Ok(ObjectMeta { key: key.to_owned(), size: body.len() as u64, modified })
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()> {
        let sabotage = self.world.sabotage;
        // One page: strongly consistent as a whole.
        let metas: Vec<ObjectMeta> = {
            let mut state = self.step("list", prefix)?;
            let range = (Bound::Included(prefix.to_owned()), Bound::Unbounded);
            let here = state
                .objects
                .range::<String, _>(range)
                .take_while(|(key, _)| key.starts_with(prefix));
            let mut metas: Vec<ObjectMeta> = here
                .map(|(key, (body, modified))| {
                    let size = body.len() as u64;
                    ObjectMeta { key: key.clone(), size, modified: *modified }
                })
                .collect();
            if let Some(id) = self.id {
                let is_writer = state.actors[id].is_writer;
                let packs = prefix == "packs/" || prefix == "meta/";
                if sabotage == Sabotage::StaleListing && is_writer && packs {
                    let ever = state.ever.values().filter(|meta| meta.key.starts_with(prefix));
                    metas = ever.cloned().collect();
                }
                if sabotage == Sabotage::NoTombstones && is_writer && prefix == record::TOMBSTONES {
                    metas.clear();
                }
                if sabotage == Sabotage::NoSecondMark && !is_writer && prefix == "snapshots/" {
                    let seen = state.actors[id].seen.get_or_insert(metas);
                    metas = seen.clone();
                }
            }
            metas
        };
        metas.into_iter().try_for_each(each)
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.change("delete", key, Effect::Delete(vec![key.to_owned()], None)).map(|_| ())
    }

    fn remove_unfinished(&self, _: Duration, _: SystemTime) -> Result<u64> {
        Ok(0)
    }

    fn location(&self) -> String {
        "the simulated store".to_owned()
    }
}
