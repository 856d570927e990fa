//! Which kinds.

use std::collections::BTreeSet;

use super::Invalid;

/// A kind that the API server serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kind {
    /// Its group; empty for the core.
    pub group: String,
    /// Its name in paths, as `deployments`.
    pub plural: String,
    /// As `deployment`.
    pub singular: String,
    /// As `Deployment`.
    pub kind: String,
    /// As `deploy`.
    pub short_names: Vec<String>,
    /// Whether its objects lie in namespaces.
    pub namespaced: bool,
}

impl Kind {
    /// Its full name, as `deployments.apps`; of the core, as `pods`.
    pub fn resource(&self) -> String {
        if self.group.is_empty() {
            self.plural.clone()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }

    fn is_namespaces(&self) -> bool {
        self.group.is_empty() && self.plural == "namespaces"
    }

    fn is_called(&self, name: &str) -> bool {
        self.plural == name
            || self.singular == name
            || self.kind.eq_ignore_ascii_case(name)
            || self.short_names.iter().any(|short| short == name)
    }

    /// Whether both are doors to the same objects.
    pub fn is_same_objects(&self, other: &Self) -> bool {
        self == other
            || SHARED.iter().any(|(plural, groups)| {
                let has = |kind: &Self| kind.plural == *plural && groups.contains(&&*kind.group);
                has(self) && has(other)
            })
    }
}

/// Objects that several groups serve, in one cluster or another: by their newest group first.
const SHARED: [(&str, &[&str]); 7] = [
    ("daemonsets", &["apps", "extensions"]),
    ("deployments", &["apps", "extensions"]),
    ("replicasets", &["apps", "extensions"]),
    ("ingresses", &["networking.k8s.io", "extensions"]),
    ("networkpolicies", &["networking.k8s.io", "extensions"]),
    ("podsecuritypolicies", &["policy", "extensions"]),
    ("events", &["", "events.k8s.io"]),
];

/// The lists of a spec. The first three cannot be used together with the others.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lists<'a> {
    /// `includedResources`
    pub included: &'a [String],
    /// `excludedResources`
    pub excluded: &'a [String],
    /// `includeClusterResources`
    pub include_cluster: Option<bool>,
    /// `includedClusterScopedResources`
    pub included_cluster: &'a [String],
    /// `excludedClusterScopedResources`
    pub excluded_cluster: &'a [String],
    /// `includedNamespaceScopedResources`
    pub included_namespaced: &'a [String],
    /// `excludedNamespaceScopedResources`
    pub excluded_namespaced: &'a [String],
}

/// What becomes of a kind's objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// None is taken.
    No,
    /// Those that a taken object refers to.
    Referred,
    /// All that namespaces and labels select.
    Listed,
}

/// A filter by kind.
#[derive(Debug, Clone)]
pub struct Kinds {
    lists: Which,
    /// Whether all namespaces are asked for.
    everything: bool,
    unknown: Vec<(&'static str, String)>,
}

#[derive(Debug, Clone)]
enum Which {
    Mixed { list: List, cluster: Option<bool> },
    Scoped { cluster: List, namespaced: List },
}

/// Full names; what is not served stays as it was written.
#[derive(Debug, Clone, Default)]
struct List {
    /// Empty, or with `*`, for all.
    included: BTreeSet<String>,
    excluded: BTreeSet<String>,
}

impl List {
    fn names_all(&self) -> bool {
        self.included.contains("*")
    }

    fn excludes(&self, name: &str) -> bool {
        self.excluded.contains(name) || self.excluded.contains("*")
    }

