//! `sim`: the simulator as a program. `sim --help` lists what can be asked for.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use chaos_tests::sim::trace::{Filter, record, replay};
use chaos_tests::sim::{Report, Scenario, play, sweep};
use clap::Parser;

/// Pulls of an image by many nodes, in virtual time, with the decisions of the real agent
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    scenario: Scenario,
    /// Prints the outcome as one JSON object
    #[arg(long)]
    json: bool,
    /// Records every event in this file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["replay", "sweep"])]
    trace: Option<PathBuf>,
    /// Plays a record again and prints its events; the scenario is the record's
    #[arg(long, value_name = "FILE", conflicts_with = "sweep")]
    replay: Option<PathBuf>,
    /// With --replay: prints the events of this node only
    #[arg(long, requires = "replay")]
    node: Option<u32>,
    /// With --replay: prints nothing before this second
    #[arg(long, requires = "replay", default_value_t = 0.0)]
    from: f64,
    /// With --replay: ends after this second
    #[arg(long, requires = "replay")]
    until: Option<f64>,
    /// Plays the scenario with each of these values of one option, for example `nodes=10,100,1000`; writes NAME.csv and
    /// NAME.svg into --out
    #[arg(long, value_name = "OPTION=V,V,..")]
    sweep: Option<String>,
    /// With --sweep: seeds per value, from --seed on
    #[arg(long, requires = "sweep", default_value_t = 3)]
    seeds: u64,
    /// With --sweep: where the files go
    #[arg(long, requires = "sweep", default_value = ".")]
    out: PathBuf,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if let Err(problems) = args.scenario.check() {
        bail!("this cannot be played:\n  {}", problems.join("\n  "));
    }
    let begun = Instant::now();
    let report = if let Some(sweep) = &args.sweep {
        let written = sweep::run(&args.scenario, sweep, args.seeds, &args.out, |row| eprintln!("{row}"))?;
        for file in written {
            println!("{}", file.display());
        }
        return Ok(ExitCode::SUCCESS);
    } else if let Some(file) = &args.replay {
        let record = File::open(file).with_context(|| format!("{} cannot be read", file.display()))?;
        let filter = Filter { node: args.node, from: args.from, until: args.until };
        let mut out = BufWriter::new(std::io::stdout().lock());
        let mut broken = false;
        let report = replay(BufReader::new(record), filter, |line| broken |= writeln!(out, "{line}").is_err())?;
        // A pager that was closed has seen enough.
        let Some(report) = report.filter(|_| !broken) else { return Ok(ExitCode::SUCCESS) };
        report
    } else if let Some(file) = &args.trace {
        let to = File::create(file).with_context(|| format!("{} cannot be written", file.display()))?;
        record(&args.scenario, &mut BufWriter::new(to))?
    } else {
        play(&args.scenario, &mut |_, _| ())
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print(&report);
    }
    // Not in the report, which is the same wherever it is made.
    eprintln!("{} events in {:.1} s", report.events, begun.elapsed().as_secs_f64());
    Ok(if report.unfinished == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &Report) {
    let rows = [
        ("clients done", format!("{} (unfinished: {})", report.done, report.unfinished)),
        ("bound", format!("{:.3} s", report.bound_s)),
        ("last, p99, p50 over the bound", format!("{:.3}, {:.3}, {:.3}", report.last, report.p99, report.p50)),
        ("first byte, p50, last", format!("{:.3} s, {:.3} s", report.first_byte_p50_s, report.first_byte_max_s)),
        (
            "longest wait, p50, p99, longest",
            format!("{:.3} s, {:.3} s, {:.3} s", report.stall_p50_s, report.stall_p99_s, report.stall_max_s),
        ),
        ("registry bytes over the image", format!("{:.4}", report.egress)),
        ("registry requests, refused", format!("{}, {}", report.registry_requests, report.registry_refusals)),
        ("control over payload", format!("{:.4} %", report.control * 100.0)),
        ("busiest home", format!("{:.3} MB/s of control", report.home_bytes_per_s as f64 / 1e6)),
        ("wasted over all images", format!("{:.4} %", report.wasted * 100.0)),
        (
            "asked, declined, told, per piece",
            format!("{:.2}, {:.2}, {:.2}", report.asked_per_piece, report.declined_per_piece, report.news_per_piece),
        ),
        ("fallbacks, busy, calls", format!("{}, {}, {}", report.fallbacks, report.busy, report.calls)),
    ];
    for (what, value) in rows {
        println!("{what:32} {value}");
    }
}
