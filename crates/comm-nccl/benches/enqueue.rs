//! Host time of enqueueing an all-reduce through the backend, beside NCCL's own call: on a blocking communicator, and on a
//! non-blocking one followed by the wait for NCCL to have enqueued it.

#![allow(missing_docs, reason = "criterion's macros make undocumented items")]

#[path = "../tests/common/enqueue.rs"]
mod measure;

use criterion::{Criterion, criterion_group, criterion_main};
use measure::{NAMES, with_ranks};

fn enqueue(c: &mut Criterion) {
    let compared = with_ranks(|run| {
        let mut group = c.benchmark_group("enqueue all_reduce");
        for (which, name) in NAMES.into_iter().enumerate() {
            group.bench_function(name, |b| {
                b.iter_custom(|iterations| match run(which, iterations) {
                    Ok(time) => time,
                    Err(error) => panic!("{error}"),
                });
            });
        }
        group.finish();
    });
    if let Err(error) = compared {
        println!("SKIP: {error}");
    }
}

criterion_group!(benches, enqueue);
criterion_main!(benches);
