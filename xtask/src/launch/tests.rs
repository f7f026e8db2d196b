//! The launcher against ranks that are small shell scripts.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::events::Event;
use crate::launch::{Exit, Fault, FaultKind, LaunchReport, LaunchSpec, Mode, launch};

struct Run {
    report: LaunchReport,
    lines: Vec<String>,
    phases: Vec<(usize, String)>,
    took: Duration,
}

fn run(world: usize, script: &str, change: impl FnOnce(&mut LaunchSpec)) -> Run {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let output = {
        let lines = Arc::clone(&lines);
        Arc::new(move |line: &str| lines.lock().unwrap().push(line.to_owned()))
    };
    // `event JSON` reports an event as a rank of the workspace does.
    let prelude = r#"event() { echo "{\"rank\":$RANK,\"event\":$1}" >> "$COMM_XTASK_EVENTS"; }; "#;
    let mut spec = LaunchSpec {
        program: "/bin/sh".into(),
        args: vec!["-c".into(), format!("{prelude}{script}").into()],
        env: Vec::new(),
        world,
        mode: Mode::Processes,
        gpus: Vec::new(),
        _lease: None,
        share_gpus: false,
        standalone: false,
        timeout: Duration::from_secs(20),
        after_fault_point: None,
        comm_timeout: Duration::from_secs(1),
        fault: None,
        output,
    };
    change(&mut spec);
    let mut phases = Vec::new();
    let start = Instant::now();
    let report = launch(&spec, &mut |message| {
        if let Event::Phase(text) = &message.event {
            phases.push((message.rank, text.clone()));
        }
    })
    .unwrap();
    let lines = std::mem::take(&mut *lines.lock().unwrap());
    Run { report, lines, phases, took: start.elapsed() }
}

#[test]
fn ranks_that_share_gpus_are_told_so_and_others_need_one_each() {
    let script = r#"echo "$COMM_P2P_SHARE_DEVICES $CUDA_DEVICE_MAX_CONNECTIONS on $CUDA_VISIBLE_DEVICES"; event '"Done"'"#;
    let run = run(3, script, |spec| {
        spec.gpus = vec!["4".into(), "6".into()];
        spec.share_gpus = true;
    });
    assert_eq!(run.report.problem(), None);
    let told = run.lines.iter().filter(|line| line.ends_with("on 32 on 4,6")).count();
    assert_eq!(told, 3, "{:?}", run.lines);
    let spec = crate::job::spec(3, Mode::Processes, Duration::from_secs(5), Duration::from_secs(1)).unwrap();
    let spec = LaunchSpec { gpus: vec!["4".into(), "6".into()], ..spec };
    assert!(launch(&spec, &mut |_| {}).unwrap_err().to_string().contains("2 GPUs for 3 ranks"));
}

#[test]
fn ranks_get_the_jobs_variables_and_their_output_gets_their_rank() {
    let run = run(
        2,
        r#"echo "$RANK/$WORLD_SIZE nvls=$NCCL_NVLS_ENABLE cvd=$CUDA_VISIBLE_DEVICES"
           [ -s "$COMM_TOKEN_FILE" ] && [ "$(stat -c %a "$COMM_TOKEN_FILE")" = 600 ] && echo token >&2
           [ "$(stat -c %a "$(dirname "${COMM_RENDEZVOUS#unix:}")")" = 700 ] && echo private
           event '"Done"'"#,
        |spec| spec.gpus = vec!["4".into(), "6".into()],
    );
    assert_eq!(run.report.problem(), None);
    for rank in 0..2 {
        for what in [&format!("{rank}/2 nvls=0 cvd=4,6"), "token", "private"] {
            let line = format!("[{rank}] {what}");
            assert!(run.lines.contains(&line), "no {line:?} in {:?}", run.lines);
        }
    }
}

