//! Certificates of the cluster.

use std::path::PathBuf;

use clap::Args;

/// Mutual TLS between router and workers, on every plane. The files are read again when they change.
#[derive(Debug, Clone, Default, Args)]
pub struct ClusterTlsArgs {
    /// Our certificate chain (PEM) towards other parts of the cluster: URI:tandem://router or URI:tandem://worker/NAME (NAME may
    /// end in *) among its subject alternative names; calls, joins and KV over TCP are then encrypted
    #[arg(long, env = "TANDEM_CLUSTER_CERT", requires_all = ["cluster_key", "cluster_ca"])]
    pub cluster_cert: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, env = "TANDEM_CLUSTER_KEY", requires = "cluster_cert")]
    pub cluster_key: Option<PathBuf>,
    /// Authorities (PEM) that may have signed the others' certificates; no one else is talked to
    #[arg(long, env = "TANDEM_CLUSTER_CA", requires = "cluster_cert")]
    pub cluster_ca: Option<PathBuf>,
}

impl ClusterTlsArgs {
    /// How long they last, beside others.
    pub fn expiry(&self, expiry: tls::Expiry) -> tls::Expiry {
        expiry.with("cluster", self.cluster_cert.as_deref(), self.cluster_ca.as_deref())
    }

    /// The same as files, where there are any.
    pub fn files(&self) -> Option<tls::ClusterFiles> {
        let (cert, key) = self.cluster_cert.clone().zip(self.cluster_key.clone())?;
        Some(tls::ClusterFiles { cert, key, ca: self.cluster_ca.clone()? })
    }
}
