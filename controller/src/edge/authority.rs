//! The certificate authority by which agents know the controller.
//!
//! The Secret `ebackup-ca` holds the authorities with their keys, the ConfigMap of the same name the certificates
//! that agents trust. `plan` decides which there should be; [`Authority`] makes it so, again and again, and keeps
//! the server's certificate fresh: that is in memory only, and changes while connections are served.
//!
//! Several controllers may do this at once: the Secret is written only as it was read, and who is late reads what the
//! faster one wrote.

mod plan;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Api, ObjectMeta, PostParams};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use zeroize::Zeroizing;

use self::plan::{Roles, Validity, must_renew_server};
use crate::cluster::{Clock, answer, lost_race};

/// Name of the Secret and of the ConfigMap.
pub const NAME: &str = "ebackup-ca";

/// Key of the ConfigMap: all certificates to trust, PEM.
pub const BUNDLE: &str = "ca.crt";

/// How often everything is looked at: the two objects are small, and a ConfigMap that somebody deleted keeps new
/// agents out.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// How often another writer may be faster before this one gives up until the next look.
const RACES: usize = 5;

/// Keys of the Secret by role: certificate and, for those that sign or will, the private key.
const CURRENT: (&str, &str) = ("ca.crt", "ca.key");
const NEXT: (&str, &str) = ("next.crt", "next.key");
const PREVIOUS: &str = "previous.crt";

/// One authority.
#[derive(Clone, PartialEq, Eq)]
struct Signer {
    certificate_pem: String,
    validity: Validity,
    /// PEM. None of one that no longer signs.
    key_pem: Option<Zeroizing<String>>,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("validity", &self.validity).finish_non_exhaustive()
    }
}

impl Signer {
    fn make(now: Timestamp) -> Result<Self> {
        let validity = Validity::of_authority(now);
        let key = KeyPair::generate().context("cannot make a key")?;
        let mut params = parameters(validity, Vec::new())?;
        // A name of its own: chains are found by names, and two authorities are in force while one takes over.
        let mut number = [0; 8];
        getrandom::fill(&mut number).context("cannot get random bytes")?;
        let name = format!("ebackup {:016x}", u64::from_be_bytes(number));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).context("cannot sign an authority")?;
        // As it will be read: certificates count whole seconds.
        Self::read(certificate.pem(), Some(Zeroizing::new(key.serialize_pem())))
    }

    /// Trusts nothing: the Secret may be damaged.
    fn read(certificate_pem: String, key_pem: Option<Zeroizing<String>>) -> Result<Self> {
        let (rest, pem) = x509_parser::pem::parse_x509_pem(certificate_pem.as_bytes())
            .context("the certificate is not PEM")?;
        ensure!(rest.trim_ascii().is_empty(), "there is more than one certificate");
        let (_, certificate) = x509_parser::parse_x509_certificate(&pem.contents)
            .context("the certificate cannot be read")?;
        ensure!(certificate.is_ca(), "the certificate is not an authority's");
        let validity = validity_of(&certificate)?;
        if let Some(key_pem) = &key_pem {
            let key = KeyPair::from_pem(key_pem).context("the key cannot be read")?;
            let is_same = key.subject_public_key_info() == certificate.public_key().raw;
            ensure!(is_same, "the key is not the certificate's");
        }
        Ok(Self { certificate_pem, validity, key_pem })
    }

    fn sign_server(&self, names: &[String], now: Timestamp) -> Result<Server> {
        let key_pem = self.key_pem.as_ref().context("the authority has no key")?;
        let issuer_key =
            KeyPair::from_pem(key_pem).context("the authority's key cannot be read")?;
        let issuer = Issuer::from_ca_cert_pem(&self.certificate_pem, issuer_key)
            .context("the authority's certificate cannot be read")?;
        let key = KeyPair::generate().context("cannot make a key")?;
        let validity = Validity::of_server(now, self.validity);
        let mut params = parameters(validity, names.to_vec())?;
        params.distinguished_name.push(DnType::CommonName, "ebackup-controller");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &issuer).context("cannot sign a certificate")?;
        let chain: Vec<CertificateDer<'static>> = vec![certificate.der().clone()];
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&PrivateKeyDer::from(key))
            .context("the key cannot be used")?;
        Ok(Server {
            certified: Arc::new(CertifiedKey::new(chain, key)),
            validity,
            signed_by: self.certificate_pem.clone(),
        })
    }
}

