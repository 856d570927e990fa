//! The definitions of the custom resources, generated from their types. They are checked in as `deploy/crds/`;
//! `EBACKUP_BLESS=1 cargo test -p controller --lib crds` writes them.

use anyhow::{Context as _, Result};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps,
};
use kube::CustomResourceExt;

use crate::api::{BackupRepository, BackupStorageLocation, PodVolumeBackup, PodVolumeRestore};

/// All definitions.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    let all = [
        BackupRepository::crd(),
        BackupStorageLocation::crd(),
        PodVolumeBackup::crd(),
        PodVolumeRestore::crd(),
    ];
    all.into_iter().map(adapted).collect()
}

/// What the types cannot say: no status subresource, as in Velero, and no formats of numbers that Kubernetes
/// does not know.
fn adapted(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut crd.spec.versions {
        version.subresources = None;
        if let Some(schema) =
            version.schema.as_mut().and_then(|all| all.open_api_v3_schema.as_mut())
        {
            without_unknown_formats(schema);
        }
    }
    crd
}

fn without_unknown_formats(schema: &mut JSONSchemaProps) {
    let known = |format: &String| matches!(&**format, "int32" | "int64" | "date-time" | "byte");
    schema.format = schema.format.take().filter(known);
    for property in schema.properties.iter_mut().flat_map(|all| all.values_mut()) {
        without_unknown_formats(property);
    }
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
        JSONSchemaPropsOrArray as Items, JSONSchemaPropsOrBool as Additional,
    };
    match &mut schema.items {
        Some(Items::Schema(items)) => without_unknown_formats(items),
        Some(Items::Schemas(items)) => items.iter_mut().for_each(without_unknown_formats),
        None => {}
    }
    if let Some(Additional::Schema(additional)) = &mut schema.additional_properties {
        without_unknown_formats(additional);
    }
}

/// Name and content of each file in `deploy/crds`.
///
/// # Errors
/// When a definition cannot be written as YAML.
pub fn files() -> Result<Vec<(String, String)>> {
    let file = |crd: CustomResourceDefinition| {
        let name = format!("{}.yaml", crd.spec.names.plural);
        // By way of a value, which has no fields that are empty.
        let value = serde_json::to_value(&crd).context("cannot write a definition as JSON")?;
        let text = serde_saphyr::to_string(&value);
        let text =
            text.with_context(|| format!("cannot write the definition in {name} as YAML"))?;
        Ok((name, format!("---\n{}\n", text.trim_end())))
    };
    definitions().into_iter().map(file).collect()
}

/// All definitions as one YAML text.
///
/// # Errors
/// When a definition cannot be written as YAML.
pub fn crds() -> Result<String> {
    Ok(files()?.into_iter().map(|(_, text)| text).collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_checked_in_definitions_are_those_of_the_types() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
        let bless = std::env::var_os("EBACKUP_BLESS").is_some();
        for (name, text) in files().unwrap() {
            let path = folder.join(&name);
            if bless {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(&path, &text).unwrap();
            }
            let found = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(found == text, "{name} is not up to date: run with EBACKUP_BLESS=1");
        }
    }

    #[test]
    fn the_yaml_says_what_the_types_say() {
        for (crd, (name, text)) in definitions().iter().zip(files().unwrap()) {
            let back: CustomResourceDefinition = serde_saphyr::from_str(&text).unwrap();
            assert_eq!(&back, crd, "{name}");
        }
    }

    #[test]
    fn old_clusters_understand_them() {
        let text = crds().unwrap();
        for newer in ["x-kubernetes-validations", "selectableFields", "subresources", "uint"] {
            assert!(!text.contains(newer), "{newer}");
        }
        let table = [
            "caCert:",
            "caCertRef:",
            "snapshotID:",
            "backupSyncPeriod:",
            "recentMaintenance:",
            "incrementalBytes:",
            "uploaderSettings:",
            "parentSnapshot:",
            "snapshotSize:",
        ];
        for field in table {
            assert!(text.contains(field), "{field}");
        }
    }
}
