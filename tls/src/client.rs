//! The side that connects.

use std::path::PathBuf;

use tonic::transport::{Certificate, ClientTlsConfig};

use crate::pem::{self, Identity, TlsError};

/// Names of the flags, for messages.
#[derive(Debug, Clone, Copy)]
pub struct Flags {
    /// The authority's.
    pub ca: &'static str,
    /// The certificate's.
    pub cert: &'static str,
    /// The key's.
    pub key: &'static str,
}

/// Whom to trust and who we are.
#[derive(Debug, Clone)]
pub struct ClientFiles {
    /// What messages call the files.
    pub flags: Flags,
    /// Certificates of the authorities that may have signed the server's.
    pub ca: PathBuf,
    /// Our certificate chain and key, where the server wants one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl ClientFiles {
    /// Reads and checks the files as they are now.
    pub fn read(&self) -> Result<ClientTlsConfig, TlsError> {
        pem::certificates(self.flags.ca, &self.ca)?;
        let ca = Certificate::from_pem(pem::read(self.flags.ca, &self.ca)?);
        let config = ClientTlsConfig::new().ca_certificate(ca);
        let Some((cert, key)) = &self.identity else { return Ok(config) };
        let identity = Identity::read([self.flags.cert, self.flags.key], cert, key)?;
        Ok(config.identity(tonic::transport::Identity::from_pem(identity.chain_pem, identity.key_pem)))
    }
}
