//! Runs that take turns, so that whatever else the machine does meets all contestants alike; and what comes out of them.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::args::{Against, Mode, Settings};
use super::contestants::Contestant;
use super::figures::{Busy, Figures, Measured, extend};
use super::memory;
use super::play::{Entrant, play};
use crate::lab::cases::TOOLS;
use crate::lab::command::installed;
use crate::lab::daemon::log_tail;
use crate::lab::netns::congestions;
use crate::lab::runner::interrupted;
use crate::lab::world::{self, World};

/// How much of each log is shown of a run that failed.
const LOG_LINES: usize = 10;

/// Where programs are that are not on PATH.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The agent.
    pub darter: PathBuf,
    /// A directory of tools, such as `cargo install` fills.
    pub tools: PathBuf,
}

/// One kept run.
struct Kept {
    figures: Figures,
    busy: Busy,
}

/// All runs that the settings ask for; prints a line for each, and what they come to.
pub async fn series(settings: &Settings, programs: &Programs) -> Result<ExitCode> {
    let entrants = match entrants(settings, programs) {
        Ok((entrants, absent)) => {
            for reason in absent {
                eprintln!("bench: without {reason}");
            }
            entrants
        }
        Err(problems) => {
            problems.iter().for_each(|problem| eprintln!("bench: {problem}"));
            return Ok(ExitCode::FAILURE);
        }
    };
    world::remove_abandoned().await.context("cannot clear up after an earlier lab")?;
    let _memory = memory::Hold::take();
    tokio::select! {
        code = turns(settings, programs, &entrants) => code,
        () = interrupted() => {
            // The run's daemons were dropped with it, and with that killed.
            world::remove().await?;
            eprintln!("bench: interrupted, everything is cleared up");
            Ok(ExitCode::from(130))
        }
    }
}