    fn selects(&self, name: &str) -> bool {
        let is_included =
            self.included.is_empty() || self.names_all() || self.included.contains(name);
        is_included && !self.excludes(name)
    }
}

impl Kinds {
    /// `everything` says whether all namespaces are asked for, `served` what the API server has.
    ///
    /// # Errors
    /// With all that is wrong with the lists.
    pub fn new(lists: &Lists<'_>, everything: bool, served: &[Kind]) -> Result<Self, Vec<Invalid>> {
        let mut reader = Reader { served, invalid: Vec::new(), unknown: Vec::new() };
        let scoped = [
            ("includedClusterScopedResources", lists.included_cluster),
            ("excludedClusterScopedResources", lists.excluded_cluster),
            ("includedNamespaceScopedResources", lists.included_namespaced),
            ("excludedNamespaceScopedResources", lists.excluded_namespaced),
        ];
        let first_scoped = scoped.iter().find(|(_, names)| !names.is_empty());
        let mixed = [
            ("includedResources", !lists.included.is_empty()),
            ("excludedResources", !lists.excluded.is_empty()),
            ("includeClusterResources", lists.include_cluster.is_some()),
        ];
        let which = match first_scoped {
            None => {
                let included = reader.read("includedResources", lists.included, None);
                let excluded = reader.read("excludedResources", lists.excluded, None);
                if excluded.contains("*") {
                    let message = "'*' would leave nothing: name those that are to be left out";
                    reader.invalid.push(Invalid::new("excludedResources", message));
                }
                let list = reader.list("excludedResources", included, excluded);
                Which::Mixed { list, cluster: lists.include_cluster }
            }
            Some((field, _)) => {
                for (old, _) in mixed.iter().filter(|(_, is_set)| *is_set) {
                    let message =
                        format!("it cannot be used together with {field}: give only one of them");
                    reader.invalid.push(Invalid::new(*old, message));
                }
                let [(ic, included_c), (ec, excluded_c), (i_n, included_n), (en, excluded_n)] =
                    scoped;
                let included = reader.read(ic, included_c, Some(false));
                let excluded = reader.read(ec, excluded_c, Some(false));
                let cluster = reader.list(ec, included, excluded);
                let included = reader.read(i_n, included_n, Some(true));
                let excluded = reader.read(en, excluded_n, Some(true));
                let namespaced = reader.list(en, included, excluded);
                Which::Scoped { cluster, namespaced }
            }
        };
        let Reader { invalid, unknown, .. } = reader;
        if invalid.is_empty() {
            Ok(Self { lists: which, everything, unknown })
        } else {
            Err(invalid)
        }
    }

    /// What becomes of a kind's objects. A Namespace is also taken where any object in it is; the list only
    /// says whether it is by itself.
    pub fn choose(&self, kind: &Kind) -> Choice {
        let name = kind.resource();
        let by_itself = if self.everything { Choice::Listed } else { Choice::Referred };
        match &self.lists {
            Which::Mixed { list, .. } if !list.selects(&name) => Choice::No,
            Which::Mixed { .. } if kind.namespaced || kind.is_namespaces() => Choice::Listed,
            Which::Mixed { cluster: Some(false), .. } => Choice::No,
            Which::Mixed { cluster: Some(true), .. } => Choice::Listed,
            Which::Mixed { cluster: None, .. } => by_itself,
            Which::Scoped { namespaced, .. } if kind.namespaced => {
                if namespaced.selects(&name) {
                    Choice::Listed
                } else {
                    Choice::No
                }
            }
            Which::Scoped { .. } if kind.is_namespaces() => Choice::Listed,
            Which::Scoped { cluster, .. } if !cluster.selects(&name) => Choice::No,
            Which::Scoped { cluster, .. } if cluster.included.is_empty() => by_itself,
            Which::Scoped { .. } => Choice::Listed,
        }
    }

    /// Names that the API server does not know, each with its field.
    pub fn unknown(&self) -> &[(&'static str, String)] {
        &self.unknown
    }
}

/// Turns names as people write them into full names.
struct Reader<'a> {
    served: &'a [Kind],
    invalid: Vec<Invalid>,
    unknown: Vec<(&'static str, String)>,
}

impl Reader<'_> {
    fn read(
        &mut self,
        field: &'static str,
        names: &[String],
        namespaced: Option<bool>,
    ) -> BTreeSet<String> {
        let mut read = BTreeSet::new();
        for name in names {
            if name == "*" {
                read.insert(name.clone());
                continue;
            }
            let Some(kind) = find(self.served, name) else {
                self.unknown.push((field, name.clone()));
                read.insert(name.clone());
                continue;
            };
            if namespaced.is_some_and(|namespaced| namespaced != kind.namespaced) {
                let (is, other) = if kind.namespaced {
                    ("lies in namespaces", "NamespaceScoped")
                } else {
                    ("lies in no namespace", "ClusterScoped")
                };
                let message = format!("'{name}' {is}: name it in the list of {other}Resources");
                self.invalid.push(Invalid::new(field, message));
            }
            let same = self.served.iter().filter(|other| other.is_same_objects(kind));
            read.extend(same.map(Kind::resource));
        }
        if read.len() > 1 && read.contains("*") && field.starts_with("included") {
            let message = "'*' stands for all: give it alone, or only the others";
            self.invalid.push(Invalid::new(field, message));
        }
        read
    }

