//! What a location's fields mean: pure, from the object and the content of its Secrets to a store's configuration.

use std::collections::BTreeMap;

use objects::s3::{AccessKey, Addressing, CredentialSource, S3Config, SharedKey};
use proto::v1::{self, Credentials, Repository};

use crate::api::BackupStorageLocation;

/// Requests that a probe makes of a store that does not answer. A job makes more: it has more to lose.
const ATTEMPTS: u32 = 3;

/// What a location's store is.
#[derive(Debug, Clone)]
pub struct Description {
    /// For requests from here, below the location's prefix.
    pub s3: S3Config,
    /// The access key in force.
    pub access_key: AccessKey,
    /// The same for the store, which can be given another while it is used.
    pub key: SharedKey,
    /// For agents; without passphrase.
    pub repository: Repository,
    /// What was ignored, and what to do about it.
    pub remarks: Vec<String>,
}

/// The Secrets that a location names: what they hold under the key it names.
#[derive(Clone, Copy, Default)]
pub struct Secrets<'a> {
    /// Of `spec.credential`.
    pub credential: Option<&'a [u8]>,
    /// Of `spec.objectStorage.caCertRef`.
    pub ca: Option<&'a [u8]>,
}

/// Works out what the store of a location is.
///
/// # Errors
/// Which field is wrong, and what to write there.
pub fn describe(
    location: &BackupStorageLocation,
    secrets: Secrets<'_>,
) -> Result<Description, String> {
    let spec = &location.spec;
    let mut remarks = Vec::new();
    let (known, aws): (&[&str], bool) = match &*spec.provider {
        "huawei" | "huawei.com/huaweicloud" => (&["endpoint", "region"], false),
        "aws" | "velero.io/aws" => (
            &["region", "s3ForcePathStyle", "s3Url", "publicUrl", "profile", "checksumAlgorithm"],
            true,
        ),
        other => {
            return Err(format!(
                "spec.provider '{other}' is not known: write huawei for OBS, or aws for what speaks S3"
            ));
        }
    };
    if matches!(spec.access_mode.as_deref(), Some(mode) if !["", "ReadWrite", "ReadOnly"].contains(&mode))
    {
        return Err("spec.accessMode must be ReadWrite or ReadOnly".to_owned());
    }
    if spec.setting("insecureSkipTLSVerify") == Some("true") {
        return Err(
            "spec.config.insecureSkipTLSVerify is refused, because anybody could then read and \
                    change backups: put the store's certificate into spec.objectStorage.caCert"
                .to_owned(),
        );
    }
    let common = ["passphraseSecret", "insecureSkipTLSVerify"];
    for name in spec.config.iter().flat_map(BTreeMap::keys) {
        if !known.contains(&&**name) && !common.contains(&&**name) {
            remarks.push(format!("spec.config.{name} is ignored"));
        }
    }
    let endpoint = spec.setting(if aws { "s3Url" } else { "endpoint" });
    if !aws && endpoint.is_none() {
        return Err(
            "spec.config.endpoint is missing: write obs.{region}.myhuaweicloud.com".to_owned()
        );
    }
    if aws && endpoint.is_none() && spec.setting("region").is_none() {
        return Err(
            "spec.config.region is missing: write the bucket's region, or s3Url for a store \
                    other than AWS"
                .to_owned(),
        );
    }
    let profile = spec.setting("profile").unwrap_or("default");
    let key = access_key(location, secrets.credential, profile)?;
    let storage = &spec.object_storage;
    let prefix = storage.prefix.as_deref().unwrap_or_default().trim_matches('/');
    let url = format!("s3://{}/{prefix}", storage.bucket);
    let shared = SharedKey::new(key.clone());
    let source = CredentialSource::Shared(shared.clone());
    let made = S3Config::new(&url, endpoint, spec.setting("region"), source);
    let mut s3 = made.map_err(|error| advice(&error))?;
    let path_style = match spec.setting("s3ForcePathStyle").filter(|_| aws) {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            return Err(format!(
                "spec.config.s3ForcePathStyle '{other}' is neither true nor false"
            ));
        }
    };
    if path_style {
        s3.addressing = Addressing::Path;
    }
    s3.attempts = ATTEMPTS;
    s3.ca_certificates = certificates(storage.ca_cert.as_deref(), secrets.ca)?;
    let repository = Repository {
        location: location.metadata.name.clone().unwrap_or_default(),
        url: format!("s3://{}/{}{}", s3.bucket, s3.prefix, proto::REPOSITORY_FOLDER),
        endpoint: s3.endpoint.clone().unwrap_or_default(),
        region: s3.region.clone(),
        addressing: if path_style {
            v1::Addressing::Path.into()
        } else {
            v1::Addressing::Auto.into()
        },
        ca_certificates: s3.ca_certificates.clone(),
        credentials: Some(Credentials {
            access_key: key.key.clone(),
            secret_key: key.secret.clone(),
            session_token: key.session_token.clone().unwrap_or_default(),
        }),
        ..Default::default()
    };
    Ok(Description { s3, access_key: key, key: shared, repository, remarks })
}