async fn turns(settings: &Settings, programs: &Programs, entrants: &[Entrant]) -> Result<ExitCode> {
    let mut kept: Vec<Vec<Kept>> = entrants.iter().map(|_| Vec::new()).collect();
    let mut failed = false;
    for run in 0..settings.runs {
        for (entrant, kept) in entrants.iter().zip(&mut kept) {
            if !settings.json {
                eprintln!("bench {}: run {} of {}, {}", settings.mode.name(), run + 1, settings.runs, entrant.name());
            }
            let mut line = head(settings, entrant);
            extend(&mut line, json!({"run": run + 1, "seed": settings.seed, "image": settings.layers_bytes}));
            match repeated(settings, programs, entrant, run).await {
                Ok((measured, attempts)) => {
                    extend(&mut line, json!({"attempts": attempts}));
                    extend(&mut line, measured.json());
                    kept.push(Kept { figures: measured.figures(), busy: measured.busy() });
                }
                Err(error) => {
                    failed = true;
                    extend(&mut line, json!({"error": format!("{error:#}")}));
                }
            }
            println!("{line}");
        }
    }
    for line in summary(settings, entrants, &kept) {
        println!("{line}");
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A run, again where the machine was too busy, up to the allowed number of times. The least busy one counts.
async fn repeated(
    settings: &Settings,
    programs: &Programs,
    entrant: &Entrant,
    run: usize,
) -> Result<(Measured, usize)> {
    let mut attempts: Vec<Measured> = Vec::new();
    loop {
        attempts.push(attempt(settings, programs, entrant, run).await?);
        let shares: Vec<(f64, f64)> = attempts.iter().map(|it| (it.own_share, it.machine_share)).collect();
        if let Some(best) = settled(&shares, settings.repeats) {
            return Ok((attempts.swap_remove(best), shares.len()));
        }
    }
}

/// Which of these attempts counts, by their shares of the cores' time; None if there has to be another one.
fn settled(shares: &[(f64, f64)], repeats: usize) -> Option<usize> {
    let (own, machine) = shares.last()?;
    if Busy::of(*own, *machine) == Busy::No {
        return Some(shares.len() - 1);
    }
    if shares.len() <= repeats {
        return None;
    }
    let order = |left: &(f64, f64), right: &(f64, f64)| left.1.total_cmp(&right.1);
    shares.iter().enumerate().min_by(|(_, left), (_, right)| order(left, right)).map(|(index, _)| index)
}

async fn attempt(settings: &Settings, programs: &Programs, entrant: &Entrant, run: usize) -> Result<Measured> {
    let result = match World::new(&programs.darter, &settings.congestion).await {
        Ok(mut world) => play(&mut world, settings, entrant, run).await,
        Err(error) => Err(error),
    };
    if result.is_err() && !settings.json {
        for log in world::logs() {
            eprint!("--- {}\n{}", log.display(), log_tail(&log, LOG_LINES));
        }
    }
    world::remove().await.context("cannot clear up")?;
    result
}

/// Who runs, and why others do not; or all reasons why nobody can.
fn entrants(settings: &Settings, programs: &Programs) -> Result<(Vec<Entrant>, Vec<String>), Vec<String>> {
    let mut problems = Vec::new();
    if !rustix::process::geteuid().is_root() {
        problems.push("it makes network namespaces, which takes root".to_owned());
    }
    let congestions = congestions();
    if !congestions.contains(&settings.congestion) {
        problems.push(format!("this kernel has no {}, but {}", settings.congestion, congestions.join(", ")));
    }
    problems.extend(TOOLS.iter().filter(|tool| !installed(tool)).map(|tool| format!("{tool} is not installed")));
    let (others, have_to) = match &settings.against {
        Against::Named(others) => (others, true),
        Against::Installed(others) => (others, false),
    };
    let (mut entrants, mut absent) = (Vec::new(), Vec::new());
    for contestant in [Contestant::Darter].iter().chain(others) {
        match contestant.program(&programs.darter, &programs.tools) {
            Ok(program) => entrants.push(Entrant { contestant: *contestant, program, killed: false }),
            Err(reason) if have_to || *contestant == Contestant::Darter => problems.push(reason),
            Err(reason) => absent.push(reason),
        }
    }
    if settings.mode == Mode::Fail {
        // What is undisturbed is what this is compared with.
        let killed: Vec<Entrant> = entrants.iter().map(|it| Entrant { killed: true, ..it.clone() }).collect();
        entrants.splice(0..0, killed);
    }
    if problems.is_empty() { Ok((entrants, absent)) } else { Err(problems) }
}

fn head(settings: &Settings, entrant: &Entrant) -> Value {
    json!({
        "bench": settings.mode.name(),
        "contestant": entrant.name(),
        "nodes": settings.nodes,
        "rate_mbps": settings.rate,
        "registry_rate_mbps": settings.registry_rate,
        "congestion": settings.congestion,
    })
}

/// Medians of each entrant's runs, and the first entrant's over those of each other.
fn summary(settings: &Settings, entrants: &[Entrant], kept: &[Vec<Kept>]) -> Vec<Value> {
    let medians: Vec<Option<(Figures, usize)>> = kept.iter().map(|runs| medians(runs)).collect();
    let mut lines = Vec::new();
    for ((entrant, runs), medians) in entrants.iter().zip(kept).zip(&medians) {
        let Some((figures, counted)) = medians else { continue };
        let busy = runs.iter().filter(|run| run.busy != Busy::No).count();
        let mut line = head(settings, entrant);
        extend(
            &mut line,
            json!({"summary": "medians", "runs": runs.len(), "runs_busy": busy, "runs_counted": counted}),
        );
        extend(&mut line, figures.json());
        lines.push(line);
    }
    let Some(Some((own, _))) = medians.first() else { return lines };
    for (entrant, medians) in entrants.iter().zip(&medians).skip(1) {
        let Some((other, _)) = medians else { continue };
        let mut line = head(settings, &entrants[0]);
        extend(&mut line, json!({"summary": "ratio", "to": entrant.name()}));
        extend(&mut line, own.over(other));
        lines.push(line);
    }
    lines
}

/// Medians of the runs for which the machine was not too busy, or of all where there is none of these; and of how many.
fn medians(runs: &[Kept]) -> Option<(Figures, usize)> {
    let of = |all: bool| runs.iter().filter(move |run| all || run.busy == Busy::No).map(|run| run.figures);
    let (quiet, all): (Vec<Figures>, Vec<Figures>) = (of(false).collect(), of(true).collect());
    let counted = if quiet.is_empty() { all } else { quiet };
    Some((Figures::medians(&counted)?, counted.len()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_busy_run_is_repeated_until_it_is_not_or_the_last_time() {
        let (quiet, busy, busier) = ((0.5, 0.6), (0.5, 0.85), (0.95, 0.97));
        assert_eq!(settled(&[quiet], 3), Some(0));
        assert_eq!(settled(&[busy], 3), None);
        assert_eq!(settled(&[busy, busier, busy], 3), None);
        assert_eq!(settled(&[busier, quiet], 3), Some(1));
        assert_eq!(settled(&[busier, busy, busier, busier], 3), Some(1), "three repeats, and the least busy counts");
        assert_eq!(settled(&[busy], 0), Some(0));
    }

    fn run(last: f64, busy: Busy) -> Kept {
        Kept { figures: Figures { last, median: last, interface_share: 1.0, ..Figures::default() }, busy }
    }

    #[test]
    fn busy_runs_count_only_where_there_is_no_other() {
        let runs = [run(9.0, Busy::Own), run(2.0, Busy::No), run(4.0, Busy::No)];
        let (figures, counted) = medians(&runs).unwrap();
        assert_eq!((figures.last, counted), (3.0, 2));
        let (figures, counted) = medians(&[run(9.0, Busy::Others), run(5.0, Busy::Own)]).unwrap();
        assert_eq!((figures.last, counted), (7.0, 2));
        assert!(medians(&[]).is_none());
    }

    #[test]
    fn the_summary_has_medians_and_ratios() {
        let settings = Settings::parse(&["cold".to_owned()]).unwrap();
        let entrant = |contestant| Entrant { contestant, program: PathBuf::new(), killed: false };
        let entrants = [entrant(Contestant::Darter), entrant(Contestant::Direct), entrant(Contestant::Aria2)];
        let kept = [vec![run(2.0, Busy::No)], vec![run(8.0, Busy::No)], Vec::new()];
        let lines = summary(&settings, &entrants, &kept);
        assert_eq!(lines.len(), 3, "two with medians, one ratio, nothing of who never finished: {lines:?}");
        assert_eq!((&lines[0]["contestant"], &lines[0]["last_s"]), (&json!("darter"), &json!(2.0)));
        assert_eq!((&lines[2]["to"], &lines[2]["last"]), (&json!("direct"), &json!(0.25)));
    }
}
