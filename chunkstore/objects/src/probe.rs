//! Trying out what a store does, where its documentation cannot be relied on.

use std::io::IoSlice;
use std::thread;
use std::time::{Duration, SystemTime};

use crate::{Created, Error, ErrorKind, ObjectStore, Result};

/// Racing creators: enough that a store which looks first and writes then is caught.
const RACERS: u8 = 8;

/// Whether the store honours create-if-absent: two creates in turn, then a race. Sees on the way that
/// listings show what was written just before, which no store that we know of denies any more.
///
/// Objects of random names are made in `folder` and deleted, unless the user has no right to.
///
/// # Errors
/// `Invalid` when a listing lags behind; those of the store.
pub fn create_if_absent(store: &dyn ObjectStore, folder: &str) -> Result<bool> {
    let name = random_name(folder)?;
    let keys = [format!("{folder}{name}-turns"), format!("{folder}{name}-race")];
    let found = creates(store, &keys)
        .and_then(|honoured| see_listed(store, folder, &keys[0]).map(|()| honoured));
    let deleted = delete(store, &keys);
    let honoured = found?;
    deleted.map(|()| honoured)
}

/// Whether the store refuses requests whose date is an hour off: what takes the place of create-if-absent
/// where that is not honoured.
///
/// # Errors
/// Those of the store.
pub fn refuses_wrong_dates(store: &dyn ObjectStore, folder: &str) -> Result<bool> {
    const OFF: Duration = Duration::from_secs(3600);
    let keys = [format!("{folder}{}-dated", random_name(folder)?)];
    let now = store.clock();
    for date in [now.checked_sub(OFF).unwrap_or(SystemTime::UNIX_EPOCH), now + OFF] {
        match store.replace_dated(&keys[0], b"1", date) {
            Err(error) if error.kind() == ErrorKind::Expired => {}
            Err(error) => return Err(error),
            Ok(()) => return delete(store, &keys).map(|()| false),
        }
    }
    Ok(true)
}

fn random_name(folder: &str) -> Result<String> {
    let mut random = [0; 16];
    getrandom::fill(&mut random)
        .map_err(|error| Error::new(ErrorKind::Io, "probe", folder).because(error.to_string()))?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A key that can only add is a good one for backups: what it leaves goes with the next prune.
fn delete(store: &dyn ObjectStore, keys: &[String]) -> Result<()> {
    match store.delete_all(keys) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(()),
        deleted => deleted,
    }
}

/// Sees that the object, which was written just now, is listed.
fn see_listed(store: &dyn ObjectStore, folder: &str, key: &str) -> Result<()> {
    let mut seen = false;
    store.list(folder, &mut |meta| {
        seen |= meta.key == key;
        Ok(())
    })?;
    if seen {
        return Ok(());
    }
    let why = "its listings do not show at once what was written, so nobody could tell what may be \
               deleted; use a store whose listings are strongly consistent, as those of OBS and S3 are";
    Err(Error::new(ErrorKind::Invalid, "use", store.location()).because(why))
}

fn creates(store: &dyn ObjectStore, [turns, race]: &[String; 2]) -> Result<bool> {
    let create = |key: &str, body: u8| store.create(key, &[IoSlice::new(&[body])]);
    if create(turns, 1)? != Created::New || create(turns, 2)? != Created::AlreadyExists {
        return Ok(false);
    }
    if store.read(turns, 1)? != [1] {
        return Ok(false);
    }
    let outcomes = thread::scope(|scope| {
        let racers: Vec<_> =
            (0..RACERS).map(|racer| scope.spawn(move || create(race, racer))).collect();
        let died = || Error::new(ErrorKind::Io, "probe", race.as_str());
        racers
            .into_iter()
            .map(|racer| racer.join().unwrap_or_else(|_| Err(died())))
            .collect::<Result<Vec<_>>>()
    })?;
    let winner = outcomes.iter().position(|outcome| *outcome == Created::New);
    let winners = outcomes.iter().filter(|outcome| **outcome == Created::New).count();
    let stored = store.read(race, 1)?;
    Ok(winners == 1 && winner.is_some_and(|winner| stored == [winner as u8]))
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::ObjectMeta;
    use crate::testing::MemoryStore;

    /// A store that ignores the condition, always or when others create at the same time.
    struct Careless {
        inner: MemoryStore,
        only_in_races: bool,
        lists_late: bool,
        may_delete: bool,
    }

    impl Careless {
        fn new(only_in_races: bool) -> Self {
            let inner = MemoryStore::new();
            Self { inner, only_in_races, lists_late: false, may_delete: true }
        }
    }

    impl ObjectStore for Careless {
        fn create(&self, key: &str, parts: &[IoSlice<'_>]) -> Result<Created> {
            if self.only_in_races && self.inner.stat(key).is_ok() {
                return Ok(Created::AlreadyExists);
            }
            // Looks first and writes then.
            thread::sleep(Duration::from_millis(20));
            let body: Vec<u8> = parts.iter().flat_map(|part| part.to_vec()).collect();
            self.inner.replace(key, &body).map(|()| Created::New)
        }

        fn replace(&self, key: &str, body: &[u8]) -> Result<()> {
            self.inner.replace(key, body)
        }

        fn create_from(&self, key: &str, body: &mut dyn Read) -> Result<Created> {
            self.inner.create_from(key, body)
        }

        fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
            self.inner.read(key, limit)
        }

        fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
            self.inner.read_at(key, offset, buf)
        }

        fn stat(&self, key: &str) -> Result<ObjectMeta> {
            self.inner.stat(key)
        }

        fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()> {
            if self.lists_late { Ok(()) } else { self.inner.list(prefix, each) }
        }

        fn delete(&self, key: &str) -> Result<()> {
            if self.may_delete {
                return self.inner.delete(key);
            }
            Err(Error::new(ErrorKind::PermissionDenied, "delete", key))
        }

        fn remove_unfinished(&self, older_than: Duration, now: SystemTime) -> Result<u64> {
            self.inner.remove_unfinished(older_than, now)
        }

        fn location(&self) -> String {
            self.inner.location()
        }
    }

    #[test]
    fn stores_that_ignore_the_condition_are_found_out() {
        let good = MemoryStore::new();
        assert!(create_if_absent(&good, "probes/").unwrap());
        assert_eq!(good.keys(), [""; 0]);
        for only_in_races in [false, true] {
            let store = Careless::new(only_in_races);
            assert!(!create_if_absent(&store, "probes/").unwrap(), "{only_in_races}");
            assert_eq!(store.inner.keys(), [""; 0]);
        }
    }

    #[test]
    fn a_store_whose_listing_lags_behind_is_refused() {
        let store = Careless { lists_late: true, ..Careless::new(true) };
        let error = create_if_absent(&store, "probes/").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert_eq!(store.inner.keys(), [""; 0]);
    }

    #[test]
    fn a_store_that_takes_requests_of_any_date_is_found_out() {
        let good = MemoryStore::new();
        assert!(refuses_wrong_dates(&good, "probes/").unwrap());
        assert_eq!(good.keys(), [""; 0]);
        let careless = Careless::new(false);
        assert!(!refuses_wrong_dates(&careless, "probes/").unwrap());
        assert_eq!(careless.inner.keys(), [""; 0]);
    }

    #[test]
    fn a_user_who_may_not_delete_can_try_it_out() {
        let store = Careless { may_delete: false, ..Careless::new(true) };
        assert!(!create_if_absent(&store, "probes/").unwrap());
        assert_eq!(store.inner.keys().len(), 2);
    }
}