fn parameters(validity: Validity, names: Vec<String>) -> Result<CertificateParams> {
    let mut params =
        CertificateParams::new(names).context("a service name cannot be that of a server")?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    let time = |time: Timestamp| {
        SystemTime::try_from(time).with_context(|| format!("{time} cannot be in a certificate"))
    };
    params.not_before = time(validity.from)?.into();
    params.not_after = time(validity.until)?.into();
    Ok(params)
}

fn validity_of(certificate: &x509_parser::certificate::X509Certificate<'_>) -> Result<Validity> {
    let time = |time: x509_parser::time::ASN1Time| {
        Timestamp::from_second(time.timestamp()).context("the certificate's time is no time")
    };
    let validity = certificate.validity();
    Ok(Validity { from: time(validity.not_before)?, until: time(validity.not_after)? })
}

/// The certificate that is shown to agents.
#[derive(Debug)]
struct Server {
    certified: Arc<CertifiedKey>,
    validity: Validity,
    /// Certificate (PEM) of the authority.
    signed_by: String,
}

/// Gives every new connection the certificate that is in force.
#[derive(Debug, Default)]
struct Shown(RwLock<Option<Server>>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let server = self.0.read().unwrap_or_else(PoisonError::into_inner);
        server.as_ref().map(|server| server.certified.clone())
    }
}

impl Shown {
    /// Makes a new certificate, unless the one that there is will do. Returns whether it did.
    fn renew(&self, signer: &Signer, names: &[String], now: Timestamp) -> Result<bool> {
        let is_good = |server: &Server| {
            server.signed_by == signer.certificate_pem && !must_renew_server(server.validity, now)
        };
        if self.0.read().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(is_good) {
            return Ok(false);
        }
        let server = signer.sign_server(names, now)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(server);
        Ok(true)
    }

    fn config(self: Arc<Self>) -> Result<rustls::ServerConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .context("TLS 1.3 is not available")?
            .with_no_client_auth()
            .with_cert_resolver(self);
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// Keeps the authority in the cluster and the server's certificate in memory.
#[derive(Debug)]
pub struct Authority {
    secrets: Api<Secret>,
    maps: Api<ConfigMap>,
    /// What the server's certificate is for.
    names: Vec<String>,
    clock: Clock,
    shown: Arc<Shown>,
}

impl Authority {
    /// Reads or makes the authority, publishes it, and makes the server's certificate.
    ///
    /// # Errors
    /// When the Secret or the ConfigMap cannot be read or written.
    pub async fn start(
        client: kube::Client,
        namespace: &str,
        names: Vec<String>,
        clock: Clock,
    ) -> Result<Self> {
        let authority = Self {
            secrets: Api::namespaced(client.clone(), namespace),
            maps: Api::namespaced(client, namespace),
            names,
            clock,
            shown: Arc::default(),
        };
        authority.keep().await?;
        Ok(authority)
    }

    /// How the server does TLS: with the certificate that is in force whenever somebody connects.
    ///
    /// # Errors
    /// When the program's cryptography lacks TLS 1.3.
    pub fn server_config(&self) -> Result<Arc<rustls::ServerConfig>> {
        self.shown.clone().config().map(Arc::new)
    }

