//! `tandem`: one binary for every process of a cluster, its clients and its tools.

mod args;
mod bench;
mod bench_serve;
mod check;
mod completions;
mod cpus;
mod dial;
mod doctor;
mod drain;
mod engines;
mod exit;
mod generate;
mod key;
mod kv;
mod local;
mod model;
mod plan;
mod prompts;
mod report;
mod role;
mod roofline;
mod serve;
mod settings;
mod signal;
mod simulate;
mod status;
mod top;
mod trace;

use cluster::Role;

use args::Command;
use cpus::Cpus;

fn main() -> std::process::ExitCode {
    let settings = match settings::parse(std::env::args_os().collect()) {
        Ok(settings) => settings,
        Err(error) => {
            exit::report(&error);
            return std::process::ExitCode::from(2);
        }
    };
    let cli = settings.cli;
    init_logs(&cli.log, cli.log_json);
    raise_open_files();
    failpoints::setup();
    // Before there are threads: they inherit it.
    if let Some(Err(error)) = cli.command.cpus().map(Cpus::keep_to) {
        return exit::report(&error);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::report(&anyhow::anyhow!("cannot start: {error}")),
    };
    let done = runtime.block_on(async {
        if cli.check_config {
            return check::run(&cli.command, &settings.effective).await;
        }
        match cli.command {
            Command::Up(args) => local::up(args).await,
            Command::Router(args) => serve::router(args).await,
            Command::Prefill(args) => serve::worker(args, Role::Prefill).await,
            Command::Decode(args) => serve::worker(args, Role::Decode).await,
            Command::Worker(args) => role::worker(args).await,
            Command::Role(args) => role::run(args).await,
            Command::Generate(args) => generate::run(args).await,
            Command::Drain(args) => drain::run(args, true).await,
            Command::Undrain(args) => drain::run(args, false).await,
            Command::Status(args) => status::run(args).await,
            Command::Top(args) => top::run(args).await,
            Command::Model(args) => model::run(args).await,
            Command::Key(args) => key::run(args),
            Command::Bench(args) => bench::run(args).await,
            Command::Roofline(args) => roofline::run(&args),
            Command::Sim(args) => simulate::run(args).await,
            Command::Doctor(args) => doctor::run(args).await,
            Command::Plan(args) => plan::run(args).await,
            Command::Planner(args) => plan::serve(args).await,
            Command::Completions { shell } => completions::print(shell),
            Command::Man { out } => completions::man(&out),
        }
    });
    // Threads that compute or resolve names may outlast the work; nobody waits for them.
    runtime.shutdown_background();
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}

/// As many connections as this process may have: the usual 1024 files are few for a router, and idle clients would fill them.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, current = ?limit.current, "the limit of open files stays");
    }
}

fn init_logs(filter: &str, json: bool) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let logs = logs.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    if json {
        logs.json().init();
    } else {
        logs.with_target(false).compact().init();
    }
}
