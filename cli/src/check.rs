//! `--check-config`: everything about a process that can be found wrong without starting it.

use anyhow::bail;
use cluster::Role;

use crate::args::{Command, EngineArgs, ModelChoice, RoleChoice, Strategy, WorkerArgs};
use crate::{engines, model, plan, serve};

/// Says what is in force and why, then whether it can work. Nothing is bound, joined or changed.
pub async fn run(command: &Command, effective: &[(String, String, String)]) -> anyhow::Result<()> {
    match command {
        Command::Router(_)
        | Command::Prefill(_)
        | Command::Decode(_)
        | Command::Worker(_)
        | Command::Planner(_)
        | Command::Up(_) => {}
        _ => bail!("--check-config: is for router, prefill, decode, worker, planner and up"),
    }
    let width = effective.iter().map(|(key, ..)| key.len()).max().unwrap_or(0);
    for (key, value, source) in effective {
        println!("{key:width$}  {value}  ({source})");
    }
    match command {
        Command::Router(args) => serve::check_router(args).await?,
        Command::Prefill(args) => worker(args, &[Role::Prefill])?,
        Command::Decode(args) => worker(args, &[Role::Decode])?,
        Command::Worker(args) => match args.role {
            RoleChoice::Prefill => worker(&args.worker, &[Role::Prefill])?,
            RoleChoice::Decode => worker(&args.worker, &[Role::Decode])?,
            RoleChoice::Auto => worker(&args.worker, &[Role::Prefill, Role::Decode])?,
        },
        Command::Planner(args) => plan::check(args)?,
        Command::Up(args) => {
            engine(&args.model, &args.engine, args.placement.strategy, &[Role::Prefill, Role::Decode])?
        }
        _ => {}
    }
    println!("ok: can be started");
    Ok(())
}

fn worker(args: &WorkerArgs, roles: &[Role]) -> anyhow::Result<()> {
    serve::check_worker(args)?;
    engine(&args.model, &args.engine, args.strategy, roles)
}

fn engine(choice: &ModelChoice, args: &EngineArgs, strategy: Strategy, roles: &[Role]) -> anyhow::Result<()> {
    let dir = model::folder(choice)?;
    for role in roles {
        engines::plan(&dir, args, serve::step_tokens(args, *role, strategy))?;
    }
    Ok(())
}
