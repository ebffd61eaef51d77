//! What is written down at the API server for others to read: annotations of pods, which the autoscalers of nodes go
//! by, and Events of the Deployment. Beside the watch and the scaling, so that a slow write holds up neither.
//!
//! Needs, beyond what [`super`] says: `events` create, in `events.k8s.io`.

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;

use super::*;
use crate::provision::{Note, Unwritten, Writing};

/// cluster-autoscaler removes no node with a pod that says `false`, and karpenter none with one that says `true` here.
const SAFE_TO_EVICT: &str = "cluster-autoscaler.kubernetes.io/safe-to-evict";
const DO_NOT_DISRUPT: &str = "karpenter.sh/do-not-disrupt";
/// Who reports, in Events.
const CONTROLLER: &str = "dindpool.io/dindpool";
/// The longest note of an Event, in bytes (the API server's own limit).
const LONGEST: usize = 1024;

pub(super) struct Notes {
    pub pods: Api<Pod>,
    pub events: Api<Event>,
    pub deployments: Api<Deployment>,
    pub deployment: String,
    pub namespace: String,
}

impl Notes {
    /// Writes what comes, one after the other, until nobody sends any more.
    pub async fn run(self, mut notes: mpsc::Receiver<Writing>) {
        // What `kubectl describe deployment` finds its Events by.
        let mut uid = None;
        while let Some(Writing { note, done }) = notes.recv().await {
            let written = timeout(PATIENCE, self.write(&note, &mut uid)).await;
            let _ = done.send(match written {
                Ok(Ok(())) => Ok(()),
                Ok(Err(kube::Error::Api(status))) if status.code == 403 => {
                    Err(Unwritten::Forbidden(status.message.clone()))
                }
                Ok(Err(error)) => Err(Unwritten::Failed(error.to_string())),
                Err(_) => Err(Unwritten::Failed("the API server does not answer".into())),
            });
        }
    }

    async fn write(&self, note: &Note, uid: &mut Option<String>) -> Result<(), kube::Error> {
        match note {
            Note::Mark { daemon, busy } => {
                let annotations = serde_json::json!({
                    SAFE_TO_EVICT: (!busy).to_string(),
                    DO_NOT_DISRUPT: busy.to_string(),
                });
                let patch = serde_json::json!({ "metadata": { "annotations": annotations } });
                let params = PatchParams::default();
                match self.pods.patch_metadata(daemon.as_str(), &params, &Patch::Merge(patch)).await {
                    // It has gone meanwhile.
                    Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
                    patched => patched.map(drop),
                }
            }
            Note::Word { reason, warning, text } => {
                if uid.is_none() {
                    *uid = self.deployments.get_scale(&self.deployment).await?.metadata.uid;
                }
                let event = self.event(reason, *warning, text, uid.clone());
                self.events.create(&PostParams::default(), &event).await.map(drop)
            }
        }
    }

    fn event(&self, reason: &str, warning: bool, text: &str, uid: Option<String>) -> Event {
        let end = (0..=LONGEST.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        Event {
            metadata: ObjectMeta {
                // The generated name is validated as a prefix, too: no dot at its end.
                generate_name: Some(format!("{}-", self.deployment)),
                namespace: Some(self.namespace.clone()),
                ..ObjectMeta::default()
            },
            // A date to show; nothing is decided by it.
            event_time: Some(MicroTime(Timestamp::now())),
            action: Some("Scale".into()),
            reason: Some(reason.into()),
            note: Some(text[..end].to_string()),
            type_: Some(if warning { "Warning" } else { "Normal" }.into()),
            regarding: Some(ObjectReference {
                api_version: Some("apps/v1".into()),
                kind: Some("Deployment".into()),
                name: Some(self.deployment.clone()),
                namespace: Some(self.namespace.clone()),
                uid,
                ..ObjectReference::default()
            }),
            reporting_controller: Some(CONTROLLER.into()),
            reporting_instance: Some(format!("dindpool-{}", std::process::id())),
            ..Event::default()
        }
    }
}
