//! `tandem completions` and `tandem man`: from the same definitions as `--help`.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;

/// A completion script for the shell, to standard output.
pub fn print(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tandem", &mut script);
    use std::io::Write;
    std::io::stdout().write_all(&script).context("cannot write the script")
}

/// tandem.1, and a page for each command, into a folder.
pub fn man(out: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    clap_mangen::generate_to(Cli::command(), out)
        .with_context(|| format!("cannot write into {}", out.display()))?;
    println!("{} pages in {}", std::fs::read_dir(out)?.count(), out.display());
    Ok(())
}
