//! The backend's factory: what this rank can do, and communicators.

use std::sync::{Arc, Mutex};

use comm_core::{BackendFactory, Capability, CommError, CreateContext, DeviceComm, MemoryKind, Result};
use comm_kernels::Kernels;
use comm_kernels::driver::error;

use super::create;
use super::limits::{Limits, OLDEST, WATCHED, fact};
use super::options::Options;
use super::state::{Base, lock};
use crate::driver;
use crate::result::NcclLibrary;

/// Raised when ranks of different builds would no longer understand each other's facts or reports.
const PROTOCOL: u32 = 6;

/// Makes communicators over NCCL.
///
/// Where a rank has no compiled kernels, communicators are made without the fused norms, and `supports` says why; and
/// captured work is not watched for time-outs, which the capabilities' fact `nccl.watch_graphs` says.
///
/// # Timeout
/// A call that is not captured has [`CreateContext::timeout`] from when it is enqueued, or from when the communicator's
/// call before it was through, whichever is later. What the caller enqueued ahead of it on the stream counts too: choose
/// a timeout longer than the longest work between two calls, or calls behind such work end in a time-out that names ranks
/// which are only computing. A captured call's time begins when the replay reaches it.
///
/// Captured calls that follow one another on their streams with nothing captured in between are a run, and have one
/// timeout together, from when the replay reaches the first of them: up to 32 calls and up to 256 MiB of operands, or fewer
/// where a tenth of the timeout has no room for that at 5 ms a call or at 100 MB/s; a larger call is alone. Their own work
/// is a small part of the timeout then. But where another rank computes between the same calls, all that it computes there
/// within a run has to fit the timeout; `inline` below gives each call its own. An error names the first call of the run
/// that does not end.
///
/// # Options
/// From [`CreateContext::options`], all optional, all whole numbers unless said otherwise. Ranks whose options
/// differ get no communicator:
///
/// | name | meaning |
/// |---|---|
/// | `nccl.min_ctas`, `nccl.max_ctas` | bounds on the CTAs of a kernel |
/// | `nccl.cga_cluster_size` | CTAs in a cluster |
/// | `nccl.cta_policy` | NCCL's `CTAPolicy` |
/// | `nccl.traffic_class` | the network's traffic class |
/// | `nccl.split_share` | 1: a split shares its parent's resources |
/// | `nccl.net_name` | the network module, text |
/// | `nccl.staging_bytes` | device memory for pitched gathers, default 8388608; 0 for none |
/// | `nccl.watch_graphs` | `on` (the default): time-outs hold in replayed graphs too; `off`: there only deaths, failures and aborts end a wait; `beside`, `inline`: on, and how, see below |
///
/// Where `nccl.watch_graphs` is not given, `COMM_NCCL_WATCH_GRAPHS` in the environment decides, with the same values, and on
/// all ranks alike.
///
/// Graphs are watched by tiny kernels. `beside` puts one before and one behind each run of calls, as nodes that only the
/// graph's end waits for: what they cost, some 2.5 us between two H200s at every size, is shared by the run's calls. A
/// kernel of the caller's that leaves not one thread's place on the device for as long as the timeout can make a run look
/// stuck that is through. `inline` puts them before and behind each call, into the stream's chain, which costs each call
/// some 2.5 us: each has a timeout and a name of its own. `on` is `beside`.
///
/// Calls that are not captured are watched by events, which cost the device nothing; but they reach NCCL through a thread
/// that it starts for each call on a non-blocking communicator, which takes some 48 us of host time more than a blocking
/// one would (`benches/enqueue.rs`). Replayed graphs pay nothing of that.
///
/// # Why not blocking
/// A call on a blocking communicator can wait inside NCCL, on the caller's thread, for ranks that never come: the first
/// use of an algorithm, or of a pair of ranks, connects them, and a full launch queue waits for the device. Only NCCL's
/// abort flag ends such a wait. `ncclCommAbort`, called by another thread, sets the flag and then frees the communicator
/// under the thread that is still inside. A blocking communicator that is split from a non-blocking one can be reached
/// through its parent, whose abort sets the child's flag, but only if parent and child share resources, and then the
/// parent's other children, the groups that a program split off, have that flag in common: the failure of one group would
/// make the kernels of all others leave with garbage. It would take a native parent for each communicator's own use, three
/// native communicators in place of one, and behaviour that NCCL does not promise.
#[derive(Clone, Default)]
pub struct NcclFactory {
    library: Arc<Mutex<Option<Arc<NcclLibrary>>>>,
}

