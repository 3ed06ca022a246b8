//! What `top` draws.

use std::cmp::Ordering;

use proto::v1::{ClusterStatus, Moment, Pair, WorkerStatus};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Sparkline, Table, Wrap};

use super::Screen;
use crate::status::{bytes, headline, kv_in_use, rates, rates_line};

const METER: usize = 10;

/// What workers are sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    Worker,
    State,
    Running,
    Waiting,
    Queued,
    Kv,
    Speed,
}

impl Column {
    /// From left to right.
    pub const ALL: [Self; 7] =
        [Self::Worker, Self::State, Self::Running, Self::Waiting, Self::Queued, Self::Kv, Self::Speed];

    /// The column that many steps to the right, round the end.
    pub fn next(self, steps: usize) -> Self {
        let at = Self::ALL.iter().position(|column| *column == self).unwrap_or(0);
        Self::ALL[(at + steps) % Self::ALL.len()]
    }

    fn title(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::State => "state",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Queued => "queued tok",
            Self::Kv => "KV in use",
            Self::Speed => "tok/s",
        }
    }

    fn compare(self, a: &WorkerStatus, b: &WorkerStatus) -> Ordering {
        match self {
            Self::Worker => a.worker.cmp(&b.worker),
            Self::State => a.state.cmp(&b.state),
            Self::Running => b.running.cmp(&a.running),
            Self::Waiting => b.waiting.cmp(&a.waiting),
            Self::Queued => b.queued_tokens.cmp(&a.queued_tokens),
            Self::Kv => kv_in_use(b).total_cmp(&kv_in_use(a)),
            Self::Speed => b.tokens_per_second.total_cmp(&a.tokens_per_second),
        }
    }
}

/// The whole screen.
pub fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let Some(status) = &screen.status else {
        let text = screen.error.clone().unwrap_or_else(|| format!("asking {} …", screen.address));
        frame.render_widget(Paragraph::new(text), frame.area());
        return;
    };
    let pool = |role: &str| status.workers.iter().filter(|w| w.role == role).count() as u16 + 3;
    let areas = Layout::vertical([
        Constraint::Length(3),
        Constraint::Length(4),
        Constraint::Length(pool("prefill")),
        Constraint::Length(pool("decode")),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .split(frame.area());
    let head = vec![
        Line::from(format!("Tandem · {}", headline(status))).bold(),
        Line::from(rates_line(&rates(status, 60.0), status)),
    ];
    frame.render_widget(Paragraph::new(head).wrap(Wrap { trim: true }), areas[0]);
    draw_plots(frame, areas[1], status);
    draw_pool(frame, areas[2], screen, status, "prefill", Color::Blue);
    draw_pool(frame, areas[3], screen, status, "decode", Color::Cyan);
    draw_pairs(frame, areas[4], &status.pairs);
    let foot = match &screen.error {
        Some(error) => Line::from(format!("{}: {error}", screen.address)).red(),
        None => Line::from(format!(
            "q quit · s or ←→ sort by {} · r reverse · {}",
            screen.sort.title(),
            screen.address
        ))
        .dim(),
    };
    frame.render_widget(Paragraph::new(foot), areas[5]);
}

/// Ten minutes of a few rates, the newest on the right.
fn draw_plots(frame: &mut Frame<'_>, area: Rect, status: &ClusterStatus) {
    type Of = fn(&Moment) -> f64;
    let plots: [(&str, Of, Color); 4] = [
        ("requests", |m| f64::from(m.ended), Color::White),
        ("prompt tokens", |m| m.prompt_tokens as f64, Color::Blue),
        ("output tokens", |m| m.output_tokens as f64, Color::Cyan),
        ("TTFT, ms", |m| m.ttft_mean_ms, Color::Yellow),
    ];
    let areas = Layout::horizontal([Constraint::Ratio(1, 4); 4]).split(area);
    for ((title, of, color), area) in plots.iter().zip(areas.iter()) {
        let width = usize::from(area.width.saturating_sub(2));
        let from = status.history.len().saturating_sub(width);
        let data: Vec<u64> = status.history[from..].iter().map(|m| of(m).round() as u64).collect();
        let most = data.iter().max().copied().unwrap_or(0);
        let block =
            Block::bordered().title(format!("{title}, at most {most}")).border_style(Style::new().dim());
        frame.render_widget(Sparkline::default().block(block).data(&data).style(*color), *area);
    }
}

fn draw_pool(
    frame: &mut Frame<'_>,
    area: Rect,
    screen: &Screen,
    status: &ClusterStatus,
    role: &str,
    color: Color,
) {
    let mut workers: Vec<&WorkerStatus> = status.workers.iter().filter(|w| w.role == role).collect();
    workers.sort_by(|a, b| screen.sort.compare(a, b).then_with(|| a.worker.cmp(&b.worker)));
    if screen.reversed {
        workers.reverse();
    }
    let titles = Column::ALL.iter().map(|column| {
        let title = Span::from(column.title());
        Cell::from(if *column == screen.sort { title.underlined() } else { title.dim() })
    });
    let head = Row::new(
        titles.chain([Cell::from(Span::from("transports").dim()), Cell::from(Span::from("address").dim())]),
    );
    let widths = [
        Constraint::Min(14),
        Constraint::Length(9),
        Constraint::Length(8),
        Constraint::Length(8),
        Constraint::Length(11),
        Constraint::Length(METER as u16 + 6),
        Constraint::Length(9),
        Constraint::Length(11),
        Constraint::Min(15),
    ];
    let table = Table::new(workers.iter().map(|w| row(w, color)), widths).header(head).block(
        Block::bordered().title(format!("{role}: {}", workers.len())).border_style(Style::new().fg(color)),
    );
    frame.render_widget(table, area);
}

fn row(w: &WorkerStatus, color: Color) -> Row<'static> {
    let state = match w.state.as_str() {
        "ready" => Color::Green,
        "draining" => Color::Yellow,
        _ => Color::Red,
    };
    let used = kv_in_use(w);
    let full = (used * METER as f64).round() as usize;
    let meter = Line::from(vec![
        Span::from("█".repeat(full)).fg(color),
        Span::from("░".repeat(METER - full)).dim(),
        Span::from(format!(" {:>3.0}%", used * 100.0)),
    ]);
    Row::new(vec![
        Cell::from(w.worker.clone()),
        Cell::from(Span::from(w.state.clone()).fg(state)),
        Cell::from(w.running.to_string()),
        Cell::from(w.waiting.to_string()),
        Cell::from(w.queued_tokens.to_string()),
        Cell::from(meter),
        Cell::from(format!("{:.1}", w.tokens_per_second)),
        Cell::from(w.transports.join(",")),
        Cell::from(w.address.clone()),
    ])
}

