//! Certificates of the cluster, and API keys.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};

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

/// Where a client finds its API key. Never on the command line: anybody on the machine can read that.
#[derive(Debug, Clone, Default, Args)]
pub struct ApiKeyArgs {
    /// File with our API key on one line, where the router wants one; or the key itself in the variable TANDEM_API_KEY
    #[arg(long, env = "TANDEM_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,
}

impl ApiKeyArgs {
    /// The key, if there is one.
    pub fn key(&self) -> anyhow::Result<Option<String>> {
        if let Some(file) = &self.api_key_file {
            return tls::secret::line("--api-key-file", file).map(Some).context("the API key");
        }
        match std::env::var("TANDEM_API_KEY") {
            Ok(key) => Ok(Some(key).filter(|key| !key.is_empty())),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(_) => bail!("TANDEM_API_KEY: is not UTF-8"),
        }
    }
}

/// Settings of `key`.
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// What to do
    #[command(subcommand)]
    pub command: KeyCommand,
}

/// The tools for API keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key: prints it once, and the line for the router's file of keys, which holds only a hash
    New {
        /// Who gets it: letters, digits and -_.@
        name: String,
        /// Write the key to this new file, readable by its owner only, instead of printing it
        #[arg(long)]
        out: Option<PathBuf>,
    },
}