impl NcclFactory {
    /// A factory that finds the library when it first needs it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A factory over a library that is already loaded.
    #[must_use]
    pub fn with_library(library: Arc<NcclLibrary>) -> Self {
        Self { library: Arc::new(Mutex::new(Some(library))) }
    }

    /// The library, loaded on first use. A failure is not remembered: the caller may put it right.
    fn library(&self) -> Result<Arc<NcclLibrary>> {
        let mut slot = lock(&self.library);
        if let Some(library) = &*slot {
            return Ok(library.clone());
        }
        let library = NcclLibrary::load()?;
        *slot = Some(library.clone());
        Ok(library)
    }

    fn base(&self, context: &CreateContext, limits: Limits, ordinal: usize) -> Result<Base> {
        let library = self.library()?;
        check_version(&library)?;
        let device = driver::context(ordinal)?;
        Ok(Base {
            kernels: if limits.has_kernels() { Some(Kernels::load(&device)?) } else { None },
            library,
            context: device,
            limits,
            timeout: context.timeout,
            checked: context.checked,
            options: Arc::new(Options::parse(&context.options)?),
        })
    }
}

fn ordinal(context: &CreateContext) -> Result<usize> {
    match context.memory {
        MemoryKind::Cuda { ordinal } => Ok(ordinal),
        other @ MemoryKind::Host => Err(CommError::invalid(
            "memory",
            format!(
                "the nccl backend works on CUDA devices, not on {other:?}; choose a device or the host backend"
            ),
        )),
    }
}

fn check_version(library: &NcclLibrary) -> Result<()> {
    if library.version() >= OLDEST {
        return Ok(());
    }
    Err(CommError::Library {
        library: library.path().display().to_string().into(),
        reason: format!("it is NCCL {}, but {OLDEST} or newer is needed", library.version()),
    })
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "an unnamed host".into(), |name| name.trim().to_owned())
}

impl BackendFactory for NcclFactory {
    fn name(&self) -> &str {
        crate::NAME
    }

    fn probe(&self, context: &CreateContext) -> Result<Capability> {
        let ordinal = ordinal(context)?;
        let options = Options::parse(&context.options)?;
        let device = driver::context(ordinal)?;
        let library = self.library()?;
        check_version(&library)?;
        let failed = |call: &'static str, failure: cudarc::driver::DriverError| error(call, failure.0);
        let uuid = device.uuid().map_err(|error| failed("cuDeviceGetUuid", error))?;
        let (major, minor) =
            device.compute_capability().map_err(|error| failed("cuDeviceGetAttribute", error))?;
        let version = library.version();
        let code = version.major * 10_000 + version.minor * 100 + version.patch;
        let uuid: String = uuid.bytes.iter().map(|&byte| format!("{:02x}", byte as u8)).collect();
        let kernels = Kernels::load(&device).err().map_or_else(String::new, |error| error.to_string());
        let watch = match (options.watch_graphs.is_some(), kernels.is_empty()) {
            (true, true) => WATCHED,
            (true, false) => "no compiled kernels",
            (false, _) => "off",
        };
        let facts = [
            (fact::VERSION, code.to_string()),
            (fact::GPU, uuid),
            (fact::COMPUTE, (major * 10 + minor).to_string()),
            (fact::PROCESS, format!("{}/{}", host_name(), std::process::id())),
            (fact::HOST, host_name()),
            (fact::KERNELS, kernels),
            (fact::WATCH, watch.to_owned()),
            (fact::OPTIONS, options.describe()),
        ];
        Ok(Capability {
            protocol: PROTOCOL,
            facts: facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        })
    }

    fn create(&self, context: &CreateContext, capabilities: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
        let ordinal = ordinal(context)?;
        if capabilities.len() != context.host.size() {
            return Err(CommError::invalid(
                "capabilities",
                format!("{} given for {} ranks", capabilities.len(), context.host.size()),
            ));
        }
        let limits = Limits::agree(capabilities)?;
        let base = self.base(context, limits, ordinal);
        Ok(Arc::new(create::create(context, base, ordinal)?))
    }
}