    /// Keeps everything as it should be, for ever. What fails is logged and tried again: the certificates that are
    /// there are good for days.
    pub async fn run(&self) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            if let Err(error) = self.keep().await {
                tracing::error!("cannot keep the authority: {error:#}");
            }
        }
    }

    /// Makes everything as it should be, once.
    ///
    /// # Errors
    /// When the Secret or the ConfigMap cannot be read or written.
    pub async fn keep(&self) -> Result<()> {
        let now = (self.clock)();
        let roles = self.settle(now).await?;
        // Agents cannot connect without, but those that know the authority can also while publishing fails.
        let signer = roles.current.as_ref().context("there is no authority that signs")?;
        if self.shown.renew(signer, &self.names, now)? {
            tracing::info!(names = ?self.names, "made a new server certificate");
        }
        self.publish(&bundle(&roles)).await
    }

    /// The authorities as they should be, written to the Secret if they were not.
    async fn settle(&self, now: Timestamp) -> Result<Roles<Signer>> {
        for _ in 0..RACES {
            let reading = || format!("cannot read Secret '{NAME}'");
            let secret = answer(reading, self.secrets.get_opt(NAME)).await?;
            let reading = || format!("cannot read ConfigMap '{NAME}'");
            let published = answer(reading, self.maps.get_opt(NAME)).await?;
            let published = published.and_then(|map| map.data?.remove(BUNDLE)).unwrap_or_default();
            let data = secret.as_ref().and_then(|secret| secret.data.clone()).unwrap_or_default();
            let roles = decide(read(&data, &published), now)?;
            let wanted = write(&roles);
            if wanted == data {
                return Ok(roles);
            }
            match self.store(secret, wanted).await {
                Ok(()) => return Ok(roles),
                Err(error) if lost_race(&error) => {
                    tracing::info!("another controller wrote Secret '{NAME}', reading it again");
                }
                Err(error) => return Err(error),
            }
        }
        bail!("Secret '{NAME}' was changed by others {RACES} times while this controller tried to")
    }

    async fn store(
        &self,
        secret: Option<Secret>,
        data: BTreeMap<String, ByteString>,
    ) -> Result<()> {
        let how = PostParams::default();
        let writing = || format!("cannot write Secret '{NAME}'");
        // The version that was read goes along, so that nothing newer is overwritten.
        match secret {
            Some(mut secret) => {
                secret.data = Some(data);
                answer(writing, self.secrets.replace(NAME, &how, &secret)).await?;
            }
            None => {
                let secret = Secret {
                    metadata: named(),
                    type_: Some("Opaque".to_owned()),
                    data: Some(data),
                    ..Default::default()
                };
                answer(writing, self.secrets.create(&how, &secret)).await?;
            }
        }
        Ok(())
    }

    async fn publish(&self, bundle: &str) -> Result<()> {
        for _ in 0..RACES {
            let reading = || format!("cannot read ConfigMap '{NAME}'");
            let found = answer(reading, self.maps.get_opt(NAME)).await?;
            let data = Some(BTreeMap::from([(BUNDLE.to_owned(), bundle.to_owned())]));
            if found.as_ref().is_some_and(|map| map.data == data) {
                return Ok(());
            }
            let how = PostParams::default();
            let writing = || format!("cannot write ConfigMap '{NAME}'");
            let written = match found {
                Some(map) => {
                    let map = ConfigMap { data, ..map };
                    answer(writing, self.maps.replace(NAME, &how, &map)).await
                }
                None => {
                    let map = ConfigMap { metadata: named(), data, ..Default::default() };
                    answer(writing, self.maps.create(&how, &map)).await
                }
            };
            match written {
                Err(error) if lost_race(&error) => {}
                other => return other.map(|_| ()),
            }
        }
        bail!(
            "ConfigMap '{NAME}' was changed by others {RACES} times while this controller tried to"
        )
    }
}

fn named() -> ObjectMeta {
    ObjectMeta { name: Some(NAME.to_owned()), ..Default::default() }
}

/// Takes all steps that the plan has now.
fn decide(mut roles: Roles<Signer>, now: Timestamp) -> Result<Roles<Signer>> {
    while let Some(step) = validities(&roles).step(now) {
        tracing::info!(?step, "the authority changes");
        roles = roles.after(step, now, |signer| signer.validity, || Signer::make(now))?;
    }
    Ok(roles)
}

fn validities(roles: &Roles<Signer>) -> Roles<Validity> {
    let validity = |signer: &Option<Signer>| signer.as_ref().map(|signer| signer.validity);
    Roles {
        current: validity(&roles.current),
        next: validity(&roles.next),
        previous: validity(&roles.previous),
        next_is_published: roles.next_is_published,
    }
}

