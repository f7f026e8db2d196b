//! From times to rows: which choice from which size on. Pure, so that it can be tested without a GPU.

use std::collections::BTreeMap;

use comm_core::tuning::{Choice, Measured, Row};

/// What was measured at one size: microseconds per operation of the slowest rank.
#[derive(Clone, PartialEq, Debug)]
pub struct Point {
    /// Bytes of the full buffer.
    pub bytes: u64,
    /// Every choice that could be launched and gave the right result, with its time.
    pub times: Vec<(Choice, f64)>,
}

impl Point {
    fn of(&self, choice: &Choice) -> Option<f64> {
        self.times.iter().find(|(other, _)| other == choice).map(|&(_, us)| us)
    }
}

/// Chooses rows for sizes in ascending order. Every size is as fast as can be, up to `hysteresis`: a change to another
/// row must gain more than this share of an operation's time over all the sizes that the row is for, so that noise does
/// not make rows. `None` if nothing was measured at some size.
///
/// It is the path of least cost through sizes and choices: a size costs what the choice is slower than the best there, as
/// a share of the best, and a change costs `hysteresis`.
pub fn pick(points: &[Point], hysteresis: f64) -> Option<Vec<Row>> {
    let mut choices: Vec<&Choice> = Vec::new();
    for (choice, _) in points.iter().flat_map(|point| &point.times) {
        if !choices.contains(&choice) {
            choices.push(choice);
        }
    }
    let mut costs = vec![0.0; choices.len()];
    // For each size but the first and each choice, the choice at the size before.
    let mut before: Vec<Vec<usize>> = Vec::new();
    for (index, point) in points.iter().enumerate() {
        let best = point.times.iter().map(|&(_, us)| us).min_by(f64::total_cmp)?;
        let (cheapest, least) = cheapest(&costs)?;
        let mut from = Vec::with_capacity(choices.len());
        for (own, choice) in choices.iter().enumerate() {
            let change = least + if index == 0 { 0.0 } else { hysteresis };
            if change < costs[own] {
                costs[own] = change;
                from.push(cheapest);
            } else {
                from.push(own);
            }
            costs[own] += point.of(choice).map_or(f64::INFINITY, |us| us / best - 1.0);
        }
        before.push(from);
    }
    let (mut last, _) = cheapest(&costs)?;
    let mut path = vec![last; points.len()];
    for index in (1..points.len()).rev() {
        last = before[index][last];
        path[index - 1] = last;
    }
    Some(rows(points, &path.iter().map(|&index| choices[index]).collect::<Vec<_>>()))
}

/// The first of the least.
fn cheapest(costs: &[f64]) -> Option<(usize, f64)> {
    let least = costs.iter().copied().min_by(f64::total_cmp)?;
    costs.iter().position(|&cost| cost <= least).map(|index| (index, least))
}

fn rows(points: &[Point], path: &[&Choice]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (index, (point, &choice)) in points.iter().zip(path).enumerate() {
        if rows.last().is_some_and(|row| row.choice == *choice) {
            continue;
        }
        let from = match index {
            0 => 0,
            // Between two sizes where they were measured, and where it is not known which is better, in the middle.
            _ => middle(points[index - 1].bytes, point.bytes),
        };
        rows.push(Row { from, choice: choice.clone() });
    }
    rows
}

/// The geometric middle, to a 16th of the distance, above the smaller.
fn middle(smaller: u64, larger: u64) -> u64 {
    let middle = ((smaller as f64) * (larger as f64)).sqrt() as u64;
    let step = (larger.saturating_sub(smaller) / 16).max(1);
    (middle / step * step).clamp(smaller + 1, larger.max(smaller + 1))
}

