//! Shows how far several pulls are while they run: bars on a terminal, a line now and then elsewhere, or nothing.
//!
//! It writes to standard error, so that standard output holds results alone.

use std::cell::RefCell;
use std::io::{IsTerminal as _, Write as _};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::client::Transfer;

/// How often the bars are drawn: often enough to look alive, too seldom to cost anything.
const DRAW_EVERY: Duration = Duration::from_millis(100);

/// Without a terminal, a line is written each time a pull has passed another such share, in percent.
const LINE_EVERY_PERCENT: u64 = 25;

const TEMPLATE: &str = "{prefix:10} [{bar:40}] {bytes:>11} of {total_bytes:>11}  {binary_bytes_per_sec}";

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// A bar for each, redrawn in place.
    Bars,
    /// A line for each quarter.
    Lines,
    /// Not at all.
    Silent,
}

impl Style {
    /// Bars if standard error is a terminal, lines if not, nothing if `quiet`.
    #[must_use]
    pub fn choose(quiet: bool) -> Self {
        match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Self::Silent,
            (false, true) => Self::Bars,
            (false, false) => Self::Lines,
        }
    }
}

/// The progress of several pulls.
#[derive(Debug)]
pub struct Progress {
    rows: Vec<Row>,
    shown: Shown,
}

#[derive(Debug)]
struct Row {
    name: String,
    transfer: Arc<Transfer>,
}

#[derive(Debug)]
enum Shown {
    Bars(Vec<ProgressBar>),
    /// The share, in percent, that each pull had at its last line.
    Lines(RefCell<Vec<u64>>),
    Silent,
}

impl Progress {
    /// The progress of `pulls`, each with its name.
    #[must_use]
    pub fn new(style: Style, pulls: impl IntoIterator<Item = (String, Arc<Transfer>)>) -> Self {
        let rows: Vec<Row> = pulls.into_iter().map(|(name, transfer)| Row { name, transfer }).collect();
        let shown = match style {
            Style::Bars => Shown::Bars(bars(&rows)),
            Style::Lines => Shown::Lines(RefCell::new(vec![0; rows.len()])),
            Style::Silent => Shown::Silent,
        };
        Self { rows, shown }
    }

    /// Does `work` and shows the progress meanwhile, and once more at its end.
    pub async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        let mut ticks = tokio::time::interval(DRAW_EVERY);
        loop {
            tokio::select! {
                biased;
                done = &mut work => {
                    self.draw();
                    self.leave();
                    return done;
                }
                _ = ticks.tick() => self.draw(),
            }
        }
    }

    fn draw(&self) {
        match &self.shown {
            Shown::Bars(bars) => {
                for (row, bar) in self.rows.iter().zip(bars) {
                    bar.set_length(row.transfer.expected_bytes());
                    bar.set_position(row.transfer.done_bytes());
                }
            }
            Shown::Lines(last) => {
                for line in self.lines(&mut last.borrow_mut()) {
                    // Nobody reads it; the work goes on.
                    let _ = writeln!(std::io::stderr(), "{line}");
                }
            }
            Shown::Silent => {}
        }
    }

    /// Leaves the bars as they are.
    fn leave(&self) {
        if let Shown::Bars(bars) = &self.shown {
            bars.iter().for_each(ProgressBar::abandon);
        }
    }

    /// The lines that are due, given and updating what each pull had at its last.
    fn lines(&self, last: &mut [u64]) -> Vec<String> {
        let due = self.rows.iter().zip(last).filter_map(|(row, last)| {
            let share = percent(row.transfer.done_bytes(), row.transfer.expected_bytes());
            let share = share - share % LINE_EVERY_PERCENT;
            (share > *last).then(|| {
                *last = share;
                format!("{}: {share} %", row.name)
            })
        });
        due.collect()
    }
}

fn bars(rows: &[Row]) -> Vec<ProgressBar> {
    let all = MultiProgress::new();
    // The template is a constant; if it were wrong the default would do.
    let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = |row: &Row| all.add(ProgressBar::new(0).with_style(style.clone()).with_prefix(row.name.clone()));
    rows.iter().map(bar).collect()
}

fn percent(done: u64, of: u64) -> u64 {
    u64::try_from(u128::from(done) * 100 / u128::from(of.max(1))).unwrap_or(100).min(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_do_not_overflow() {
        assert_eq!(percent(0, 0), 0);
        assert_eq!(percent(1, 3), 33);
        assert_eq!(percent(u64::MAX, u64::MAX), 100);
        assert_eq!(percent(5, 4), 100);
    }

    #[tokio::test]
    async fn a_line_is_written_once_for_each_quarter() {
        let transfers: Vec<Arc<Transfer>> = (0..2).map(|_| Arc::default()).collect();
        let names = ["one".to_owned(), "two".to_owned()];
        let progress = Progress::new(Style::Lines, names.into_iter().zip(transfers.iter().cloned()));
        let mut last = vec![0; 2];
        assert!(progress.lines(&mut last).is_empty());
        transfers[0].expect(1000);
        transfers[0].add(240);
        assert!(progress.lines(&mut last).is_empty());
        transfers[0].add(300);
        transfers[1].expect(10);
        transfers[1].add(10);
        assert_eq!(progress.lines(&mut last), ["one: 50 %", "two: 100 %"]);
        assert!(progress.lines(&mut last).is_empty());
        for style in [Style::Bars, Style::Lines, Style::Silent] {
            let named = [("one".to_owned(), Arc::clone(&transfers[0]))];
            assert_eq!(Progress::new(style, named).during(async { 7 }).await, 7);
        }
    }
}
