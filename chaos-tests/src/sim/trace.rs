//! A record of a run: what was asked for, what was drawn, and every event, a line each. Played again it is compared line by
//! line, so a run that goes another way than it did stops at the first event that differs.

use std::io::{BufRead, Write};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::agenda::{Nanos, SECOND};
use super::event::{Event, NodeNumber};
use super::plan::Plan;
use super::report::Report;
use super::scenario::Scenario;
use super::world::World;

/// The first line of a record.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    /// What was asked for.
    scenario: Scenario,
    /// What was drawn from its seed: who begins when, who is slow, who dies.
    plan: Plan,
}

/// Which events are shown while a record is played again.
#[derive(Clone, Copy, Debug, Default)]
pub struct Filter {
    /// Only those of this node.
    pub node: Option<NodeNumber>,
    /// Only from this second on.
    pub from: f64,
    /// Nothing after this second.
    pub until: Option<f64>,
}

impl Filter {
    fn shows(&self, at: Nanos, event: &Event) -> bool {
        let second = at as f64 / SECOND as f64;
        self.node.is_none_or(|node| event.node() == Some(node)) && second >= self.from
    }

    fn is_over(&self, at: Nanos) -> bool {
        self.until.is_some_and(|until| at as f64 / SECOND as f64 > until)
    }
}

/// Plays a scenario and writes what happens.
///
/// # Errors
/// If it cannot be written; the run is lost then.
pub fn record(scenario: &Scenario, to: &mut impl Write) -> Result<Report> {
    let mut world = World::new(scenario);
    let head = Head { scenario: scenario.clone(), plan: world.plan.clone() };
    writeln!(to, "{}", serde_json::to_string(&head)?)?;
    while let Some((at, event)) = world.advance() {
        writeln!(to, "{}", line(at, &event)).context("the record cannot be written")?;
        world.happen(event);
    }
    to.flush()?;
    Ok(Report::of(&world))
}

/// Plays a record again, and hands what `filter` lets through to `show`. Ends early, without a report, where `filter` says so.
///
/// # Errors
/// If it is no record, or if something else happens than is recorded: the code decides otherwise than it did.
pub fn replay(from: impl BufRead, filter: Filter, mut show: impl FnMut(&str)) -> Result<Option<Report>> {
    let mut lines = from.lines();
    let first = lines.next().context("the record is empty")??;
    let head: Head = serde_json::from_str(&first).context("the first line of a record says what was played")?;
    head.scenario.check().map_err(|problems| anyhow::anyhow!("{}", problems.join("; ")))?;
    let mut world = World::new(&head.scenario);
    if world.plan != head.plan {
        bail!("something else is drawn from this seed than was recorded");
    }
    while let Some((at, event)) = world.advance() {
        let happens = line(at, &event);
        match lines.next().transpose()? {
            Some(recorded) if recorded == happens => {}
            Some(recorded) => bail!("something else happens:\n  recorded {recorded}\n  now      {happens}"),
            None => bail!("the record ends, and still something happens:\n  {happens}"),
        }
        if filter.is_over(at) {
            return Ok(None);
        }
        if filter.shows(at, &event) {
            show(&happens);
        }
        world.happen(event);
    }
    match lines.next().transpose()? {
        Some(recorded) => bail!("nothing happens any more, and more is recorded:\n  {recorded}"),
        None => Ok(Some(Report::of(&world))),
    }
}

fn line(at: Nanos, event: &Event) -> String {
    format!("{}.{:09} {event:?}", at / SECOND, at % SECOND)
}
