//! Time and bus bandwidth by size, as an SVG file.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, anyhow, ensure};
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::bench::peer::Figure;
use crate::bench::row::{Row, bus_factor};
use crate::bench::sizes::human;

/// A panel's width and height, in pixels.
const PANEL: (u32, u32) = (900, 520);
/// The legend's width.
const LEGEND: u32 = 330;
/// Between two lines of the legend.
const LEGEND_STEP: i32 = 22;

/// Colours that stay apart, for colour-blind readers too where there are few; beyond them the marks differ.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
];

/// A curve's operation (its place among those of the rows), its name, and whether it is the peer's.
type CurveKey = (usize, String, bool);
/// Bytes, microseconds and GB/s.
type Point = (f64, f64, f64);

/// One curve of both panels.
struct Curve {
    name: String,
    colour: RGBColor,
    /// Open marks, for the curves that share a colour with an earlier one.
    open: bool,
    /// Drawn dashed: a peer's.
    dashed: bool,
    /// Bytes and microseconds.
    times: Vec<(f64, f64)>,
    /// Bytes and GB/s.
    busbws: Vec<(f64, f64)>,
}

/// Draws the rows: above, time by size, below, bus bandwidth by size, a curve per operation, backend and world, each in its
/// own colour; a peer's figures are dashed, in the colour of the operation's first curve.
///
/// # Errors
/// When there is nothing to draw, or the file cannot be written.
pub fn plot(path: &Path, rows: &[Row], peer: &[Figure]) -> Result<()> {
    let curves = curves(rows, peer);
    ensure!(!curves.is_empty(), "no row has a size and a time: there is nothing to plot");
    let legend_height = curves.len() as u32 * LEGEND_STEP as u32 + 80;
    let size = (PANEL.0 + LEGEND, (2 * PANEL.1).max(legend_height));
    let root = SVGBackend::new(path, size).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("drawing {}: {error}", path.display());
    root.fill(&WHITE).map_err(|error| failed(&error))?;
    let (panels, beside) = root.split_horizontally(PANEL.0);
    let (above, below) = panels.split_vertically(PANEL.1);
    draw(&above, "Time per operation", "time (µs)", &curves, |curve| &curve.times)?;
    draw(&below, "Bus bandwidth", "bus bandwidth (GB/s)", &curves, |curve| &curve.busbws)?;
    legend(&beside, &curves).map_err(|error| failed(&error))?;
    root.present().map_err(|error| failed(&error))
}

fn curves(rows: &[Row], peer: &[Figure]) -> Vec<Curve> {
    let mut ops: Vec<&str> = Vec::new();
    for row in rows.iter().filter(|row| row.bytes > 0) {
        if !ops.contains(&row.op.as_str()) {
            ops.push(&row.op);
        }
    }
    let mut points: BTreeMap<CurveKey, Vec<Point>> = BTreeMap::new();
    let place = |op: &str| ops.iter().position(|known| *known == op);
    for row in rows.iter().filter(|row| row.bytes > 0) {
        let (Some(timing), Some(op)) = (row.out_of_place.or(row.in_place), place(&row.op)) else { continue };
        let name = format!("{} {} x{}", row.op, row.backend, row.world);
        points.entry((op, name, false)).or_default().push((row.bytes as f64, timing.us, timing.busbw));
    }
    for figure in peer {
        let (Some(us), Some(op)) = (figure.us, place(&figure.op)) else { continue };
        let kind = comm_core::OpKind::COLLECTIVES.into_iter().find(|kind| kind.name() == figure.op);
        let factor = kind.map_or(1.0, |kind| bus_factor(kind, figure.world));
        let busbw = figure.bytes as f64 / us / 1e3 * factor;
        let name = format!("{} PyTorch x{}", figure.op, figure.world);
        points.entry((op, name, true)).or_default().push((figure.bytes as f64, us, busbw));
    }
    // Keys are sorted by operation, so an operation's first curve is the first that is met.
    let drawn: Vec<(usize, String)> =
        points.keys().filter(|key| !key.2).map(|(op, name, _)| (*op, name.clone())).collect();
    let hue = |op: usize, name: &str, dashed: bool| {
        drawn
            .iter()
            .position(|(other, known)| *other == op && (dashed || known == name))
            .unwrap_or(drawn.len())
    };
    let curve = |((op, name, dashed), mut points): (CurveKey, Vec<Point>)| {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        // A logarithmic axis has no place for zero.
        let positive = |y: &dyn Fn(&Point) -> f64| -> Vec<(f64, f64)> {
            points.iter().map(|point| (point.0, y(point))).filter(|point| point.1 > 0.0).collect()
        };
        let (times, busbws) = (positive(&|point| point.1), positive(&|point| point.2));
        let hue = hue(op, &name, dashed);
        Curve {
            name,
            colour: COLOURS[hue % COLOURS.len()],
            open: hue >= COLOURS.len(),
            dashed,
            times,
            busbws,
        }
    };
    points.into_iter().map(curve).filter(|curve| !curve.times.is_empty()).collect()
}

