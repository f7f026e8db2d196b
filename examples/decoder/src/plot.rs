//! The table as a picture: bars of microseconds per layer, whose grey foot is what a layer costs without communication.

use std::fmt::Write as _;

use crate::report::{Figure, Report, title};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 460.0;
/// Left, top, right and bottom of the panel.
const PANEL: (f64, f64, f64, f64) = (84.0, 70.0, 940.0, 400.0);
const FLOOR: &str = "#b8b8b8";
/// Colours that stay apart, for colour-blind readers too.
const COLOURS: [&str; 4] = ["#d55e00", "#0072b2", "#009e73", "#cc79a7"];

/// The picture as an SVG file's text.
pub fn svg(report: &Report) -> String {
    let (left, top, right, bottom) = PANEL;
    let highest =
        report.rows.iter().flat_map(|row| &row.figures).map(|figure| figure.us_per_layer).fold(1.0, f64::max);
    let step = tick(highest);
    let limit = (highest / step).ceil() * step;
    let y = |us: f64| bottom - us / limit * (bottom - top);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"14\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    text(
        &mut out,
        (left, 26.0),
        "start",
        17,
        &format!("Decoder layer, {} x {}", report.world, report.device),
    );
    let mut us = 0.0;
    while us <= limit + step / 2.0 {
        let at = y(us);
        let _ = writeln!(out, "<path d=\"M{left} {at:.1}H{right}\" stroke=\"#00000022\"/>");
        text(&mut out, (left - 8.0, at + 5.0), "end", 14, &format!("{us}"));
        us += step;
    }
    let middle = (top + bottom) / 2.0;
    let _ = writeln!(
        out,
        "<text transform=\"translate(20 {middle}) rotate(-90)\" text-anchor=\"middle\">microseconds per layer</text>"
    );

    let group = (right - left) / report.rows.len().max(1) as f64;
    for (number, row) in report.rows.iter().enumerate() {
        let start = left + number as f64 * group;
        let floor =
            row.figures.iter().find(|figure| !figure.checked).map_or(0.0, |figure| figure.us_per_layer);
        let bars: Vec<&Figure> = row.figures.iter().filter(|figure| figure.checked).collect();
        let width = group * 0.8 / bars.len().max(1) as f64;
        for (place, figure) in bars.iter().enumerate() {
            let x = start + group * 0.1 + place as f64 * width;
            let total = figure.us_per_layer;
            bar(&mut out, (x, width * 0.9), (y(total), bottom), COLOURS[place % COLOURS.len()]);
            bar(&mut out, (x, width * 0.9), (y(floor.min(total)), bottom), FLOOR);
            text(&mut out, (x + width * 0.45, y(total) - 5.0), "middle", 12, &format!("{total:.0}"));
        }
        let tokens = if row.tokens == 1 { "1 token".into() } else { format!("{} tokens", row.tokens) };
        text(&mut out, (start + group / 2.0, bottom + 22.0), "middle", 14, &tokens);
    }

    let mut x = left;
    let names =
        report.rows.first().map_or(&[][..], |row| &row.figures).iter().filter(|figure| figure.checked);
    let entries = names.zip(COLOURS.iter().cycle()).map(|(figure, &colour)| (title(&figure.name), colour));
    for (name, colour) in entries.chain([("matrix products, norms, activations".to_owned(), FLOOR)]) {
        bar(&mut out, (x, 14.0), (40.0, 54.0), colour);
        text(&mut out, (x + 20.0, 52.0), "start", 14, &name);
        x += 44.0 + 8.0 * name.len() as f64;
    }
    out.push_str("</svg>\n");
    out
}

fn bar(out: &mut String, (x, width): (f64, f64), (top, bottom): (f64, f64), colour: &str) {
    let height = bottom - top;
    let _ = writeln!(
        out,
        "<rect x=\"{x:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
    );
}

fn text(out: &mut String, (x, y): (f64, f64), anchor: &str, size: u32, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{words}</text>"
    );
}

/// Between two lines of the scale: 1, 2 or 5 times a power of ten, so that there are at most eight.
fn tick(highest: f64) -> f64 {
    let power = 10_f64.powf((highest / 8.0).max(1e-3).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    steps.into_iter().find(|step| highest / step <= 8.0).unwrap_or(10.0 * power)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn every_way_has_a_bar_and_a_name() {
        let svg = svg(&report());
        for part in
            ["8 x a GPU", "128 tokens", "1 token<", "p2p, fused norm", "microseconds per layer", ">130<"]
        {
            assert!(svg.contains(part), "the picture lacks {part:?}");
        }
        // Two rows of three bars and their feet, the legend of four, the background.
        assert_eq!(svg.matches("<rect").count(), 2 * 3 * 2 + 4 + 1);
    }

    #[test]
    fn scales_have_round_steps() {
        assert_eq!([7.0, 9.0, 30.0, 350.0, 8000.0].map(tick), [1.0, 2.0, 5.0, 50.0, 1000.0]);
    }
}