fn access_key(
    location: &BackupStorageLocation,
    content: Option<&[u8]>,
    profile: &str,
) -> Result<AccessKey, String> {
    let Some(wanted) = &location.spec.credential else {
        return Err(
            "spec.credential is missing: name a Secret with the access key, and the key in it"
                .to_owned(),
        );
    };
    let namespace = location.metadata.namespace.as_deref().unwrap_or_default();
    let secret = format!("Secret '{}' in namespace '{namespace}'", wanted.name);
    let content = content.ok_or_else(|| {
        format!("{secret} with key '{}' (spec.credential) does not exist: create it", wanted.key)
    })?;
    let text = std::str::from_utf8(content)
        .map_err(|_| format!("key '{}' of {secret} is no text", wanted.key))?;
    AccessKey::parse(text, profile).map_err(|why| format!("key '{}' of {secret} {why}", wanted.key))
}

fn certificates(inline: Option<&str>, referred: Option<&[u8]>) -> Result<Vec<u8>, String> {
    let Some(inline) = inline.filter(|inline| !inline.trim().is_empty()) else {
        return Ok(referred.unwrap_or_default().to_vec());
    };
    // As everywhere in Kubernetes, bytes are written in base64.
    let value = serde_json::Value::String(inline.split_whitespace().collect());
    let bytes: Result<k8s_openapi::ByteString, _> = serde_json::from_value(value);
    let bytes = bytes.map_err(|_| {
        "spec.objectStorage.caCert is not base64: encode the PEM file with base64 -w 0".to_owned()
    })?;
    Ok(bytes.0)
}

