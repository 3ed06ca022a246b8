//! How etcd is reached: its authority, our certificate, our user. All of it in files that are read at every connection.

use std::path::PathBuf;

use etcd_client::ConnectOptions;
use tls::client::Flags;
use tls::{ClientFiles, TlsError};

const FLAGS: Flags = Flags { ca: "--etcd-ca", cert: "--etcd-cert", key: "--etcd-key" };

/// Files and names, as given; the default is an etcd that asks for nothing.
#[derive(Debug, Clone, Default)]
pub struct EtcdAccess {
    /// Authorities that may have signed etcd's certificate.
    pub ca: Option<PathBuf>,
    /// Our certificate chain and key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// A user of etcd, and the file with its password.
    pub user: Option<(String, PathBuf)>,
}

/// Why etcd cannot be reached with these settings.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// A file.
    #[error(transparent)]
    File(#[from] TlsError),
    /// Settings that contradict each other.
    #[error("{0}")]
    Settings(String),
}

impl EtcdAccess {
    /// Refuses what could never work, before anything else is started.
    pub fn check(&self, endpoints: &[String]) -> Result<(), AccessError> {
        let refuse = |why: String| Err(AccessError::Settings(why));
        for endpoint in endpoints {
            let encrypted = endpoint.starts_with("https://");
            if encrypted && self.ca.is_none() {
                return refuse(format!(
                    "--etcd {endpoint}: needs --etcd-ca FILE, the authority that signed etcd's certificate"
                ));
            }
            if endpoint.starts_with("http://") && self.ca.is_some() {
                return refuse(format!("--etcd-ca: but --etcd {endpoint} is not encrypted; write https://"));
            }
        }
        if self.identity.is_some() && self.ca.is_none() {
            return refuse("--etcd-cert: needs --etcd-ca and https:// endpoints".to_owned());
        }
        if self.user.is_some() && self.ca.is_none() {
            tracing::warn!("--etcd-user without --etcd-ca: the password crosses the network in plain text");
        }
        self.apply(ConnectOptions::new()).map(drop)
    }

    /// What a closed connection may mean: with TLS 1.3 a server refuses our certificate only after the handshake, and
    /// its reason may be lost with the connection.
    pub(crate) fn hint(&self, reason: &str) -> &'static str {
        let closed = ["closed", "reset", "broken pipe", "alert"].iter().any(|word| reason.contains(word));
        match (&self.ca, &self.identity) {
            (Some(_), Some(_)) if closed => {
                "; etcd may not accept the certificate of --etcd-cert, its log says why"
            }
            (Some(_), None) if closed => "; etcd may want a client certificate: --etcd-cert and --etcd-key",
            _ => "",
        }
    }

    /// Adds it to a connection's options, from the files as they are now.
    pub(crate) fn apply(&self, options: ConnectOptions) -> Result<ConnectOptions, AccessError> {
        let mut options = options;
        if let Some(ca) = &self.ca {
            let files = ClientFiles { flags: FLAGS, ca: ca.clone(), identity: self.identity.clone() };
            options = options.with_tls(files.read()?);
        }
        if let Some((user, password)) = &self.user {
            let password = tls::secret::line("--etcd-password-file", password)?;
            // Tokens expire when unused (5 minutes unless configured), and all of them when etcd restarts.
            options = options.with_user(user, password).with_auto_token_refresh(true);
        }
        Ok(options)
    }
}
