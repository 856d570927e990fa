//! Which authorities there should be: a pure decision over those that there are and the time.
//!
//! An authority signs for a year. When a third of that is left, the `next` one is made and published, but signs only
//! after agents had a day to learn of it; the one before stays published as `previous` until it expires, for agents
//! that still meet certificates of its.
//!
//! ```text
//!            0 ......................... 2/3 ...... + 1 day ............... 1 year
//! first      signs and is published ...............| is published (previous) |
//! second                                  published | signs and is published ...
//! ```

use jiff::{SignedDuration, Timestamp};

/// How long an authority is valid.
const VALID: SignedDuration = SignedDuration::from_hours(365 * 24);

/// Its successor is made when only so much of that is left.
const SUCCEED: SignedDuration = SignedDuration::from_hours(365 * 24 / 3);

/// How long a successor is published before it signs. Nodes see a changed ConfigMap within minutes; a day covers
/// nodes that were away for a while.
const LEAD: SignedDuration = SignedDuration::from_hours(24);

/// Certificates are valid from a little before they are made, for clocks that are late.
pub(super) const BACKDATED: SignedDuration = SignedDuration::from_hours(1);

/// How long a server's certificate is valid.
const SERVER_VALID: SignedDuration = SignedDuration::from_hours(7 * 24);

/// A new one is made when only so much of that is left.
const SERVER_RENEW: SignedDuration = SignedDuration::from_hours(7 * 24 / 3);

/// From when until when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Validity {
    pub(super) from: Timestamp,
    pub(super) until: Timestamp,
}

impl Validity {
    /// That of an authority made now.
    pub(super) fn of_authority(now: Timestamp) -> Self {
        Self { from: before(now, BACKDATED), until: after(now, VALID) }
    }

    /// That of a server's certificate made now; an authority's own end is the end of what it signed.
    pub(super) fn of_server(now: Timestamp, authority: Self) -> Self {
        let until = after(now, SERVER_VALID).min(authority.until);
        Self { from: before(now, BACKDATED), until }
    }

    fn contains(self, now: Timestamp) -> bool {
        self.from <= now && now < self.until
    }

    fn is_over(self, now: Timestamp) -> bool {
        self.until <= now
    }

    fn made(self) -> Timestamp {
        after(self.from, BACKDATED)
    }
}

/// Whether a server's certificate must be made anew.
pub(super) fn must_renew_server(certificate: Validity, now: Timestamp) -> bool {
    !certificate.contains(now) || after(now, SERVER_RENEW) >= certificate.until
}

/// The authorities in their roles. `A` is an authority, or, for the decision, its validity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Roles<A> {
    /// Signs.
    pub(super) current: Option<A>,
    /// Is published, and will sign.
    pub(super) next: Option<A>,
    /// Signed; is published until it expires.
    pub(super) previous: Option<A>,
    /// Whether agents can know the next one: it was found published.
    pub(super) next_is_published: bool,
}

/// One change of the roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nobody can sign: make an authority that does at once. Agents find it with their next look at the bundle.
    MakeCurrent,
    /// Make the next one.
    MakeNext,
    /// The next one becomes the current one, and that the previous one.
    Promote,
    /// Forget the next one: its time never comes, or the clock that it was made by was wrong.
    DropNext,
    /// Forget the previous one.
    DropPrevious,
}

impl Roles<Validity> {
    /// What to do first; nothing when all is as it should be.
    pub(super) fn step(&self, now: Timestamp) -> Option<Step> {
        let usable = |validity: &Option<Validity>| validity.is_some_and(|it| it.contains(now));
        if self.previous.is_some() && !usable(&self.previous) {
            return Some(Step::DropPrevious);
        }
        if self.next.is_some() && !usable(&self.next) {
            return Some(Step::DropNext);
        }
        let Some(current) = self.current.filter(|current| current.contains(now)) else {
            // Without one that signs there is nothing to wait for.
            return Some(if self.next.is_some() { Step::Promote } else { Step::MakeCurrent });
        };
        match self.next {
            Some(next) if self.next_is_published && after(next.made(), LEAD) <= now => {
                Some(Step::Promote)
            }
            Some(_) => None,
            None => (after(now, SUCCEED) >= current.until).then_some(Step::MakeNext),
        }
    }
}

/// Nobody has a role. Not derived, for an authority has no default.
impl<A> Default for Roles<A> {
    fn default() -> Self {
        Self { current: None, next: None, previous: None, next_is_published: false }
    }
}

impl<A> Roles<A> {
    /// The roles after a step; `make` is called when it needs a new authority.
    pub(super) fn after<E>(
        mut self,
        step: Step,
        now: Timestamp,
        validity: impl Fn(&A) -> Validity,
        make: impl FnOnce() -> Result<A, E>,
    ) -> Result<Self, E> {
        match step {
            Step::MakeCurrent => self.current = Some(make()?),
            Step::MakeNext => {
                self.next = Some(make()?);
                self.next_is_published = false;
            }
            Step::Promote => {
                let old = std::mem::replace(&mut self.current, self.next.take());
                self.previous = old.filter(|old| !validity(old).is_over(now));
                self.next_is_published = false;
            }
            Step::DropNext => self.next = None,
            Step::DropPrevious => self.previous = None,
        }
        Ok(self)
    }

    /// All that agents should trust, the one that signs first.
    pub(super) fn published(&self) -> impl Iterator<Item = &A> {
        [&self.current, &self.next, &self.previous].into_iter().flatten()
    }
}

/// Saturates: no clock makes it fail.
fn after(time: Timestamp, duration: SignedDuration) -> Timestamp {
    time.saturating_add(duration).unwrap_or(Timestamp::MAX)
}

