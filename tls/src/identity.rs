//! Who a certificate speaks for inside the cluster: URIs among its subject alternative names.
//!
//! `tandem://router` is a router, `tandem://worker/NAME` the worker of that name; a NAME that ends in `*` is every worker
//! whose name begins so. Addresses and host names do not count: pods change theirs, names stay.

use std::fmt;

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

const ROUTER: &str = "tandem://router";
const WORKER: &str = "tandem://worker/";

/// A part of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A router; they have no names.
    Router,
    /// The worker of that name.
    Worker(String),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Router => f.write_str(ROUTER),
            Self::Worker(name) => write!(f, "{WORKER}{name}"),
        }
    }
}

/// The names in one certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names(Vec<String>);

impl Names {
    /// Those of a certificate that was verified; none when there are none.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return Self::default() };
        let Ok(Some(extension)) = parsed.subject_alternative_name() else { return Self::default() };
        let uri = |name: &GeneralName<'_>| match name {
            GeneralName::URI(uri) if uri.starts_with("tandem://") => Some((*uri).to_owned()),
            _ => None,
        };
        Self(extension.value.general_names.iter().filter_map(uri).collect())
    }

    /// Whether it may speak for that part.
    pub fn cover(&self, part: &Part) -> bool {
        match part {
            Part::Router => self.0.iter().any(|uri| uri == ROUTER),
            Part::Worker(wanted) => {
                let covers = |name: &str| match name.strip_suffix('*') {
                    Some(beginning) => wanted.starts_with(beginning),
                    None => wanted == name,
                };
                self.0.iter().filter_map(|uri| uri.strip_prefix(WORKER)).any(covers)
            }
        }
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no tandem:// name at all");
        }
        f.write_str(&self.0.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(uris: &[&str]) -> Names {
        Names(uris.iter().map(|uri| (*uri).to_owned()).collect())
    }

    #[test]
    fn a_name_covers_itself_and_a_pattern_what_begins_so() {
        let worker = |name: &str| Part::Worker(name.into());
        let one = names(&["tandem://worker/p-1"]);
        assert!(one.cover(&worker("p-1")));
        assert!(!one.cover(&worker("p-12")) && !one.cover(&worker("p")) && !one.cover(&Part::Router));
        let pool = names(&["tandem://worker/p-*"]);
        assert!(pool.cover(&worker("p-1")) && pool.cover(&worker("p-")) && !pool.cover(&worker("q-1")));
        let all = names(&["tandem://router", "tandem://worker/*"]);
        assert!(all.cover(&Part::Router) && all.cover(&worker("anything")));
        let none = names(&[]);
        assert!(!none.cover(&Part::Router) && !none.cover(&worker("")));
        assert!(!names(&["tandem://router/x"]).cover(&Part::Router));
    }
}