/// The authorities in the Secret. What is damaged counts as missing: agents get to know a new one within minutes,
/// and there would be no other way on.
fn read(data: &BTreeMap<String, ByteString>, published: &str) -> Roles<Signer> {
    let text = |key: &str| {
        let bytes = data.get(key)?;
        Some(String::from_utf8_lossy(&bytes.0).into_owned())
    };
    let signer = |(certificate, key): (&str, Option<&str>)| {
        if !data.contains_key(certificate) && !key.is_some_and(|key| data.contains_key(key)) {
            return None;
        }
        let read = match key {
            Some(key) => text(key).context("the key is missing").and_then(|key| {
                Signer::read(text(certificate).unwrap_or_default(), Some(key.into()))
            }),
            None => Signer::read(text(certificate).unwrap_or_default(), None),
        };
        let lost = |error: &anyhow::Error| {
            tracing::error!("Secret '{NAME}', '{certificate}' is damaged and replaced: {error:#}");
        };
        read.inspect_err(lost).ok()
    };
    let next = signer((NEXT.0, Some(NEXT.1)));
    let is_published = |next: &Signer| published.contains(next.certificate_pem.trim());
    Roles {
        current: signer((CURRENT.0, Some(CURRENT.1))),
        next_is_published: next.as_ref().is_some_and(is_published),
        next,
        previous: signer((PREVIOUS, None)),
    }
}

/// The content of the Secret for these authorities.
fn write(roles: &Roles<Signer>) -> BTreeMap<String, ByteString> {
    let mut data = BTreeMap::new();
    let mut put = |key: &str, text: &str| {
        data.insert(key.to_owned(), ByteString(text.as_bytes().to_vec()));
    };
    for (signer, (certificate, key)) in [(&roles.current, CURRENT), (&roles.next, NEXT)] {
        if let Some(signer) = signer {
            put(certificate, &signer.certificate_pem);
            if let Some(key_pem) = &signer.key_pem {
                put(key, key_pem);
            }
        }
    }
    // Without its key: that signs nothing any more.
    if let Some(previous) = &roles.previous {
        put(PREVIOUS, &previous.certificate_pem);
    }
    data
}

/// What agents are to trust.
fn bundle(roles: &Roles<Signer>) -> String {
    let pems = roles.published().map(|signer| signer.certificate_pem.trim().to_owned() + "\n");
    pems.collect()
}

/// An authority without a cluster, for whoever tests what is served with it.
#[cfg(test)]
pub(crate) mod testing {
    use jiff::SignedDuration;

    use super::*;

    /// The name in its server's certificate.
    pub(crate) const SERVER: &str = "ebackup-controller.velero.svc";

    pub(crate) struct Offline {
        roles: Roles<Signer>,
        shown: Arc<Shown>,
    }

    impl Offline {
        pub(crate) fn new() -> Self {
            let mut offline = Self { roles: Roles::default(), shown: Arc::default() };
            offline.keep();
            offline
        }

        pub(crate) fn server_config(&self) -> Arc<rustls::ServerConfig> {
            Arc::new(self.shown.clone().config().unwrap())
        }

        /// What agents trust now.
        pub(crate) fn bundle(&self) -> String {
            bundle(&self.roles)
        }

        /// Makes the next authority, as if two days ago.
        pub(crate) fn publish_next(&mut self) {
            let then = Timestamp::now() - SignedDuration::from_hours(48);
            self.roles.next = Some(Signer::make(then).unwrap());
        }

        /// The next authority was found published: it signs now.
        pub(crate) fn promote(&mut self) {
            self.roles.next_is_published = true;
            self.keep();
        }