fn draw(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    unit: &str,
    curves: &[Curve],
    points: impl Fn(&Curve) -> &Vec<(f64, f64)>,
) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| anyhow!("drawing {title}: {error}");
    let all = || curves.iter().flat_map(&points);
    let (xs, ys) = (span(all().map(|point| point.0), 1.15), span(all().map(|point| point.1), 1.4));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(52)
        .y_label_area_size(78)
        .build_cartesian_2d((xs.0..xs.1).log_scale().base(2.0), (ys.0..ys.1).log_scale())
        .map_err(|error| failed(&error))?;
    mesh(&mut chart, unit).map_err(|error| failed(&error))?;
    for curve in curves {
        let style = curve.colour.stroke_width(2);
        let points = points(curve);
        if curve.dashed {
            let dashes = DashedLineSeries::new(points.iter().copied(), 7, 5, style);
            chart.draw_series(dashes).map_err(|error| failed(&error))?;
        } else {
            let line = LineSeries::new(points.iter().copied(), style);
            chart.draw_series(line).map_err(|error| failed(&error))?;
        }
        if !curve.dashed {
            let marks = points.iter().map(|&point| Circle::new(point, 3, mark(curve)));
            chart.draw_series(marks).map_err(|error| failed(&error))?;
        }
    }
    Ok(())
}

fn mark(curve: &Curve) -> ShapeStyle {
    if curve.open { curve.colour.stroke_width(1) } else { curve.colour.filled() }
}

/// The curves' names, beside the panels so that they hide no data.
fn legend(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    curves: &[Curve],
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let text = ("sans-serif", 14).into_text_style(area).pos(Pos::new(HPos::Left, VPos::Center));
    for (line, curve) in curves.iter().enumerate() {
        let y = 60 + line as i32 * LEGEND_STEP;
        let style = curve.colour.stroke_width(2);
        if curve.dashed {
            for x in [0, 12, 24] {
                area.draw(&PathElement::new([(x, y), (x + 7, y)], style))?;
            }
        } else {
            area.draw(&PathElement::new([(0, y), (32, y)], style))?;
            area.draw(&Circle::new((16, y), 3, mark(curve)))?;
        }
        area.draw(&Text::new(curve.name.clone(), (40, y), text.clone()))?;
    }
    Ok(())
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
        .x_desc("size of the full buffer (bytes)")
        .y_desc(unit)
        .x_label_formatter(&|bytes| human(*bytes as u64))
        .y_label_formatter(&|value| if *value < 1.0 { format!("{value}") } else { format!("{value:.0}") })
        .x_labels(12)
        .y_labels(8)
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 16))
        .bold_line_style(BLACK.mix(0.15))
        .light_line_style(BLACK.mix(0.05))
        .draw()
}

/// The values' range with some air around.
fn span(values: impl Iterator<Item = f64>, air: f64) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, 0.0_f64), |(low, high), v| (low.min(v), high.max(v)));
    // Without values, as for operations that carry no data, any range will do.
    if low > high { (1.0, 10.0) } else { (low / air, high * air) }
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
        let peer: Vec<Figure> = (10..24)
            .map(|k| Figure {
                op: "all_reduce".into(),
                dtype: "bf16".into(),
                bytes: 1 << k,
                world: 8,
                in_place: true,
                us: Some(30.0),
                reason: None,
            })
            .collect();
        plot(&path, &rows, &peer).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for part in [
            "<svg",
            "time (µs)",
            "bus bandwidth (GB/s)",
            "size of the full buffer (bytes)",
            "all_reduce nccl x8",
            "all_reduce PyTorch x8",
            "all_gather nccl x8",
            "1M",
        ] {
            assert!(svg.contains(part), "the plot lacks {part:?}");
        }
        assert!(svg.matches("<polyline").count() >= 4, "a curve per operation in both panels");
    }

    #[test]
    fn backends_of_one_operation_have_colours_of_their_own() {
        let with = |op, backend: &str| Row { backend: backend.into(), ..row(op, 1024, 20.0) };
        let rows = [
            with(OpKind::AllReduce, "nccl"),
            with(OpKind::AllReduce, "p2p"),
            with(OpKind::AllGather, "nccl"),
            with(OpKind::AllGather, "p2p"),
        ];
        let peer = Figure {
            op: "all_gather".into(),
            dtype: "bf16".into(),
            bytes: 1024,
            world: 8,
            in_place: true,
            us: Some(30.0),
            reason: None,
        };
        let curves = curves(&rows, &[peer]);
        let colour = |name: &str| curves.iter().find(|curve| curve.name.starts_with(name)).unwrap().colour;
        let own = ["all_reduce nccl", "all_reduce p2p", "all_gather nccl", "all_gather p2p"].map(colour);
        assert!((0..4).all(|i| (0..i).all(|j| own[i] != own[j])), "{own:?}");
        assert_eq!(colour("all_gather PyTorch"), own[2]);
    }

    #[test]
    fn nothing_to_plot_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(plot(&dir.path().join("x.svg"), &[], &[]).is_err());
    }
}
