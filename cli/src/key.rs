//! `tandem key`: API keys. A key is shown once; what the router keeps is its hash.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, bail};

use crate::args::{KeyArgs, KeyCommand};

/// Runs the command.
pub fn run(args: KeyArgs) -> anyhow::Result<()> {
    let KeyCommand::New { name, out } = args.command;
    if !router::keys::is_name(&name) {
        bail!("NAME: letters, digits and -_.@, 1 to 64 of them");
    }
    // From the operating system's seeded generator.
    let (key, hash) = router::keys::make(rand::random());
    match out {
        Some(file) => {
            write(&file, &key)?;
            println!("The key is in {}, readable by its owner only.", file.display());
        }
        None => println!(
            "The key, shown this once; its owner sends it as `Authorization: Bearer KEY`:\n\n{key}\n"
        ),
    }
    println!(
        "Add this line to the router's --api-keys file; it is read again by itself. Limits, each optional:"
    );
    println!("requests_per_minute=N tokens_per_minute=N concurrent=N weight=N operator\n");
    println!("{name} sha256:{hash}");
    Ok(())
}

fn write(file: &Path, key: &str) -> anyhow::Result<()> {
    let opened = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    let mut opened = opened.with_context(|| format!("--out: cannot make {}", file.display()))?;
    writeln!(opened, "{key}").with_context(|| format!("--out {}", file.display()))
}
