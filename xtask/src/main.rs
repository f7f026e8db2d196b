//! The workspace's own commands: `cargo xtask kernels`.

mod kernels;

use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Kernel builds, tests, benchmarks and multi-GPU orchestration")]
enum Command {
    /// Compile the CUDA kernels; installs NVIDIA's compiler into the target folder if there is none.
    Kernels(kernels::KernelsArgs),
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Kernels(args) => kernels::run(&args),
    }
}