#[test]
fn a_rank_that_leaves_without_finishing_is_a_problem() {
    let problem = run(1, "exit 0", |_| {}).report.problem().unwrap();
    assert!(problem.contains("rank 0 left before its work was done"), "{problem}");
    let problem = run(1, "exit 3", |_| {}).report.problem().unwrap();
    assert!(problem.contains("rank 0 exited with 3"), "{problem}");
}

#[test]
fn a_hanging_job_ends_when_its_time_is_up_and_says_where_it_hung() {
    // Rank 1 does not listen to SIGTERM, so it takes the second, harder signal.
    let script = r#"event '{"Phase":"waiting for Godot"}'; [ $RANK = 1 ] && trap '' TERM; while :; do sleep 0.05; done"#;
    let run = run(2, script, |spec| spec.timeout = Duration::from_millis(400));
    assert!(run.report.timed_out);
    assert!(run.report.ranks.iter().all(|end| end.exit == Exit::Ended), "{:?}", run.report);
    assert!(run.took < Duration::from_secs(8), "{:?}", run.took);
    for line in ["  [0] still in: waiting for Godot", "  [1] still in: waiting for Godot"] {
        assert!(run.lines.iter().any(|other| other == line), "no {line:?} in {:?}", run.lines);
    }
}

#[test]
fn a_kill_fault_hits_its_rank_at_the_fault_point() {
    let script = r#"event '{"Phase":"at the fault point"}'
        if [ $RANK = 1 ]; then sleep 30; else sleep 0.3; event '"Done"'; fi"#;
    let run = run(2, script, |spec| spec.fault = Some(Fault { kind: FaultKind::Kill, rank: 1, case: None }));
    assert_eq!(run.report.ranks[0].exit, Exit::Code(0));
    assert_eq!(run.report.ranks[1].exit, Exit::Signal(9));
    assert!(run.report.fault_at.is_some());
    assert!(run.phases.contains(&(1, "at the fault point".into())));
    assert!(run.took < Duration::from_secs(8), "{:?}", run.took);
}

#[test]
fn what_hangs_after_the_fault_point_is_ended_by_a_bound_of_its_own() {
    let script = r#"sleep 0.3; event '{"Phase":"at the fault point"}'; sleep 30"#;
    let run = run(2, script, |spec| spec.after_fault_point = Some(Duration::from_millis(400)));
    assert!(run.report.timed_out);
    assert!(run.took > Duration::from_millis(700) && run.took < Duration::from_secs(8), "{:?}", run.took);
}

#[test]
fn a_stopped_rank_is_ended_once_the_others_are_through() {
    let script = r#"event '{"Phase":"at the fault point"}'
        if [ $RANK = 0 ]; then sleep 30; else sleep 0.3; event '"Done"'; fi"#;
    let run = run(2, script, |spec| spec.fault = Some(Fault { kind: FaultKind::Stop, rank: 0, case: None }));
    assert_eq!(run.report.ranks[0].exit, Exit::Ended);
    assert_eq!(run.report.ranks[1].exit, Exit::Code(0));
    assert!(!run.report.timed_out);
    assert!(run.took < Duration::from_secs(8), "{:?}", run.took);
}

#[test]
fn what_a_rank_leaves_running_is_reported_and_ended() {
    let run = run(1, r#"sleep 60 & event '"Done"'; exit 0"#, |_| {});
    let problem = run.report.problem().unwrap();
    assert!(problem.contains("still runs"), "{problem}");
    assert!(run.took < Duration::from_secs(8), "{:?}", run.took);
}

#[test]
fn a_program_that_is_not_there_is_an_error() {
    let spec = LaunchSpec {
        program: "/nonexistent/program".into(),
        args: Vec::new(),
        env: Vec::new(),
        world: 2,
        mode: Mode::Processes,
        gpus: Vec::new(),
        _lease: None,
        share_gpus: false,
        standalone: false,
        timeout: Duration::from_secs(5),
        after_fault_point: None,
        comm_timeout: Duration::from_secs(1),
        fault: None,
        output: Arc::new(|_| {}),
    };
    let error = launch(&spec, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/program"), "{error}");
}
