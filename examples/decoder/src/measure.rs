//! One rank's run: the reference, then every way of reducing, at every number of tokens.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use comm_core::{
    BackendFactory, CommError, CreateContext, Deadline, HostComm, HostCommExt, HostReduceOp, create_with,
};
use half::bf16;

use crate::device::{Device, Effort};
use crate::model::{Model, Partial, Reduction};
use crate::report::{Figure, Report, Row};
use crate::shape::{Shape, Shard};

/// What is measured. Equal on all ranks.
#[derive(Clone, Debug)]
pub struct Plan {
    /// A layer's size.
    pub shape: Shape,
    /// Layers of the model.
    pub layers: usize,
    /// Numbers of tokens of a forward pass.
    pub tokens: Vec<usize>,
    /// Repetitions.
    pub effort: Effort,
}

/// How far a row of the output may be from one device's after a layer, relative to the row's length (both as Euclidean
/// vectors); over several layers it grows as a random walk does.
///
/// Both round every intermediate result to bf16, whose unit in the last place is 2^-8, but at different places: a rank
/// rounds its partial sums before they are added up, and the fused norm rounds once less than an all-reduce and a norm.
const TOLERANCE_OF_LAYER: f64 = 0.015;

/// The bound on a collective's waits: shorter than that on a sample, so that it is the collective that names the culprit.
const COMM_TIMEOUT: Duration = Duration::from_secs(30);

/// A backend to measure.
#[derive(Clone, Copy)]
pub struct Backend<'a> {
    /// Makes its communicators.
    pub factory: &'a dyn BackendFactory,
    /// Whether its fused norm is measured too.
    pub fused: bool,
}

