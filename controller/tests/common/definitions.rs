//! Installs the custom resource definitions in the tests' API server.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::conditions::is_crd_established;
use kube::runtime::wait::await_condition;
use kube::{Client, ResourceExt};

/// Installs them, and waits until they can be used.
pub(crate) async fn install(client: &Client) {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for crd in controller::crds::definitions() {
        let params = PatchParams::apply("ebackup-tests").force();
        api.patch(&crd.name_any(), &params, &Patch::Apply(&crd)).await.unwrap();
        let name = crd.name_any();
        let established = await_condition(api.clone(), &name, is_crd_established());
        let bound = std::time::Duration::from_secs(60);
        tokio::time::timeout(bound, established).await.expect("it is established").unwrap();
    }
}
