//! How long certificates last, by the plane that they serve: for an alarm before they end.

use std::path::{Path, PathBuf};

use crate::pem;

/// The files of a process's planes.
#[derive(Debug, Clone, Default)]
pub struct Expiry(Vec<(&'static str, Vec<PathBuf>, Option<PathBuf>)>);

impl Expiry {
    /// Every plane there is.
    pub const PLANES: [&'static str; 3] = ["clients", "cluster", "etcd"];

    /// One more plane, if it has a certificate: its chain, and the authorities it trusts.
    #[must_use]
    pub fn with(mut self, plane: &'static str, chain: Option<&Path>, authorities: Option<&Path>) -> Self {
        if chain.is_some() || authorities.is_some() {
            self.0.push((
                plane,
                chain.map(Path::to_owned).into_iter().collect(),
                authorities.map(Path::to_owned),
            ));
        }
        self
    }

    /// Seconds until the plane's files, as they are now, serve no more: negative when they have ended, 0 when they cannot
    /// be read, infinite when the plane has none.
    pub fn seconds_left(&self, plane: &str) -> f64 {
        let of = self.0.iter().filter(|(name, ..)| *name == plane);
        of.flat_map(|(_, chain, authorities)| {
            let chain = chain.iter().map(|path| pem::seconds_left(path, f64::min));
            // Of several authorities the last one counts: a rotation keeps the old one for a time.
            chain.chain(authorities.iter().map(|path| pem::seconds_left(path, f64::max)))
        })
        .fold(f64::INFINITY, f64::min)
    }
}
