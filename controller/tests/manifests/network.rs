//! What NetworkPolicies let in, for the parts of them that are used here: pods and namespaces chosen by labels, ports by
//! number. The network of the test cluster enforces none.

use std::collections::BTreeMap;

use serde_json::Value;

/// A pod as policies see it.
pub(crate) struct Peer<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) labels: &'a [(&'a str, &'a str)],
}

impl Peer<'_> {
    fn matches(&self, selector: &Value) -> bool {
        assert!(selector["matchExpressions"].is_null(), "not understood: {selector}");
        let wanted: BTreeMap<&str, &str> = selector["matchLabels"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.as_str(), value.as_str().unwrap()))
            .collect();
        wanted.into_iter().all(|label| self.labels.contains(&label))
    }
}

/// Whether `policies` let a connection from one pod to a port of another. A pod that no policy chooses lets in all.
pub(crate) fn lets_in(policies: &[Value], from: &Peer<'_>, to: &Peer<'_>, port: u64) -> bool {
    let mut chosen = policies.iter().filter(|policy| {
        let kinds = policy["spec"]["policyTypes"].as_array().unwrap();
        policy["metadata"]["namespace"] == to.namespace
            && kinds.iter().any(|kind| kind == "Ingress")
            && to.matches(&policy["spec"]["podSelector"])
    });
    let mut any = false;
    let open = chosen.any(|policy| {
        any = true;
        let rules = policy["spec"]["ingress"].as_array().into_iter().flatten();
        rules.into_iter().any(|rule| rule_lets_in(rule, from, to, port))
    });
    open || !any
}

fn rule_lets_in(rule: &Value, from: &Peer<'_>, to: &Peer<'_>, port: u64) -> bool {
    // An empty list is none, and so is open to all.
    let port_fits = rule["ports"].as_array().is_none_or(|ports| {
        ports.is_empty()
            || ports.iter().any(|open| {
                assert!(open["endPort"].is_null(), "not understood: {open}");
                open["port"] == port && matches!(open["protocol"].as_str(), None | Some("TCP"))
            })
    });
    port_fits
        && rule["from"].as_array().is_none_or(|peers| {
            peers.is_empty()
                || peers.iter().any(|peer| {
                    let known = ["podSelector"];
                    let fields = peer.as_object().unwrap();
                    assert!(fields.keys().all(|field| known.contains(&field.as_str())), "{peer}");
                    // Without a selector of namespaces, a peer is one of the policy's own.
                    from.namespace == to.namespace && from.matches(&peer["podSelector"])
                })
        })
}
