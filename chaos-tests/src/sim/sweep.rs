//! Many runs: one option takes several values, each with several seeds. The outcome is a table and two plots.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use plotters::prelude::*;
use serde_json::Value;

use super::report::Report;
use super::scenario::Scenario;

/// Size of a plot in pixels.
const PLOT: (u32, u32) = (720, 420);

/// What is read from a report.
type Curve = fn(&Report) -> f64;

/// What is plotted, each against the swept option.
const CURVES: [(&str, Curve); 3] = [
    ("last / bound", |report| report.last),
    ("p50 / bound", |report| report.p50),
    ("egress / image", |report| report.egress),
];

/// Plays `scenario` with every value of `OPTION=V,V,..`, and writes OPTION.csv and OPTION.svg into `out`; returns their names.
///
/// # Errors
/// If there is no such option, a value is not good for it, or the files cannot be written.
pub fn run(
    scenario: &Scenario,
    what: &str,
    seeds: u64,
    out: &Path,
    mut told: impl FnMut(&str),
) -> Result<Vec<PathBuf>> {
    let (option, values) = what.split_once('=').context("--sweep: OPTION=V,V,..")?;
    let key = option.replace('-', "_");
    let mut scenarios = Vec::new();
    for value in values.split(',') {
        let scenario = with(scenario, &key, value)?;
        scenario.check().map_err(|problems| anyhow::anyhow!("{option}={value}: {}", problems.join("; ")))?;
        scenarios.push((value, scenario));
    }
    std::fs::create_dir_all(out).with_context(|| format!("{} cannot be made", out.display()))?;
    let mut table = String::from(
        "option,value,seed,bound_s,last,p99,p50,egress,registry_requests,control,wasted,fallbacks,first_byte_p50_s,first_byte_max_s,\
         stall_p50_s,stall_max_s\n",
    );
    let mut points: Vec<(f64, Report)> = Vec::new();
    for (position, (value, scenario)) in scenarios.iter().enumerate() {
        for seed in scenario.seed..scenario.seed + seeds {
            let report = super::play(&Scenario { seed, ..scenario.clone() }, &mut |_, _| ());
            let row = format!(
                "{option},{value},{seed},{:.3},{:.4},{:.4},{:.4},{:.4},{},{:.6},{:.6},{},{:.3},{:.3},{:.3},{:.3}",
                report.bound_s,
                report.last,
                report.p99,
                report.p50,
                report.egress,
                report.registry_requests,
                report.control,
                report.wasted,
                report.fallbacks,
                report.first_byte_p50_s,
                report.first_byte_max_s,
                report.stall_p50_s,
                report.stall_max_s
            );
            told(&row);
            writeln!(table, "{row}")?;
            points.push((position as f64, report));
        }
    }
    let (csv, svg) = (out.join(format!("{option}.csv")), out.join(format!("{option}.svg")));
    std::fs::write(&csv, table).with_context(|| format!("{} cannot be written", csv.display()))?;
    let labels: Vec<&str> = scenarios.iter().map(|(value, _)| *value).collect();
    plot(&svg, option, &labels, &points)
        .map_err(|error| anyhow::anyhow!("{} cannot be drawn: {error}", svg.display()))?;
    Ok(vec![csv, svg])
}

/// The scenario with another value of one option.
fn with(scenario: &Scenario, key: &str, value: &str) -> Result<Scenario> {
    let mut fields = serde_json::to_value(scenario)?;
    let Some(field) = fields.get_mut(key) else { bail!("--sweep: there is no option {key}") };
    *field = serde_json::from_str::<Value>(value).with_context(|| format!("--sweep: {value} is no number"))?;
    serde_json::from_value(fields).with_context(|| format!("--sweep: {value} is not good for {key}"))
}

fn plot(
    file: &Path,
    option: &str,
    labels: &[&str],
    points: &[(f64, Report)],
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::new(file, PLOT).into_drawing_area();
    root.fill(&WHITE)?;
    let values = || points.iter().flat_map(|(_, report)| CURVES.iter().map(move |(_, of)| of(report)));
    let (low, high) = (values().fold(1.0, f64::min), values().fold(1.0, f64::max));
    let margin = (high - low).max(0.02) * 0.1;
    let right = (labels.len().max(2) - 1) as f64;
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d(-0.2..right + 0.2, low - margin..high + margin)?;
    chart
        .configure_mesh()
        .x_desc(option)
        .x_labels(labels.len())
        .x_label_formatter(&|at| {
            let nearest = at.round();
            let label = labels.get(nearest as usize).copied().unwrap_or_default();
            if (at - nearest).abs() < 0.05 { label.to_owned() } else { String::new() }
        })
        .draw()?;
    for ((name, of), colour) in CURVES.iter().zip([RED, BLUE, GREEN]) {
        let mean = |at: usize| {
            let of_value: Vec<f64> =
                points.iter().filter(|(x, _)| *x as usize == at).map(|(_, report)| of(report)).collect();
            (at as f64, of_value.iter().sum::<f64>() / of_value.len().max(1) as f64)
        };
        chart
            .draw_series(LineSeries::new((0..labels.len()).map(mean), colour))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
        chart.draw_series(points.iter().map(|(x, report)| Circle::new((*x, of(report)), 2, colour.filled())))?;
    }
    chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
    root.present()?;
    Ok(())
}