    fn list(
        &mut self,
        field: &'static str,
        included: BTreeSet<String>,
        excluded: BTreeSet<String>,
    ) -> List {
        for name in included.intersection(&excluded).filter(|name| *name != "*") {
            let message = format!("'{name}' is included, too: name it in one list only");
            self.invalid.push(Invalid::new(field, message));
        }
        List { included, excluded }
    }
}

/// The kind that is meant by a name: plural, singular, short or kind, with or without its group. Where several
/// groups have it, the first that is served, as kubectl does.
pub fn find<'a>(served: &'a [Kind], name: &str) -> Option<&'a Kind> {
    let whole = served.iter().find(|kind| kind.is_called(name));
    whole.or_else(|| {
        let (name, group) = name.split_once('.')?;
        served.iter().find(|kind| kind.group == group && kind.is_called(name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(group: &str, kind: &str, short: &[&str], namespaced: bool) -> Kind {
        let singular = kind.to_lowercase();
        let plural = match &*singular {
            "ingress" | "storageclass" => format!("{singular}es"),
            "networkpolicy" => "networkpolicies".to_owned(),
            _ => format!("{singular}s"),
        };
        let short_names = short.iter().map(|name| (*name).to_owned()).collect();
        Kind { group: group.into(), plural, singular, kind: kind.into(), short_names, namespaced }
    }

    fn served() -> Vec<Kind> {
        vec![
            kind("", "Pod", &["po"], true),
            kind("", "Service", &["svc"], true),
            kind("", "Event", &["ev"], true),
            kind("", "Namespace", &["ns"], false),
            kind("", "PersistentVolume", &["pv"], false),
            kind("apps", "Deployment", &["deploy"], true),
            kind("networking.k8s.io", "Ingress", &["ing"], true),
            kind("events.k8s.io", "Event", &["ev"], true),
            kind("storage.k8s.io", "StorageClass", &["sc"], false),
            kind("serving.knative.dev", "Service", &["ksvc"], true),
            kind("extensions", "Ingress", &["ing"], true),
        ]
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// Full names of the kinds that are listed, and of those that are taken where they are referred to.
    fn chosen(lists: &Lists<'_>, everything: bool) -> (Vec<String>, Vec<String>) {
        let served = served();
        let kinds = Kinds::new(lists, everything, &served).unwrap();
        let of = |choice| {
            let of = served.iter().filter(|kind| kinds.choose(kind) == choice);
            of.map(Kind::resource).collect()
        };
        (of(Choice::Listed), of(Choice::Referred))
    }

    const PODS: &[&str] = &["pods"];

    #[test]
    fn kinds_are_found_by_all_their_names() {
        let served = served();
        for (name, expected) in [
            ("pods", Some("pods")),
            ("pod", Some("pods")),
            ("po", Some("pods")),
            ("Pod", Some("pods")),
            ("deploy", Some("deployments.apps")),
            ("deployments.apps", Some("deployments.apps")),
            ("deployment.apps", Some("deployments.apps")),
            ("services", Some("services")),
            ("services.serving.knative.dev", Some("services.serving.knative.dev")),
            ("ksvc", Some("services.serving.knative.dev")),
            ("ingresses", Some("ingresses.networking.k8s.io")),
            ("ingresses.extensions", Some("ingresses.extensions")),
            ("pods.apps", None),
            ("widgets", None),
            ("", None),
        ] {
            assert_eq!(find(&served, name).map(Kind::resource).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn old_lists_choose() {
        let all_namespaced: Vec<String> =
            served().iter().filter(|kind| kind.namespaced).map(Kind::resource).collect();
        let cluster = names(&["persistentvolumes", "storageclasses.storage.k8s.io"]);
        let none = Lists::default();
        let (listed, referred) = chosen(&none, true);
        assert_eq!((listed.len(), referred.len()), (served().len(), 0), "all, with all namespaces");
        let (listed, referred) = chosen(&none, false);
        assert_eq!(referred, cluster, "with some namespaces, what they refer to");
        assert_eq!(listed.len(), all_namespaced.len() + 1, "and the namespaces");
        for everything in [true, false] {
            let (listed, referred) =
                chosen(&Lists { include_cluster: Some(true), ..none }, everything);
            assert_eq!((listed.len(), referred.len()), (served().len(), 0));
            let (listed, referred) =
                chosen(&Lists { include_cluster: Some(false), ..none }, everything);
            assert_eq!((listed.len(), referred.len()), (all_namespaced.len() + 1, 0));
        }
        let pods_only = names(&["po"]);
        let pods = Lists { included: &pods_only, ..none };
        assert_eq!(chosen(&pods, true), (names(PODS), vec![]));
        let with_volumes = names(&["pods", "pv"]);
        let pods = Lists { included: &with_volumes, ..none };
        assert_eq!(chosen(&pods, false), (names(PODS), names(&["persistentvolumes"])));
        assert_eq!(chosen(&pods, true), (names(&["pods", "persistentvolumes"]), vec![]));
        let excluded = names(&["svc", "pv", "ing", "events"]);
        let (listed, referred) = chosen(&Lists { excluded: &excluded, ..none }, false);
        let left = ["pods", "namespaces", "deployments.apps", "services.serving.knative.dev"];
        assert_eq!(listed, left, "both doors to Ingresses and Events are closed");
        assert_eq!(referred, ["storageclasses.storage.k8s.io"]);
    }

    #[test]
    fn scoped_lists_choose() {
        let (pods, all, classes) = (names(PODS), names(&["*"]), names(&["sc"]));
        let none = Lists::default();
        let class = ["storageclasses.storage.k8s.io"];
        let lists = Lists { included_cluster: &classes, included_namespaced: &pods, ..none };
        for everything in [true, false] {
            let (listed, referred) = chosen(&lists, everything);
            assert_eq!(listed, ["pods", "namespaces", class[0]]);
            assert!(referred.is_empty());
        }
        let lists = Lists { included_namespaced: &pods, ..none };
        assert_eq!(chosen(&lists, false).1, ["persistentvolumes", class[0]]);
        assert_eq!(chosen(&lists, true).0, ["pods", "namespaces", "persistentvolumes", class[0]]);
        let lists = Lists { excluded_cluster: &all, included_namespaced: &pods, ..none };
        assert_eq!(chosen(&lists, true), (names(&["pods", "namespaces"]), vec![]));
        let lists = Lists { excluded_namespaced: &all, included_cluster: &all, ..none };
        assert_eq!(chosen(&lists, false).0, ["namespaces", "persistentvolumes", class[0]]);
        let lists = Lists { excluded_cluster: &classes, excluded_namespaced: &all, ..none };
        assert_eq!(chosen(&lists, true).0, ["namespaces", "persistentvolumes"]);
    }

    #[test]
    fn unknown_names_are_told_and_select_nothing() {
        let (unknown, excluded) = (names(&["pods", "widgets"]), names(&["gadgets"]));
        let lists = Lists { included: &unknown, excluded: &excluded, ..Lists::default() };
        let kinds = Kinds::new(&lists, true, &served()).unwrap();
        let told = [("includedResources", "widgets"), ("excludedResources", "gadgets")];
        assert_eq!(kinds.unknown(), told.map(|(field, name)| (field, name.to_owned())));
        assert_eq!(chosen(&lists, true).0, PODS);
    }

    #[test]
    fn contradictions_are_named_by_field() {
        let [pods, all, both, class] =
            [&["pods"][..], &["*"], &["*", "pods"], &["storageclasses"]].map(names);
        let none = Lists::default();
        for (lists, expected) in [
            (Lists { excluded: &all, ..none }, "spec.excludedResources: '*' would leave nothing"),
            (Lists { included: &both, ..none }, "spec.includedResources: '*' stands for all"),
            (
                Lists { included: &pods, excluded: &pods, ..none },
                "spec.excludedResources: 'pods' is included",
            ),
            (
                Lists { included: &pods, included_cluster: &class, ..none },
                "spec.includedResources: it cannot be used together with includedClusterScopedResources",
            ),
            (
                Lists { include_cluster: Some(false), excluded_namespaced: &pods, ..none },
                "spec.includeClusterResources: it cannot be used together with excludedNamespaceScopedResources",
            ),
            (
                Lists { included_cluster: &pods, ..none },
                "spec.includedClusterScopedResources: 'pods' lies in namespaces: name it in the list of \
                 NamespaceScopedResources",
            ),
            (
                Lists { excluded_namespaced: &class, ..none },
                "spec.excludedNamespaceScopedResources: 'storageclasses' lies in no namespace",
            ),
            (
                Lists { included_namespaced: &both, ..none },
                "spec.includedNamespaceScopedResources: '*' stands for all",
            ),
        ] {
            let invalid = Kinds::new(&lists, true, &served()).unwrap_err();
            assert_eq!(invalid.len(), 1, "{invalid:?}");
            assert!(invalid[0].to_string().starts_with(expected), "{}", invalid[0]);
        }
    }
}