/// Measures everything on this rank; collective. Every rank returns the same report.
///
/// # Errors
/// The first failure. The other ranks' waits then end too.
pub fn run(
    device: &dyn Device,
    host: &Arc<dyn HostComm>,
    plan: &Plan,
    backends: &[Backend<'_>],
) -> Result<Report> {
    let (rank, world) = (host.rank(), host.size());
    let most = plan.tokens.iter().copied().max().unwrap_or(1);
    let reference = if rank == 0 { reference(device, plan, most)? } else { BTreeMap::new() };
    let shard = Shard { shape: plan.shape, rank, world };
    let model = Model::new(device, shard, plan.layers, most).context("making the model")?;
    let bench = Bench { device, host, plan, model: &model, reference: &reference };

    let mut rows: Vec<Row> = plan.tokens.iter().map(|&tokens| Row { tokens, figures: Vec::new() }).collect();
    let mut skipped = Vec::new();
    // First without communication: so all kernels and products are loaded before a rank waits for another's.
    let partial = Partial::new(device, None, most, plan.shape.hidden)?;
    for row in &mut rows {
        row.figures.push(bench.figure("none", row.tokens, &partial, Reduction::None)?);
    }
    // SAFETY: the work on it has ended with the measurements.
    unsafe { partial.free(device)? };

    for &Backend { factory, fused } in backends {
        let name = factory.name();
        let mut context = CreateContext::new(Arc::clone(host), device.memory().kind());
        context.timeout = COMM_TIMEOUT;
        let comm = match create_with(factory, &context) {
            Ok(comm) => comm,
            // Every rank has the same cause, so all of them go on.
            Err(error @ CommError::CreationFailed { .. }) => {
                skipped.push(format!("{name}: {error}"));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let partial = Partial::new(device, Some(&comm), most, plan.shape.hidden)?;
        for row in &mut rows {
            row.figures.push(bench.figure(name, row.tokens, &partial, Reduction::AllReduce(&*comm))?);
            if fused {
                let name = format!("{name}_fused");
                row.figures.push(bench.figure(&name, row.tokens, &partial, Reduction::Fused(&*comm))?);
            }
        }
        host.barrier(Deadline::after(host.timeout()))?;
        // SAFETY: the work on it has ended on all ranks.
        unsafe { partial.free(device)? };
        comm.close().with_context(|| format!("closing {name}"))?;
    }
    model.free()?;
    Ok(Report {
        device: device.name(),
        world,
        layers: plan.layers,
        hidden: plan.shape.hidden,
        intermediate: plan.shape.intermediate,
        tolerance: TOLERANCE_OF_LAYER * (plan.layers as f64).sqrt(),
        nccl: None,
        skipped,
        rows,
    })
}

/// What one device alone computes, by number of tokens.
fn reference(device: &dyn Device, plan: &Plan, most: usize) -> Result<BTreeMap<usize, Vec<bf16>>> {
    let model = Model::new(device, Shard::whole(plan.shape), plan.layers, most)
        .context("making the whole model on one device, to compare with; fewer --layers take less memory")?;
    let partial = Partial::new(device, None, most, plan.shape.hidden)?;
    let mut outputs = BTreeMap::new();
    for &tokens in &plan.tokens {
        // SAFETY: `partial` holds the most tokens and is freed below, after the output has been read.
        unsafe { model.forward(tokens, partial.addr, Reduction::None)? };
        outputs.insert(tokens, model.output(tokens)?);
    }
    model.free()?;
    // SAFETY: the work on it has ended.
    unsafe { partial.free(device)? };
    Ok(outputs)
}

struct Bench<'a> {
    device: &'a dyn Device,
    host: &'a Arc<dyn HostComm>,
    plan: &'a Plan,
    model: &'a Model<'a>,
    /// On rank 0.
    reference: &'a BTreeMap<usize, Vec<bf16>>,
}

impl Bench<'_> {
    /// Runs, times and checks one way at one number of tokens.
    fn figure(
        &self,
        name: &str,
        tokens: usize,
        partial: &Partial,
        reduction: Reduction<'_>,
    ) -> Result<Figure> {
        // SAFETY: `partial` holds the most tokens and is freed after all measurements.
        let forward = || unsafe { self.model.forward(tokens, partial.addr, reduction) };
        let time = self.device.time(&**self.host, self.plan.effort, &forward);
        // A communicator knows more of what went wrong than the device that waited for it.
        let time = reduction.poll().and(time).with_context(|| format!("{name}, {tokens} tokens"))?;
        // The output of the timed passes themselves: each gives the same.
        let output = self.model.output(tokens)?;
        let layer = time.as_secs_f64() * 1e6 / self.plan.layers.max(1) as f64;
        let slowest = self.host.all_reduce(&[layer], HostReduceOp::Max)?[0];
        let checked = reduction.is_right();
        let equal = checked && self.equal_on_all_ranks(&output)?;
        let error = match self.reference.get(&tokens) {
            Some(expected) => distance(&output, expected, self.plan.shape.hidden),
            None => 0.0,
        };
        let error = self.host.all_reduce(&[error], HostReduceOp::Max)?[0];
        Ok(Figure { name: name.to_owned(), us_per_layer: slowest, checked, equal_on_all_ranks: equal, error })
    }

    fn equal_on_all_ranks(&self, output: &[bf16]) -> Result<bool> {
        let mut hasher = DefaultHasher::new();
        output.iter().for_each(|value| value.to_bits().hash(&mut hasher));
        let all = self.host.all_gather(&hasher.finish())?;
        Ok(all.iter().all(|other| *other == all[0]))
    }
}

/// The largest distance of a row from the expected one, relative to that row's length. Infinite for what is no number.
fn distance(output: &[bf16], expected: &[bf16], hidden: usize) -> f64 {
    let mut worst = 0.0_f64;
    for (row, expected) in output.chunks(hidden).zip(expected.chunks(hidden)) {
        let (mut off, mut length) = (0.0, 0.0);
        for (&found, &wanted) in row.iter().zip(expected) {
            let (found, wanted) = (f64::from(found), f64::from(wanted));
            off += (found - wanted).powi(2);
            length += wanted.powi(2);
        }
        let relative = (off / length).sqrt();
        worst = worst.max(if relative.is_nan() { f64::INFINITY } else { relative });
    }
    worst
}

/// The bound on everything that one rank waits for another, the making of the reference included.
pub const PATIENCE: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::on_host::HostDevice;
    use comm_core::{HostFactory, run_threads};

    fn plan() -> Plan {
        Plan { shape: Shape::SMALL, layers: 2, tokens: vec![1, 3], effort: Effort { samples: 1, passes: 1 } }
    }

    #[test]
    fn ranks_together_compute_what_one_does_and_without_communication_they_do_not() {
        for world in [2, 4] {
            let reports = run_threads(world, PATIENCE, |host| {
                run(&HostDevice::default(), &host, &plan(), &[Backend { factory: &HostFactory, fused: true }])
            });
            for report in reports.unwrap() {
                let report = report.unwrap();
                assert!(report.skipped.is_empty() && report.verdict().is_ok(), "{report:?}");
                for row in &report.rows {
                    let names: Vec<&str> = row.figures.iter().map(|figure| &*figure.name).collect();
                    assert_eq!(names, ["none", "host", "host_fused"]);
                    assert!(row.figures[0].error > 10.0 * report.tolerance, "{report:?}");
                    assert!(row.figures[1..].iter().all(|figure| figure.equal_on_all_ranks));
                }
            }
        }
    }

    #[test]
    fn distances_are_relative_and_nan_is_far_away() {
        let values = |values: [f32; 4]| values.map(bf16::from_f32);
        let expected = values([3.0, 4.0, 1.0, 0.0]);
        assert_eq!(distance(&expected, &expected, 2), 0.0);
        assert_eq!(distance(&values([3.0, 4.5, 1.0, 0.0]), &expected, 2), 0.1);
        assert_eq!(distance(&values([3.0, f32::NAN, 1.0, 0.0]), &expected, 2), f64::INFINITY);
    }
}
