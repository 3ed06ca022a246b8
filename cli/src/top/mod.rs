//! `tandem top`: both pools live, in a terminal.

mod view;

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::bail;
use proto::v1;
use proto::v1::operator_client::OperatorClient;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;

use crate::args::{StatusArgs, TopArgs};
use crate::{dial, status};
use view::Column;

/// How long one look for a key takes, and so how long the end may wait for it.
const KEY_POLL: Duration = Duration::from_millis(100);

/// What is on the screen.
struct Screen {
    address: String,
    status: Option<v1::ClusterStatus>,
    /// Why the last look failed.
    error: Option<String>,
    sort: Column,
    reversed: bool,
}

/// Shows the cluster until q, Esc or Ctrl-C.
pub async fn run(args: TopArgs) -> anyhow::Result<()> {
    if args.json {
        return status::run(StatusArgs { addr: args.addr, dial: args.dial, json: true }).await;
    }
    if !(0.2..=60.0).contains(&args.every) {
        bail!("--every: {} is not between 0.2 and 60 seconds", args.every);
    }
    if !std::io::stdout().is_terminal() {
        bail!("top needs a terminal; `tandem status` prints once, --json for scripts");
    }
    let client = OperatorClient::new(dial::router(&args.addr, &args.dial).await?);
    let mut terminal = ratatui::try_init()?;
    let ended = show(&mut terminal, client, args).await;
    ratatui::restore();
    ended
}

async fn show(
    terminal: &mut ratatui::DefaultTerminal,
    mut client: OperatorClient<dial::Channel>,
    args: TopArgs,
) -> anyhow::Result<()> {
    let mut keys = keys();
    let mut tick = tokio::time::interval(Duration::from_secs_f64(args.every));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut screen =
        Screen { address: args.addr, status: None, error: None, sort: Column::Worker, reversed: false };
    loop {
        terminal.draw(|frame| view::draw(frame, &screen))?;
        tokio::select! {
            _ = tick.tick() => match status::fetch(&mut client).await {
                Ok(status) => (screen.status, screen.error) = (Some(status), None),
                // The last picture stays; the channel connects again by itself.
                Err(error) => screen.error = Some(format!("{error:#}")),
            },
            key = keys.recv() => match key {
                None | Some(KeyCode::Char('q') | KeyCode::Esc) => return Ok(()),
                Some(KeyCode::Char('r')) => screen.reversed = !screen.reversed,
                Some(KeyCode::Char('s') | KeyCode::Right) => screen.sort = screen.sort.next(1),
                Some(KeyCode::Left) => screen.sort = screen.sort.next(Column::ALL.len() - 1),
                Some(_) => {}
            },
        }
    }
}

/// Keys as they are pressed; nothing more when the terminal is gone or Ctrl-C came.
fn keys() -> mpsc::Receiver<KeyCode> {
    let (pressed, keys) = mpsc::channel(16);
    tokio::task::spawn_blocking(move || {
        while !pressed.is_closed() {
            match event::poll(KEY_POLL) {
                Ok(false) => continue,
                Ok(true) => {}
                Err(_) => return,
            }
            match event::read() {
                Ok(Event::Key(key)) if key.kind == KeyEventKind::Release => {}
                Ok(Event::Key(key))
                    if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) =>
                {
                    return;
                }
                Ok(Event::Key(key)) if pressed.blocking_send(key.code).is_err() => return,
                // A changed size is drawn at once.
                Ok(Event::Resize(..)) if pressed.blocking_send(KeyCode::Null).is_err() => return,
                Ok(_) => {}
                Err(_) => return,
            }
        }
    });
    keys
}