fn draw_pairs(frame: &mut Frame<'_>, area: Rect, pairs: &[Pair]) {
    let mut pairs: Vec<&Pair> = pairs.iter().collect();
    pairs.sort_by_key(|pair| std::cmp::Reverse(pair.bytes));
    let rows = pairs.iter().map(|p| {
        Row::new(vec![
            format!("{} → {}", p.from, p.to),
            p.requests.to_string(),
            bytes(p.bytes as f64),
            p.transport.clone(),
            format!("{:.1} ms", p.exposed_ms),
        ])
    });
    let head = Row::new(["from → to", "requests", "bytes", "over", "exposed"]).dim();
    let widths = [
        Constraint::Min(24),
        Constraint::Length(10),
        Constraint::Length(12),
        Constraint::Length(8),
        Constraint::Length(10),
    ];
    let block = Block::bordered().title("KV moved").border_style(Style::new().dim());
    frame.render_widget(Table::new(rows, widths).header(head).block(block), area);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn worker(name: &str, role: &str, running: u32) -> WorkerStatus {
        WorkerStatus {
            worker: name.into(),
            role: role.into(),
            state: "ready".into(),
            running,
            total_blocks: 100,
            free_blocks: 25,
            ..Default::default()
        }
    }

    fn drawn(screen: &Screen, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, screen)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn both_pools_sorted_and_any_size_of_terminal() {
        let workers =
            vec![worker("d-0", "decode", 1), worker("d-1", "decode", 9), worker("p-0", "prefill", 0)];
        let status = ClusterStatus { model: "tiny".into(), workers, ..Default::default() };
        let mut screen = Screen {
            address: "here:1".into(),
            status: Some(status),
            error: None,
            sort: Column::Running,
            reversed: false,
        };
        let text = drawn(&screen, 140, 30);
        assert!(text.contains("prefill: 1") && text.contains("decode: 2") && text.contains("75%"), "{text}");
        assert!(text.find("d-1").unwrap() < text.find("d-0").unwrap(), "{text}");
        screen.reversed = true;
        let text = drawn(&screen, 140, 30);
        assert!(text.find("d-0").unwrap() < text.find("d-1").unwrap(), "{text}");
        screen.error = Some("gone".into());
        assert!(drawn(&screen, 140, 30).contains("here:1: gone"));
        for (width, height) in [(1, 1), (20, 5), (80, 24), (300, 100)] {
            drawn(&screen, width, height);
        }
        assert_eq!(Column::Worker.next(Column::ALL.len() - 1), Column::Speed);
    }
}
