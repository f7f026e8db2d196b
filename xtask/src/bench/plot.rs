//! Latency and bus bandwidth by size, as an SVG file.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, anyhow, ensure};
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::prelude::*;

use crate::bench::row::Row;
use crate::bench::sizes::human;

/// Points of one curve, by bytes.
type Curves = BTreeMap<String, Vec<(f64, f64)>>;

/// Draws the rows: above, time by size, below, bus bandwidth by size, a curve per operation and backend.
///
/// # Errors
/// When there is nothing to draw, or the file cannot be written.
pub fn plot(path: &Path, rows: &[Row]) -> Result<()> {
    let latency = curves(rows, |timing| timing.0);
    let busbw = curves(rows, |timing| timing.1);
    ensure!(!latency.is_empty(), "no row has a size and a time: there is nothing to plot");
    let root = SVGBackend::new(path, (1000, 1200)).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("drawing {}: {error}", path.display());
    root.fill(&WHITE).map_err(|error| failed(&error))?;
    let (above, below) = root.split_vertically(600);
    draw(&above, "time per operation", "microseconds", &latency)?;
    if !busbw.is_empty() {
        draw(&below, "bus bandwidth", "GB/s", &busbw)?;
    }
    root.present().map_err(|error| failed(&error))
}

fn curves(rows: &[Row], value: impl Fn((f64, f64)) -> f64) -> Curves {
    let mut curves = Curves::new();
    for row in rows.iter().filter(|row| row.bytes > 0) {
        let Some(timing) = row.out_of_place.or(row.in_place) else { continue };
        let y = value((timing.us, timing.busbw));
        // A logarithmic axis has no place for zero.
        if y > 0.0 {
            let name = format!("{} {} x{}", row.op, row.backend, row.world);
            curves.entry(name).or_default().push((row.bytes as f64, y));
        }
    }
    for points in curves.values_mut() {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    curves
}

fn draw(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    unit: &str,
    curves: &Curves,
) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| anyhow!("drawing {title}: {error}");
    let xs = span(curves.values().flatten().map(|point| point.0), 1.1);
    let ys = span(curves.values().flatten().map(|point| point.1), 1.5);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 24))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .right_y_label_area_size(8)
        .build_cartesian_2d((xs.0..xs.1).log_scale().base(2.0), (ys.0..ys.1).log_scale())
        .map_err(|error| failed(&error))?;
    mesh(&mut chart, unit).map_err(|error| failed(&error))?;
    for (index, (name, points)) in curves.iter().enumerate() {
        // The golden angle keeps neighbouring curves' hues apart, however many there are.
        let colour = HSLColor((index as f64 * 0.381_966).fract(), 0.75, 0.4);
        let style = colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))
            .map_err(|error| failed(&error))?
            .label(name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        chart
            .draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))
            .map_err(|error| failed(&error))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 13))
        .draw()
        .map_err(|error| failed(&error))
}

fn mesh<X, Y>(
    chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<X, Y>>,
    unit: &str,
) -> Result<(), DrawingAreaErrorKind<std::io::Error>>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart
        .configure_mesh()
        .x_desc("bytes of the full buffer")
        .y_desc(unit)
        .x_label_formatter(&|bytes| human(*bytes as u64))
        .y_label_formatter(&|value| if *value < 1.0 { format!("{value:.2}") } else { format!("{value:.0}") })
        .x_labels(16)
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 15))
        .draw()
}

/// The values' range with some air around.
fn span(values: impl Iterator<Item = f64>, air: f64) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, 0.0_f64), |(low, high), v| (low.min(v), high.max(v)));
    (low / air, high * air)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::table::tests::row;
    use comm_core::OpKind;

    #[test]
    fn the_plot_names_its_axes_and_curves() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plot.svg");
        let rows: Vec<Row> = (10..24)
            .flat_map(|k| {
                [
                    row(OpKind::AllReduce, 1 << k, 20.0 + f64::from(1 << (k - 10))),
                    row(OpKind::AllGather, 1 << k, 15.0 + f64::from(1 << (k - 10))),
                ]
            })
            .collect();
        plot(&path, &rows).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for part in [
            "<svg",
            "microseconds",
            "GB/s",
            "bytes of the full buffer",
            "all_reduce nccl x8",
            "all_gather nccl",
            "1M",
        ] {
            assert!(svg.contains(part), "the plot lacks {part:?}");
        }
        assert!(svg.matches("<polyline").count() >= 4, "a curve per operation in both halves");
    }

    #[test]
    fn nothing_to_plot_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(plot(&dir.path().join("x.svg"), &[]).is_err());
    }
}