fn before(time: Timestamp, duration: SignedDuration) -> Timestamp {
    time.saturating_sub(duration).unwrap_or(Timestamp::MIN)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    const DAY: SignedDuration = SignedDuration::from_hours(24);

    fn at(day: i32) -> Timestamp {
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        start + DAY * day
    }

    fn made(day: i32) -> Option<Validity> {
        Some(Validity::of_authority(at(day)))
    }

    /// What the executor does: steps until nothing is left. Everything is published afterwards.
    fn settle(mut roles: Roles<Validity>, now: Timestamp) -> (Roles<Validity>, Vec<Step>) {
        let mut steps = Vec::new();
        while let Some(step) = roles.step(now) {
            steps.push(step);
            assert!(steps.len() < 8, "it comes to rest: {steps:?}");
            let make = || Ok::<_, Infallible>(Validity::of_authority(now));
            roles = roles.after(step, now, |validity| *validity, make).unwrap();
        }
        roles.next_is_published = roles.next.is_some();
        (roles, steps)
    }

    #[test]
    fn every_situation_has_its_step() {
        use Step::{DropNext, DropPrevious, MakeCurrent, MakeNext, Promote};
        let none = None;
        let table = [
            ("nothing is there", none, none, none, 0, Some(MakeCurrent)),
            ("fresh", made(0), none, none, 0, None),
            ("two thirds are not over", made(0), none, none, 243, None),
            ("two thirds are over", made(0), none, none, 244, Some(MakeNext)),
            ("the next is too new to sign", made(0), made(244), none, 244, None),
            ("the next is known", made(0), made(244), none, 245, Some(Promote)),
            ("the current is over", made(0), none, none, 365, Some(MakeCurrent)),
            ("the current is over, a next is there", made(0), made(364), none, 365, Some(Promote)),
            ("a lost current", none, made(364), none, 364, Some(Promote)),
            ("the previous is valid", made(245), none, made(0), 300, None),
            ("the previous is over", made(245), none, made(0), 365, Some(DropPrevious)),
            ("all are over", made(0), made(1), none, 999, Some(DropNext)),
            (
                "the clock went back before the current",
                made(100),
                none,
                none,
                50,
                Some(MakeCurrent),
            ),
            ("the clock went back before the next", made(0), made(300), none, 250, Some(DropNext)),
            (
                "the clock went back before the previous",
                made(0),
                none,
                made(9),
                1,
                Some(DropPrevious),
            ),
        ];
        for (name, current, next, previous, day, step) in table {
            let roles = Roles { current, next, previous, next_is_published: true };
            assert_eq!(roles.step(at(day)), step, "{name}");
        }
    }

    #[test]
    fn one_that_was_not_found_published_does_not_sign_while_another_can() {
        let roles = Roles { current: made(0), next: made(244), ..Default::default() };
        assert_eq!(roles.step(at(300)), None);
        assert_eq!(roles.step(at(365)), Some(Step::Promote), "nobody else can");
    }

    #[test]
    fn over_ten_years_agents_always_knew_the_signer_for_a_day_and_trust_is_never_long() {
        let (mut roles, _) = settle(Roles::default(), at(0));
        let mut known = vec![(roles.current.unwrap(), at(0))];
        let mut signers = 1;
        // Twice a day, as somebody who is restarted often would look.
        for half in 1..(10 * 365 * 2) {
            let now = at(0) + SignedDuration::from_hours(12) * half;
            let signer = roles.current;
            (roles, _) = settle(roles, now);
            let current = roles.current.unwrap();
            assert!(current.contains(now));
            for authority in roles.published() {
                assert!(authority.contains(now), "nothing dead is published");
                if known.iter().all(|(known, _)| known != authority) {
                    known.push((*authority, now));
                }
            }
            if signer != Some(current) {
                signers += 1;
                let since = known.iter().find(|(known, _)| *known == current).unwrap().1;
                assert!(since + LEAD <= now, "published for a day before it signs");
                assert_eq!(roles.previous, signer, "and the one before is kept");
            }
        }
        // One every 243.5 days, two thirds of a year when looked at twice a day, in ten years.
        assert_eq!(signers, 15);
    }

    #[test]
    fn after_any_jump_of_the_clock_there_is_one_that_signs() {
        let jumps = [0, 900, 3, 243, 5, 250, 20_000, 251, 251, -3000, 100, 344, 345];
        let mut roles = Roles::default();
        for day in jumps {
            (roles, _) = settle(roles, at(day));
            assert!(roles.published().all(|authority| authority.contains(at(day))), "{day}");
            assert!(roles.current.is_some(), "{day}");
        }
    }

    #[test]
    fn clocks_at_the_ends_of_time_do_no_harm() {
        for now in [Timestamp::MIN, Timestamp::MAX] {
            let validity = Validity::of_authority(now);
            assert!(validity.from <= validity.until);
            let roles = Roles { current: made(0), next: made(1), ..Default::default() };
            assert_eq!(roles.step(now), Some(Step::DropNext));
        }
    }

    #[test]
    fn a_servers_certificate_is_renewed_in_time_and_never_outlives_its_authority() {
        let authority = Validity::of_authority(at(0));
        let certificate = Validity::of_server(at(10), authority);
        assert_eq!(certificate.until, at(17));
        let table = [(10, false), (14, false), (15, true), (17, true), (30, true), (9, true)];
        for (day, renew) in table {
            assert_eq!(must_renew_server(certificate, at(day)), renew, "{day}");
        }
        assert_eq!(Validity::of_server(at(362), authority).until, at(365));
    }
}