/// The figures that go beside the rows: what was chosen, and the best of each algorithm, to a hundredth.
pub fn figures(points: &[Point], rows: &[Row]) -> Vec<Measured> {
    let hundredths = |us: f64| (us * 100.0).round() / 100.0;
    let figure = |point: &Point| {
        let chosen = rows.iter().rfind(|row| row.from <= point.bytes)?;
        let mut best = BTreeMap::new();
        for (choice, us) in &point.times {
            let least: &mut f64 = best.entry(choice.algorithm.clone()).or_insert(f64::INFINITY);
            *least = least.min(hundredths(*us));
        }
        Some(Measured { bytes: point.bytes, us: hundredths(point.of(&chosen.choice)?), best })
    };
    points.iter().filter_map(figure).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(name: &str) -> Choice {
        match name.split_once('/') {
            Some((name, block)) => Choice { block: block.parse().ok(), ..Choice::of(name.to_owned()) },
            None => Choice::of(name.to_owned()),
        }
    }

    fn points(names: &[&str], sizes: &[(u64, &[f64])]) -> Vec<Point> {
        let point = |&(bytes, times): &(u64, &[f64])| Point {
            bytes,
            times: names
                .iter()
                .zip(times)
                .filter(|(_, us)| us.is_finite())
                .map(|(n, &us)| (choice(n), us))
                .collect(),
        };
        sizes.iter().map(point).collect()
    }

    fn picked(points: &[Point]) -> Vec<(u64, String)> {
        let rows = pick(points, 0.03).unwrap();
        rows.into_iter().map(|row| (row.from, row.choice.to_string())).collect()
    }

    #[test]
    fn the_crossing_of_two_algorithms_is_found() {
        let measured = points(
            &["one_shot", "two_shot"],
            &[
                (1 << 10, &[2.5, 4.0]),
                (64 << 10, &[4.0, 5.0]),
                (256 << 10, &[9.0, 6.0]),
                (1 << 20, &[30.0, 10.0]),
            ],
        );
        let rows = pick(&measured, 0.03).unwrap();
        // The middle of 64 K and 256 K is 128 K, here to a 16th of 192 K.
        assert_eq!(picked(&measured), [(0, "one_shot".into()), (122_880, "two_shot".into())]);
        let figures = figures(&measured, &rows);
        assert_eq!(figures.iter().map(|figure| figure.us).collect::<Vec<_>>(), [2.5, 4.0, 6.0, 10.0]);
        assert_eq!(figures[2].best["one_shot"], 9.0);
    }

    #[test]
    fn noise_makes_no_rows() {
        let measured = points(
            &["a/64", "a/128"],
            &[(1, &[1.00, 1.01]), (2, &[1.01, 1.00]), (4, &[1.00, 1.02]), (8, &[1.02, 1.00])],
        );
        assert_eq!(pick(&measured, 0.03).unwrap().len(), 1);
        assert_eq!(pick(&measured, 0.0).unwrap().len(), 4);
        // Less than the hysteresis at each size, but at many in a row: worth a row.
        let small: Vec<f64> = (0..8).map(|size| if size < 4 { 1.02 } else { 1.0 }).collect();
        let sizes: Vec<_> = small.iter().map(|&b| [2.02 - b, b]).collect();
        let sizes: Vec<(u64, &[f64])> = sizes.iter().enumerate().map(|(i, t)| (1 << i, &t[..])).collect();
        assert_eq!(picked(&points(&["a", "b"], &sizes)), [(0, "a".into()), (11, "b".into())]);
    }

    #[test]
    fn what_was_not_measured_at_a_size_is_not_chosen_there() {
        const NO: f64 = f64::INFINITY;
        let measured = points(&["a", "b"], &[(10, &[1.0, 1.5]), (20, &[NO, 1.5]), (40, &[1.0, 1.5])]);
        assert_eq!(picked(&measured), [(0, "a".into()), (14, "b".into()), (28, "a".into())]);
        let nothing = points(&["a"], &[(10, &[1.0]), (20, &[NO])]);
        assert_eq!(pick(&nothing, 0.03), None);
        assert_eq!(pick(&[], 0.03), None);
    }

    #[test]
    fn thresholds_lie_between_the_sizes_they_separate() {
        for (smaller, larger) in [(1, 2), (0, 1), (1024, 2048), (1 << 40, 1 << 41), (3, 4), (5, 5)] {
            let middle = middle(smaller, larger);
            assert!(smaller < middle && middle <= larger.max(smaller + 1), "{smaller} {middle} {larger}");
        }
    }

    #[test]
    fn no_row_is_slower_than_the_best_by_more_than_a_change_costs() {
        // A fixed sequence of pseudo-random times: whatever they are, staying never costs more than two changes would.
        let mut state = 7_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            1.0 + (state >> 40) as f64 / f64::from(1 << 24)
        };
        let names = ["a", "b", "c", "d/64", "d/128"];
        let times: Vec<[f64; 5]> = (0..40).map(|_| [(); 5].map(|()| next())).collect();
        let sizes: Vec<(u64, &[f64])> =
            times.iter().enumerate().map(|(i, t)| (1000 + 7 * i as u64, &t[..])).collect();
        let measured = points(&names, &sizes);
        let rows = pick(&measured, 0.05).unwrap();
        for (point, figure) in measured.iter().zip(figures(&measured, &rows)) {
            let best = point.times.iter().map(|time| time.1).fold(f64::INFINITY, f64::min);
            assert!(figure.us <= best * 1.10 + 0.01, "{figure:?}");
        }
        assert!(rows.windows(2).all(|pair| pair[0].from < pair[1].from && pair[0].choice != pair[1].choice));
    }
}
