//! Secrets in files: a command line is for everybody on the machine to read.

use std::path::Path;

use crate::pem::{TlsError, read};

/// The one line of a file, without the end of the line.
pub fn line(flag: &'static str, path: &Path) -> Result<String, TlsError> {
    let text = String::from_utf8(read(flag, path)?)
        .map_err(|_| TlsError::wrong(flag, path, "is not UTF-8 text; it must hold the secret on one line"))?;
    let text = text.trim_end_matches(['\r', '\n']);
    if text.is_empty() {
        return Err(TlsError::wrong(flag, path, "is empty; it must hold the secret on one line"));
    }
    if text.contains('\n') {
        return Err(TlsError::wrong(flag, path, "has several lines; it must hold the secret on one line"));
    }
    Ok(text.to_owned())
}