        fn keep(&mut self) {
            let now = Timestamp::now();
            self.roles = decide(std::mem::take(&mut self.roles), now).unwrap();
            let signer = self.roles.current.as_ref().unwrap();
            assert!(self.shown.renew(signer, &[SERVER.to_owned()], now).unwrap());
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    fn now() -> Timestamp {
        "2026-03-01T00:00:00.5Z".parse().unwrap()
    }

    fn fresh() -> BTreeMap<String, ByteString> {
        write(&decide(Roles::default(), now()).unwrap())
    }

    #[test]
    fn what_is_written_is_read_again_and_then_nothing_is_to_do() {
        let roles = decide(Roles::default(), now()).unwrap();
        let data = write(&roles);
        assert_eq!(data.keys().collect::<Vec<_>>(), ["ca.crt", "ca.key"]);
        let again = read(&data, &bundle(&roles));
        assert_eq!(again, roles);
        assert_eq!(write(&decide(again, now()).unwrap()), data);
    }

    #[test]
    fn a_rotation_keeps_the_old_certificate_and_forgets_its_key() {
        let first = fresh();
        let later = now() + SignedDuration::from_hours(250 * 24);
        let second = decide(read(&first, ""), later).unwrap();
        assert_eq!(bundle(&second).matches("BEGIN CERTIFICATE").count(), 2);
        let data = write(&second);
        assert_eq!(data["ca.crt"], first["ca.crt"], "the first signs still");
        let day = later + SignedDuration::from_hours(25);
        let third = decide(read(&data, &bundle(&second)), day).unwrap();
        let data = write(&third);
        assert_eq!(data.keys().collect::<Vec<_>>(), ["ca.crt", "ca.key", "previous.crt"]);
        assert_eq!(data["previous.crt"], first["ca.crt"]);
        assert!(bundle(&third).contains(String::from_utf8_lossy(&first["ca.crt"].0).trim()));
    }

    #[test]
    fn a_damaged_secret_is_replaced_by_one_that_works() {
        let good = fresh();
        let other = fresh();
        let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
        let with = |key: &str, value: ByteString| {
            let mut data = good.clone();
            data.insert(key.to_owned(), value);
            data
        };
        let mut without_key = good.clone();
        without_key.remove("ca.key");
        let mut without_certificate = good.clone();
        without_certificate.remove("ca.crt");
        let server = {
            let roles = read(&good, "");
            let params = parameters(roles.current.unwrap().validity, vec!["a".to_owned()]);
            let key = KeyPair::generate().unwrap();
            bytes(&params.unwrap().self_signed(&key).unwrap().pem())
        };
        let cut = ByteString(good["ca.crt"].0[..good["ca.crt"].0.len() / 2].to_vec());
        let two = ByteString([good["ca.crt"].0.clone(), other["ca.crt"].0.clone()].concat());
        let damaged = [
            ("no key", without_key),
            ("no certificate", without_certificate),
            ("another's key", with("ca.key", other["ca.key"].clone())),
            ("an empty key", with("ca.key", bytes(""))),
            ("garbage", with("ca.crt", ByteString(vec![0xff, 0, 7]))),
            ("cut", with("ca.crt", cut)),
            ("two", with("ca.crt", two)),
            ("a server's", with("ca.crt", server)),
        ];
        for (name, data) in damaged {
            let roles = read(&data, "");
            assert_eq!(roles.current, None, "{name}");
            let mended = decide(roles, now()).unwrap();
            assert!(read(&write(&mended), "").current.is_some(), "{name}");
        }
        let next = read(&with("next.crt", bytes("x")), "");
        assert!(next.current.is_some() && next.next.is_none(), "only what is damaged is lost");
    }

    #[test]
    fn keys_are_not_printed() {
        let roles = read(&fresh(), "");
        let text = format!("{roles:?}");
        assert!(text.contains("validity") && !text.contains("PRIVATE"), "{text}");
    }

    #[test]
    fn the_certificate_shown_changes_only_when_it_must() {
        let signer = Signer::make(now()).unwrap();
        let other = Signer::make(now()).unwrap();
        let (shown, names) = (Shown::default(), ["a.example".to_owned(), "192.0.2.1".to_owned()]);
        let hours = |hours| now() + SignedDuration::from_hours(hours);
        assert!(shown.renew(&signer, &names, hours(0)).unwrap());
        assert!(!shown.renew(&signer, &names, hours(100)).unwrap());
        assert!(shown.renew(&signer, &names, hours(113)).unwrap(), "a third is left");
        assert!(shown.renew(&other, &names, hours(113)).unwrap(), "another authority signs");
    }
}
