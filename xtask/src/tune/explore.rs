//! Which choices are measured at one size, in which order, and when it is enough. Knows no device: planning and timing
//! are the caller's.

use anyhow::Result;
use comm_core::tuning::Choice;

/// A shape of an algorithm is worth a measurement if the algorithm was at most this much slower than the best so far.
const PROMISING: f64 = 1.5;

/// What came of a measurement.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Outcome {
    /// Microseconds per operation, of the slowest rank.
    pub us: f64,
    /// Wrong elements, of all ranks.
    pub wrong: u64,
    /// Whether this size's time is up; the same on all ranks.
    pub time_is_up: bool,
}

/// What came of a size.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Explored {
    /// The choices that gave right results, with their times. Those that are launched alike share one measurement.
    pub times: Vec<(Choice, f64)>,
    /// The choices that did not, with the number of wrong elements.
    pub wrong: Vec<(Choice, u64)>,
    /// Measurements made.
    pub measurements: usize,
    /// Whether the time was up before all promising choices had been measured.
    pub cut_short: bool,
}

/// Measures `choices`, the most important first. `launch` says how a choice would be launched, `None` if it would give
/// way to another algorithm; `time` measures one. Both must give the same on all ranks.
///
/// # Errors
/// The first of the two's.
pub fn explore(
    choices: &[Choice],
    mut launch: impl FnMut(&Choice) -> Result<Option<Choice>>,
    mut time: impl FnMut(&Choice) -> Result<Outcome>,
) -> Result<Explored> {
    let mut explored = Explored::default();
    let mut launched: Vec<(Choice, Option<f64>)> = Vec::new();
    let mut best_of: Vec<(&str, f64)> = Vec::new();
    for choice in choices {
        let Some(plan) = launch(choice)? else { continue };
        if let Some((_, us)) = launched.iter().find(|(other, _)| *other == plan) {
            explored.times.extend(us.map(|us| (choice.clone(), us)));
            continue;
        }
        let best = best_of.iter().map(|&(_, us)| us).fold(f64::INFINITY, f64::min);
        let of_algorithm = best_of.iter().find(|(name, _)| *name == choice.algorithm);
        if of_algorithm.is_some_and(|&(_, us)| us > best * PROMISING) {
            continue;
        }
        if explored.cut_short {
            continue;
        }
        let outcome = time(choice)?;
        explored.measurements += 1;
        explored.cut_short = outcome.time_is_up;
        if outcome.wrong > 0 {
            explored.wrong.push((choice.clone(), outcome.wrong));
            launched.push((plan, None));
            continue;
        }
        launched.push((plan, Some(outcome.us)));
        explored.times.push((choice.clone(), outcome.us));
        match best_of.iter_mut().find(|(name, _)| *name == choice.algorithm) {
            Some((_, us)) => *us = us.min(outcome.us),
            None => best_of.push((&choice.algorithm, outcome.us)),
        }
    }
    Ok(explored)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(name: &str, block: u32) -> Choice {
        Choice { block: (block > 0).then_some(block), ..Choice::of(name.to_owned()) }
    }

    /// Times by algorithm and block; blocks above 256 are launched as 256, and `wide` cannot be launched.
    fn run(choices: &[Choice], us: impl Fn(&Choice) -> f64, most: usize) -> Explored {
        let mut measured = 0;
        let launch = |choice: &Choice| {
            let block = choice.block.unwrap_or(128).min(256);
            Ok((choice.algorithm != "wide").then(|| Choice { block: Some(block), ..choice.clone() }))
        };
        let time = |choice: &Choice| {
            measured += 1;
            let wrong = u64::from(choice.algorithm == "broken") * 7;
            Ok(Outcome { us: us(choice), wrong, time_is_up: measured >= most })
        };
        explore(choices, launch, time).unwrap()
    }

    fn all() -> Vec<Choice> {
        ["fast", "slow", "wide", "broken"]
            .iter()
            .flat_map(|name| [0, 64, 128, 256, 512].map(|block| choice(name, block)))
            .collect()
    }

    #[test]
    fn equal_launches_are_measured_once_and_bad_ones_never_count() {
        let explored = run(&all(), |_| 1.0, usize::MAX);
        // Of fast and slow: by itself (as 128), 64, 256. Of broken the same, without a time.
        assert_eq!(explored.measurements, 9);
        assert_eq!(explored.times.len(), 10);
        assert!(
            explored.times.iter().all(|(choice, _)| matches!(choice.algorithm.as_str(), "fast" | "slow"))
        );
        assert_eq!(explored.wrong.len(), 3);
        assert!(!explored.cut_short);
    }

    #[test]
    fn shapes_of_a_hopeless_algorithm_are_left_out() {
        let mut choices = vec![choice("fast", 0), choice("slow", 0)];
        choices.extend(all());
        let explored = run(&choices, |choice| if choice.algorithm == "slow" { 2.0 } else { 1.0 }, usize::MAX);
        let of = |name: &str| explored.times.iter().filter(|(choice, _)| choice.algorithm == name).count();
        // The two equal launches of slow's own shape share its time.
        assert_eq!((of("fast"), of("slow")), (6, 3));
    }

    #[test]
    fn when_time_is_up_the_first_choice_has_been_measured() {
        let explored = run(&all(), |_| 1.0, 1);
        assert_eq!(explored.measurements, 1);
        assert!(explored.cut_short);
        assert_eq!(explored.times[0], (choice("fast", 0), 1.0));
        // What is launched alike needs no time.
        assert!(explored.times.contains(&(choice("fast", 128), 1.0)));
    }
}