/// An error of the store with its cause, and advice in terms of a location's fields.
pub fn advice(error: &objects::Error) -> String {
    let mut text = error.to_string();
    if let Some(why) = std::error::Error::source(error) {
        text = format!("{text}: {why}");
    }
    let fields = [
        ("give it with --ca-file", "put it into spec.objectStorage.caCert"),
        ("drop --path-style", "take s3ForcePathStyle out of spec.config"),
        ("--endpoint, --region", "endpoint or s3Url, and region, in spec.config"),
        ("--endpoint", "endpoint or s3Url in spec.config"),
        ("--region", "region in spec.config"),
    ];
    for (flag, field) in fields {
        text = text.replace(flag, field);
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn location(spec: Value) -> BackupStorageLocation {
        serde_json::from_value(json!({
            "apiVersion": "velero.io/v1", "kind": "BackupStorageLocation",
            "metadata": {"name": "here", "namespace": "velero"}, "spec": spec,
        }))
        .unwrap()
    }

    fn spec(provider: &str, config: Value) -> Value {
        json!({
            "provider": provider, "config": config,
            "credential": {"name": "s", "key": "cloud"},
            "objectStorage": {"bucket": "bucket", "prefix": "a/b"},
        })
    }

    const KEY: &[u8] = b"HUAWEI_CLOUD_ACCESS_KEY_ID=key\nHUAWEI_CLOUD_SECRET_ACCESS_KEY=hidden\n";

    fn read(spec: Value) -> Result<Description, String> {
        describe(&location(spec), Secrets { credential: Some(KEY), ca: None })
    }

    /// As the documentation of e-backup has it, the placeholder filled in.
    const SAMPLE: &str = "
apiVersion: velero.io/v1
kind: BackupStorageLocation
metadata:
  name: backup-location-001
  namespace: velero #必须和E-Backup处于同一namespace
spec:
  config:
    endpoint: obs.cn-north-4.myhuaweicloud.com # OBS的endpoint
  credential:
    name: secret-secure-opaque # 此前创建的secret的名字
    key: cloud # secret.data中的key值
  objectStorage:
    bucket: tools-cce # OBS中的桶名
    prefix: for-backup # 子路径名
  provider: huawei # 使用OBS服务
";

    const SAMPLE_SECRET: &str = "
apiVersion: v1
kind: Secret
metadata:
  labels:
    secret.everest.io/backup: 'true' #标识该secret用于E-Backup访问备份存储库
  name: secret-secure-opaque
  namespace: velero #必须和E-Backup置于同一namespace,取值必须为velero
type: cfe/secure-opaque
data: # credential文件经过base64编码后得到的字符串
  cloud: SFVBV0VJX0NMT1VEX0FDQ0VTU19LRVlfSUQ9eW91cl9hY2Nlc3Nfa2V5CkhVQVdFSV9DTE9VRF9TRUNSRVRfQUNDRVNTX0tFWT15b3VyX3NlY3JldF9rZXkK
";

    #[test]
    fn the_sample_of_e_backup_is_understood() {
        let location: BackupStorageLocation = serde_saphyr::from_str(SAMPLE).unwrap();
        let secret: k8s_openapi::api::core::v1::Secret =
            serde_saphyr::from_str(SAMPLE_SECRET).unwrap();
        let data = secret.data.unwrap();
        let secrets = Secrets { credential: Some(&data["cloud"].0), ca: None };
        let store = describe(&location, secrets).unwrap();
        let s3 = &store.s3;
        assert_eq!((&*s3.bucket, &*s3.prefix), ("tools-cce", "for-backup/"));
        assert_eq!(s3.endpoint.as_deref(), Some("https://obs.cn-north-4.myhuaweicloud.com"));
        assert_eq!((&*s3.region, s3.addressing), ("cn-north-4", Addressing::Auto));
        let repository = store.repository;
        assert_eq!(repository.url, "s3://tools-cce/for-backup/restic/_chunkstore");
        assert_eq!(repository.location, "backup-location-001");
        let credentials = repository.credentials.unwrap();
        assert_eq!(credentials.access_key, "your_access_key");
        assert_eq!(credentials.secret_key, "your_secret_key");
        assert_eq!(store.remarks, Vec::<String>::new());
    }

    #[test]
    fn locations_for_the_aws_provider_are_understood() {
        let ini =
            b"[default]\naws_access_key_id=x\naws_secret_access_key=y\n[p]\naws_access_key_id=k\n\
                    aws_secret_access_key=s\naws_session_token=t\n";
        let config = json!({
            "region": "minio", "s3ForcePathStyle": "true", "s3Url": "http://minio:9000/",
            "publicUrl": "https://x", "profile": "p", "checksumAlgorithm": "", "kmsKeyId": "k",
        });
        let location = location(spec("velero.io/aws", config));
        let store = describe(&location, Secrets { credential: Some(ini), ca: None }).unwrap();
        assert_eq!(store.s3.endpoint.as_deref(), Some("http://minio:9000"));
        assert_eq!((&*store.s3.region, store.s3.addressing), ("minio", Addressing::Path));
        assert_eq!(store.repository.addressing, i32::from(v1::Addressing::Path));
        let credentials = store.repository.credentials.unwrap();
        assert_eq!((&*credentials.access_key, &*credentials.session_token), ("k", "t"));
        assert_eq!(store.remarks, ["spec.config.kmsKeyId is ignored"]);
        let plain = read(spec("aws", json!({"region": "eu-west-1"}))).unwrap();
        assert_eq!((plain.s3.endpoint, &*plain.repository.endpoint), (None, ""));
    }

    #[test]
    fn certificates_come_from_the_object_or_from_a_secret() {
        let mut with = spec("huawei", json!({"endpoint": "https://obs.example.com"}));
        with["objectStorage"]["caCert"] = json!("LS0tLS1C\nRUdJTiA=");
        let store_of = |spec: Value, ca| {
            describe(&location(spec), Secrets { credential: Some(KEY), ca }).unwrap()
        };
        let inline = store_of(with.clone(), Some(b"other"));
        assert_eq!(inline.s3.ca_certificates, b"-----BEGIN ");
        assert_eq!(inline.repository.ca_certificates, b"-----BEGIN ");
        with["objectStorage"]["caCert"] = json!("");
        assert_eq!(store_of(with.clone(), Some(b"other")).s3.ca_certificates, b"other");
        with["objectStorage"]["caCert"] = json!("not base64!");
        assert!(read(with).unwrap_err().contains("base64 -w 0"));
    }

    #[test]
    fn what_cannot_work_is_refused_with_the_field_to_change() {
        let huawei = || spec("huawei", json!({"endpoint": "obs.x.example.com"}));
        let with = |path: &str, value: Value| {
            let mut spec = huawei();
            *spec.pointer_mut(path).unwrap() = value;
            spec
        };
        let mut mode = huawei();
        mode["accessMode"] = json!("Sometimes");
        let mut anonymous = huawei();
        anonymous["credential"] = Value::Null;
        let table = [
            (with("/provider", json!("azure")), "spec.provider 'azure'"),
            (spec("huawei", json!({})), "spec.config.endpoint is missing"),
            (spec("aws", json!({})), "spec.config.region is missing"),
            (spec("aws", json!({"region": "r", "insecureSkipTLSVerify": "true"})), "caCert"),
            (spec("aws", json!({"region": "r", "s3ForcePathStyle": "yes"})), "neither true"),
            (with("/config/endpoint", json!("ftp://x")), "https://"),
            (with("/config/endpoint", json!("bucket.obs.x.y")), "bucket's name"),
            (with("/objectStorage/bucket", json!("x")), "3 to 63"),
            (mode, "spec.accessMode"),
            (anonymous, "spec.credential is missing"),
        ];
        for (spec, part) in table {
            let why = read(spec.clone()).unwrap_err();
            assert!(why.contains(part) && !why.contains("hidden"), "{spec}: {why}");
        }
        let none = describe(&location(huawei()), Secrets::default()).unwrap_err();
        assert!(none.contains("Secret 's' in namespace 'velero'"), "{none}");
        let empty = Secrets { credential: Some(b"x"), ca: None };
        let why = describe(&location(huawei()), empty).unwrap_err();
        assert!(why.contains("HUAWEI_CLOUD_ACCESS_KEY_ID"), "{why}");
    }
}
