//! What the libraries log while a fault is tested: a line each on standard error, with the time by the clock that events have.
//!
//! Who knew what, and when, is asked once a verdict is bad, and then too late. The launcher shows these lines only then.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::events::monotonic_nanos;

/// Starts logging, for the rest of the process.
pub fn start() {
    // Whoever was first logs as well.
    let _ = tracing::subscriber::set_global_default(Lines);
}

struct Lines;

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && metadata.target().starts_with("comm_")
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::DEBUG)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let thread = std::thread::current();
        let mut words = Words::default();
        event.record(&mut words);
        let line = line(monotonic_nanos(), thread.name().unwrap_or("?"), event.metadata().target(), &words);
        // In one piece, so that lines of several threads do not mix. A rank whose words are lost goes on.
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn line(nanos: u64, thread: &str, target: &str, words: &Words) -> String {
    let at = Duration::from_nanos(nanos).as_secs_f64();
    format!("{at:.6} s, {thread}, {target}: {}{}\n", words.message, words.fields)
}

/// An event's message, and its other fields as ` name=value` each.
#[derive(Default)]
struct Words {
    message: String,
    fields: String,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    struct Kept(Arc<Mutex<Vec<String>>>);

    impl Subscriber for Kept {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            Lines.enabled(metadata)
        }
        fn new_span(&self, span: &Attributes<'_>) -> Id {
            Lines.new_span(span)
        }
        fn record(&self, _: &Id, _: &Record<'_>) {}
        fn record_follows_from(&self, _: &Id, _: &Id) {}
        fn event(&self, event: &Event<'_>) {
            let mut words = Words::default();
            event.record(&mut words);
            self.0.lock().unwrap().push(line(12_345_678_901, "main", event.metadata().target(), &words));
        }
        fn enter(&self, _: &Id) {}
        fn exit(&self, _: &Id) {}
    }

    #[test]
    fn a_line_says_when_who_and_what() {
        let kept = Arc::new(Mutex::new(Vec::new()));
        tracing::subscriber::with_default(Kept(Arc::clone(&kept)), || {
            let cause = "no room";
            tracing::warn!(target: "comm_p2p::state", rank = 1, %cause, "communicator failed");
            tracing::warn!(target: "somebody_else", "not asked for");
        });
        let line = "12.345679 s, main, comm_p2p::state: communicator failed rank=1 cause=no room\n";
        assert_eq!(*kept.lock().unwrap(), [line]);
    }
}
