//! The exchange kernels' own source, compiled for the CPU, between 2 to 8 ranks: packets, Lamport packs and lines, in random
//! sequences of calls that share their channels, with ranks that rest and hurry at random, round numbers that wrap, and
//! flags that were last raised almost a wrap ago; and what a rank does that its host has hushed.
//!
//! Only the instructions that a CPU has not are replaced, function by function; `emulator/gpu.h` says what stands in for a
//! GPU. What weaker memory orders do is checked by the models in comm-p2p's tests, and everything by GPUs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// File, function, and what it does on a CPU.
const REPLACED: [(&str, &str, &str); 11] = [
    ("link.cuh", "void allow_successor()", ""),
    ("link.cuh", "void wait_for_predecessor()", ""),
    ("wait.cuh", "uint64_t now_ns()", "return gpu::now_ns();"),
    (
        "wire.cuh",
        "void store_pack(char* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d)",
        "const uint32_t words[] = {a, b, c, d}; gpu::store(to, words, 16);",
    ),
    ("wire.cuh", "uint4 load_pack(const char* from)", "gpu::yield(); return gpu::load<uint4>(from);"),
    ("wire.cuh", "static void raise(uint32_t* at, uint32_t round)", "gpu::store(at, &round, 4);"),
    ("wire.cuh", "static void raise_after_writes(uint32_t* at, uint32_t round)", "gpu::store(at, &round, 4);"),
    (
        "wire.cuh",
        "static bool raised(const uint32_t* at, uint32_t round, uint32_t ahead = kAhead)",
        "gpu::yield(); return gpu::load<uint32_t>(at) - round < ahead;",
    ),
    ("wire.cuh", "void fence_system()", ""),
    // All that the lines need of the hardware: their last words are not there before the rest.
    (
        "lines.cuh",
        "void send(char* slot) const",
        "for (bool last : {false, true}) {
             __syncwarp();
             for (uint32_t u = 0; u < kPacks && seals() == last; u++)
                 store_pack(slot + (u * 32 + lane()) * kPackBytes, w[u].w[0], w[u].w[1], w[u].w[2], w[u].w[3]);
         }",
    ),
    (
        "lines.cuh",
        "void load(const char* slot) { // of Seals",
        "if (!Burst::seals()) return;
         for (uint32_t u = 0; u < Burst::kPacks; u++)
             w[u] = gpu::load<uint32_t>(slot + (u * 32 + Burst::lane()) * kPackBytes + 12);",
    ),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator")
}

/// Puts `body` in the place of a function's.
fn replace(source: &mut String, function: &str, body: &str) {
    // The last function of that name, where there are two.
    let (signature, last) =
        function.split_once(" { //").map_or((function, false), |(signature, _)| (signature, true));
    let found = if last { source.rfind(signature) } else { source.find(signature) };
    let begin = found.unwrap_or_else(|| panic!("there is no {function}"));
    let open = begin + source[begin..].find('{').unwrap();
    let mut depth = 0_usize;
    let length = source[open..]
        .find(|c| {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            depth == 0
        })
        .unwrap();
    source.replace_range(open..=open + length, &format!("{{ {body} }}"));
}

/// Compiles the kernels as they are but for the replacements and `change`: a file, and one of its passages with what is to
/// stand there. `None` without a compiler.
fn emulator(name: &str, worlds: &str, change: Option<(&str, &str, &str)>) -> Option<PathBuf> {
    let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/p2p");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulator-{name}"));
    let sources = out.join("p2p");
    std::fs::create_dir_all(&sources).unwrap();
    for file in ["link", "wire", "wait", "meet", "numeric", "gather", "reduce", "lines", "line_sums"] {
        let file = format!("{file}.cuh");
        let mut source = std::fs::read_to_string(cuda.join(&file)).unwrap();
        for (_, function, body) in REPLACED.iter().filter(|(of, ..)| *of == file) {
            replace(&mut source, function, body);
        }
        assert!(!source.contains("asm volatile"), "{file} has instructions that nothing here stands for");
        if let Some((_, from, to)) = change.filter(|(of, ..)| *of == file) {
            assert_eq!(source.matches(from).count(), 1, "{from} in {file}");
            source = source.replace(from, to);
        }
        std::fs::write(sources.join(file), source).unwrap();
    }
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let program = out.join("exchange");
    let output = Command::new(&compiler)
        .arg(format!("-DWORLDS(X)={worlds}"))
        .args(["-std=c++20", "-O1", "-w", "-o"])
        .arg(&program)
        .args(["-I".as_ref(), out.as_os_str(), "-I".as_ref(), folder().join("include").as_os_str()])
        .arg(folder().join("exchange.cpp"))
        .output();
    match output {
        Ok(output) if output.status.success() => Some(program),
        Ok(output) => panic!("{compiler}: {}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => {
            println!("SKIP: {compiler}: {error}");
            None
        }
    }
}

fn run(program: &Path, seeds: std::ops::Range<u32>) -> Output {
    let (from, to) = (seeds.start.to_string(), seeds.end.to_string());
    Command::new(program).args([from, to]).output().unwrap()
}

#[test]
fn the_exchange_kernels_are_right_between_two_to_eight_ranks() {
    let Some(program) = emulator("right", "X(2)X(3)X(4)X(5)X(6)X(7)X(8)", None) else { return };
    let output = run(&program, 0..12);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Worlds in which every mutant shows. More take much longer to compile.
const FEW: &str = "X(2)X(3)";

#[test]
fn without_a_protection_a_result_is_wrong_or_none_comes() {
    let mutants = [
        ("tokens", ("lines.cuh", "if (k >= kBuffers) all_through(first + k - kBuffers);", "")),
        (
            "order",
            ("line_sums.cuh", "if (j + i == rank && rank != 0)", "if (j + i + 1 == rank && rank != 0)"),
        ),
        ("seals", ("lines.cuh", "mine = mine && w[u] == round;", "mine = mine && (u > 0 || w[u] == round);")),
        (
            "marks",
            (
                "wire.cuh",
                "static constexpr bool kRestores = true;",
                "static constexpr bool kRestores = false;",
            ),
        ),
        // What a hushed rank must not do: send, stay hushed, pass on what it did not wait for.
        (
            "hush",
            (
                "link.cuh",
                "silent = *reinterpret_cast<volatile uint32_t*>(link.broken) != kWhole;",
                "silent = false;",
            ),
        ),
        (
            "broken",
            ("link.cuh", "if (silent) *reinterpret_cast<volatile uint32_t*>(link.broken) = kBroken;", ""),
        ),
        (
            "giving-up",
            (
                "wait.cuh",
                "if (broken == kHushed) *reinterpret_cast<volatile uint32_t*>(link.broken) = kBroken;",
                "",
            ),
        ),
        (
            "passing-on",
            (
                "reduce.cuh",
                "publish(uint32_t round, const Data& v) {\n        if (waiter.gave_up) return;",
                "publish(uint32_t round, const Data& v) {",
            ),
        ),
        // Flags that nobody has raised since before round 0 stand ahead of the last rounds before the wrap.
        ("lifts", ("link.cuh", "if (int32_t(seen - past) < 0) atomicCAS_system(at, seen, past);", "")),
    ];
    for (name, change) in mutants {
        let Some(program) = emulator(name, FEW, Some(change)) else { return };
        let output = run(&program, 0..40);
        assert!(!output.status.success(), "nothing noticed {name}");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("FAILED"), "{name}: {said} {:?}", output.status);
    }
}
