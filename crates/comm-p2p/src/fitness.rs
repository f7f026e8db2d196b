//! Whether this rank's device is fit, for whoever needs to know.
//!
//! No lock is held while the driver is asked. The driver takes its time over a fault, more so when another process on the
//! host has one too, and each thread that has met the fault must be able to say so while another one is still asking.

use std::sync::{Arc, Mutex};

use comm_core::{Result, StreamHandle};
use comm_kernels::raw::Event;

use crate::state::lock;
use crate::stream::Stream;

/// What can be asked about a device, by several threads at once.
pub(crate) trait Probe {
    /// The device's error, if it has one. Waits for nothing; the device's context is current.
    fn check(&self) -> Result<()>;
}

/// An error that stays with a context shows at whatever is enqueued next, and this is what can be enqueued without harm.
pub(crate) struct Sentinel {
    stream: Stream,
    /// There until this is dropped.
    event: Option<Event>,
}

// SAFETY: what threads share are names of the driver's objects, which it locks. That two record the event at once does no
// harm: of the answers only errors count, and those are the context's.
unsafe impl Sync for Sentinel {}

impl Sentinel {
    /// The context is current.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { stream: Stream::new()?, event: Some(Event::new()?) })
    }
}

impl Probe for Sentinel {
    fn check(&self) -> Result<()> {
        let Some(event) = &self.event else { return Ok(()) };
        event.record(self.stream.handle())?;
        event.is_done().map(drop)
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            event.destroy();
        }
    }
}

impl Fitness {
    /// Enqueues work that waits for nothing, and that nothing waits for, on a stream of its own. The context is current.
    pub(crate) fn enqueue(&self, work: impl FnOnce(StreamHandle) -> Result<()>) -> Result<()> {
        let sentinel = lock(&self.0).clone();
        sentinel.map_or(Ok(()), |sentinel| work(sentinel.stream.handle()))
    }

    /// Waits until what was enqueued is done. The context is current.
    pub(crate) fn settle(&self) -> Result<()> {
        let sentinel = lock(&self.0).clone();
        sentinel.map_or(Ok(()), |sentinel| sentinel.stream.wait())
    }
}

/// Access to a probe that somebody else gives back.
pub(crate) struct Fitness<P = Sentinel>(Mutex<Option<Arc<P>>>);

impl<P: Probe> Fitness<P> {
    pub(crate) fn new(probe: Option<Arc<P>>) -> Self {
        Self(Mutex::new(probe))
    }

    /// The device's error, if earlier work on it has failed. Waits for nothing, not even for another thread that asks. The
    /// context is current.
    pub(crate) fn ask(&self) -> Result<()> {
        let probe = lock(&self.0).clone();
        probe.map_or(Ok(()), |probe| probe.check())
    }

    /// The probe is given up, so that nobody asks it any more.
    pub(crate) fn forget(&self) {
        lock(&self.0).take();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use comm_core::CommError;

    use super::*;

    const PATIENT: Duration = Duration::from_secs(10);

    /// A device whose driver is stuck in a call until the test says so, on the thread that asks first.
    struct Stuck {
        inside: Mutex<Option<mpsc::Sender<()>>>,
        release: Mutex<mpsc::Receiver<()>>,
    }

    impl Probe for Stuck {
        fn check(&self) -> Result<()> {
            let first = lock(&self.inside).take();
            if let Some(inside) = first {
                inside.send(()).unwrap();
                lock(&self.release).recv_timeout(PATIENT).unwrap();
            }
            Err(CommError::Cuda { call: "cuEventRecord".into(), code: 700, message: "illegal".into() })
        }
    }

    /// A rank that drops its communicator over an error must not be taken for one that left, whatever the driver does to
    /// its watchdog meanwhile.
    #[test]
    fn an_error_is_known_while_another_thread_is_still_asking() {
        let (inside, is_inside) = mpsc::channel();
        let (release, released) = mpsc::channel();
        let stuck = Stuck { inside: Mutex::new(Some(inside)), release: Mutex::new(released) };
        let fitness = Fitness::new(Some(Arc::new(stuck)));
        let fitness = &fitness;
        std::thread::scope(|scope| {
            let watchdog = scope.spawn(move || fitness.ask());
            is_inside.recv_timeout(PATIENT).unwrap();
            let (answer, answered) = mpsc::channel();
            scope.spawn(move || answer.send(fitness.ask()));
            let answer = answered.recv_timeout(PATIENT / 10);
            release.send(()).unwrap();
            assert!(matches!(answer, Ok(Err(CommError::Cuda { code: 700, .. }))), "{answer:?}");
            assert!(watchdog.join().unwrap().is_err());
        });
    }

    #[test]
    fn nobody_asks_what_was_given_up() {
        struct Gone;
        impl Probe for Gone {
            fn check(&self) -> Result<()> {
                panic!("asked")
            }
        }
        let fitness = Fitness::new(Some(Arc::new(Gone)));
        fitness.forget();
        assert!(fitness.ask().is_ok());
    }
}
