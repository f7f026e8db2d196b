//! The backend's factory: what this rank can do, and communicators.

use std::collections::BTreeSet;
use std::sync::Arc;

use comm_core::{
    BackendFactory, Capability, CommError, CreateContext, Deadline, DeviceComm, MemoryKind, Result,
};
use comm_kernels::Kernels;
use comm_kernels::driver::{device_count, error, version};
use comm_kernels::p2p::{MAX_RANKS, Overlap, P2pKernels};
use comm_kernels::raw;
use cudarc::driver::{CudaContext, DriverError, sys};

use crate::comm::{P2pComm, hosts};
use crate::create;
use crate::options::Options;
use crate::placement;
use crate::state::{Base, Device};
use crate::tables::MIXED;
use crate::topology::links::Links;

/// Raised when ranks of different builds would no longer understand each other.
const PROTOCOL: u32 = 4;

/// Makes communicators over peer-to-peer memory, for 1 to 8 ranks of one host.
///
/// # Options
/// From [`CreateContext::options`], all optional; all ranks pass the same:
///
/// | name | meaning | default |
/// |---|---|---|
/// | `p2p.staging_bytes` | staging memory of a rank | 33554432 |
/// | `p2p.pair_bytes` | the largest chunk of a send | 1048576 |
/// | `p2p.packet_slots`, `p2p.lamport_slots`, `p2p.line_slots` | packs in flight between two ranks | 33792, 67584, 84480 |
/// | `p2p.cell_ctas` | blocks of the largest kernels | 132 |
/// | `p2p.algorithm` | use this one wherever it can be, as `COMM_P2P_ALGO` does | by size |
/// | `p2p.topology` | impose this one, as `COMM_P2P_TOPOLOGY` does: `fully_connected`, `hybrid_cube_mesh` (of 8 ranks; of fewer, its first part) or `other` | as found |
/// | `p2p.table` | a file of tables by which algorithms are chosen, as `COMM_P2P_TABLE` names one | the shipped ones |
/// | `p2p.symmetric_operands` | `on` or `off`: the promise described below | `off` |
/// | `p2p.graph_registration` | `on` or `off`: captured results are registered after the capture, see below | `off` |
/// | `p2p.graph_entries` | captured results that graphs may hold at a time; 128 bytes of device memory each | 8192 |
/// | `p2p.share_devices` | for tests: `on` or `off`, as `COMM_P2P_SHARE_DEVICES`: several ranks may be on one device, see below | `off` |
/// | `p2p.first_round` | for tests: the first round's number | 0 |
/// | `p2p.stall_ns` | for tests: how long every kernel sleeps before its first wait, or behind it where it only waits | 0 |
/// | `p2p.stall_rank` | for tests: the only rank whose kernels do | all |
/// | `p2p.test_clear_peers` | for checkers of uninitialised reads, which do not see what other processes store: every rank clears all ranks' staging memory at first | `off` |
/// | `p2p.test_single_buffer` | for tests only, **gives wrong results**: most calls use one buffer instead of four, or one half of the staging memory instead of both | `off` |
/// | `p2p.test_copies_when_broken` | for tests only, **may give others wrong results**: a rank that has given up a wait goes on copying | `off` |
/// | `p2p.test_unordered_streams` | for tests only, **gives wrong results**: calls on several streams may overtake each other | `off` |
/// | `p2p.test_corrupt_pair` | for tests: `a-b`: what rank `a` stores into rank `b`'s memory while the devices are checked is lost, so that creation finds the pair broken; it looks whatever `COMM_P2P_CHECK` and the kept verdict say, and keeps none | none |
///
/// # Where peer-to-peer cannot be used
/// What a rank can tell alone, its probe says: too old a GPU, too few others in reach, ranks that do not meet over a unix
/// socket. The rest shows when the ranks have met: devices that may not map each other's memory, ranks of an imposed mesh
/// that do not reach each other, and pairs whose stores or loads go astray although the driver admits them. Creation then
/// ends on all ranks with [`Unsupported`](CommError::Unsupported) of [`OpKind::Create`](comm_core::OpKind::Create) and the
/// reason, all memory given back, and [`create_tiered`](comm_core::Registry::create_tiered) goes on with the next backend.
///
/// # Memory
/// A communicator takes memory on each rank's device, in proportion to the number of ranks where not said otherwise. With
/// the defaults and 8 ranks it is 328 MB: 138 MB for the cells of large sums (`p2p.cell_ctas`), 69 MB for
/// `p2p.lamport_slots`, 43 MB for `p2p.line_slots`, 35 MB for `p2p.packet_slots`, 34 MB of staging memory, whatever the number of ranks, and 8 MB for
/// `p2p.pair_bytes`. Fewer slots or blocks, or less staging memory, cost speed at the sizes that
/// would use them.
///
/// # Lines
/// Where NVLink is known to join every pair of ranks (imposing a topology makes no links, and a mesh with gaps sends none),
/// gathers, broadcasts and reduce-scatters of middle size, and large gathers and broadcasts of unregistered results, go by
/// lines: 128 bytes that one warp instruction stores, whole once their last word has arrived. PTX promises this of 16 bytes
/// only; of lines it is a property of NVLink and the cache, which NCCL's LL128 protocol assumes too.
///
/// # Symmetric operands
/// Large results can be stored straight into the other ranks' buffers. A rank then computes from its own operand where
/// the others' lie, and cannot see at enqueueing where they really are. It is done for results in memory of
/// [`allocate`](DeviceComm::allocate), which the ranks make together, and must be used together: at one offset of one
/// allocation on all ranks, or in no allocation on any. For results in [`register`](DeviceComm::register)ed buffers it
/// is done only with `p2p.symmetric_operands = on`, by which the caller promises the same of registrations: a call's
/// result lies at one offset of one registration on every rank, or in no registration on any. Otherwise operands in
/// registered buffers may lie anywhere, and travel by way of the communicator's memory. Breaking the promise corrupts
/// results and may write into registered memory that the call does not name, or let the ranks wait for each other until
/// the timeout. Checked mode compares the places and refuses the call.
///
/// # Fewer devices than ranks
/// With `p2p.share_devices = on` several ranks may be on one device, so that worlds of up to 8 ranks can be tested on fewer
/// GPUs, or on one. It is a facility for tests: times mean nothing. Every rank then plans kernels for a share of the device,
/// small enough for the kernels of all its ranks to be resident at once, for two communicators at a time, and no kernel
/// starts before the one before it on its stream has ended. Some shapes are never launched there, above all norms of many
/// blocks in clusters of 8.
///
/// As threads of one process, ranks on a device share its context, and what holds up the context holds up all of them:
/// - `CUDA_DEVICE_MAX_CONNECTIONS` must be 32 before the process uses CUDA, or streams are put in line behind one another;
///   creation refuses less.
/// - What may wait for the whole device, in the way that freeing memory does (`cuMemFree`, `cuMemFreeHost`,
///   `cuCtxSynchronize`; perhaps also allocating, loading modules and dropping graphs), waits for kernels that may be
///   waiting for this very thread. Do it where all ranks have made the same calls, and let all ranks be through with it
///   before the next. The communicator's own such calls (creation, `split`, `allocate`, `free`, `register_captured`,
///   `close`) are collective, and end on no rank before they have on all.
///
/// As processes, without NVIDIA's MPS, ranks take turns on a device, a few milliseconds each: every wait for another rank
/// takes at least a turn. It works, slowly; timeouts have to be generous.
///
/// # Several communicators on a device
/// Kernels of large calls fill their device, and wait there for the other ranks'. So calls of two communicators whose
/// ranks share devices (a world and a [`split`](DeviceComm::split) of it, say) must come to run in one order on all ranks:
/// on one stream, or with streams that wait for each other. On streams of their own one rank's device may be full of the
/// one's kernel, and another's of the other's, until both time out.
///
/// # After a failure
/// A rank that was only late may still be about to store into the results of calls that the others have given up. It stops
/// as soon as it learns of the failure, which takes its watchdog some milliseconds once the rank runs at all. Memory of
/// [`allocate`](DeviceComm::allocate) cannot be harmed by that, once freed. Results that the caller owns (registered, or captured with
/// `p2p.graph_registration`) must not be freed or used for something else before every rank has closed or dropped the
/// communicator, or has died.
///
/// # Graphs
/// Every operation can be captured and replayed as it is; results in memory of [`allocate`](DeviceComm::allocate) are
/// then reached directly, others travel by scratch memory where they are large. With `p2p.graph_registration = on`, large
/// all-reduces (sums of f32, f16 and bf16) and all-gathers captured on such other results are replayed as fast as on
/// registered ones, for which the ranks call [`register_captured`](DeviceComm::register_captured) between capture and
/// replay. In return:
/// - a replay before that call ends the communicator with [`NotRegistered`](CommError::NotRegistered);
/// - a call that one rank captures, all ranks capture, and replay at the same place of their order of calls;
/// - a result stays allocated on every rank until the graphs that hold the call are gone on all ranks.
///
/// The results of different ranks may lie anywhere. Where a rank's cannot be made known to the others (memory of a pool,
/// or of a virtual allocation), the call keeps to scratch memory on all ranks, with a reason
/// ([`P2pComm::captured_staging_reasons`]). What a graph holds is given back when the graph is dropped. The switch is off
/// by default because a program that captures and replays without knowing of the call should work; one that makes its
/// own step of registering graph buffers, as engines with a custom all-reduce do, turns it on and makes the call there.
#[derive(Clone, Copy, Default, Debug)]
pub struct P2pFactory;

impl P2pFactory {
    /// Makes this rank's end of a communicator, as [`create`](BackendFactory::create) does, with the backend's own
    /// methods.
    ///
    /// # Errors
    /// As [`create`](BackendFactory::create).
    pub fn connect(&self, context: &CreateContext, capabilities: &[Capability]) -> Result<P2pComm> {
        let hosts = hosts(&context.host, Deadline::after(context.timeout))?;
        create::create(hosts, base(context, capabilities), false)
    }
}

/// What a rank reports of itself.
pub(crate) mod fact {
    pub(crate) const HOST: &str = "host";
    pub(crate) const GPU: &str = "gpu";
    pub(crate) const KIND: &str = "kind";
    pub(crate) const MULTIPROCESSORS: &str = "multiprocessors";
    pub(crate) const DRIVER: &str = "driver";
    /// Whether its options let ranks share devices: [`ON`], or anything else.
    pub(crate) const SHARE_DEVICES: &str = "share_devices";
    pub(crate) const ON: &str = "on";
}

fn ordinal(context: &CreateContext) -> Result<usize> {
    match context.memory {
        MemoryKind::Cuda { ordinal } => Ok(ordinal),
        other @ MemoryKind::Host => Err(CommError::invalid(
            "memory",
            format!(
                "the p2p backend works on CUDA devices, not on {other:?}; choose a device or the host backend"
            ),
        )),
    }
}

/// A name of the running system that two hosts do not share.
fn host_name() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let boot = read("/proc/sys/kernel/random/boot_id");
    format!("{} {}", read("/proc/sys/kernel/hostname").trim(), boot.trim())
}

/// The driver's version: as the kernel module says it, and the newest CUDA that it knows.
fn driver_version() -> Result<String> {
    let module = std::fs::read_to_string("/sys/module/nvidia/version").unwrap_or_default();
    let (major, minor) = version()?;
    Ok(format!("{} CUDA {major}.{minor}", module.trim()))
}

fn attribute(device: &CudaContext, attribute: sys::CUdevice_attribute) -> Result<u32> {
    let value =
        device.attribute(attribute).map_err(|DriverError(code)| error("cuDeviceGetAttribute", code))?;
    Ok(u32::try_from(value).unwrap_or(0))
}

fn uuid(device: &CudaContext) -> Result<String> {
    let uuid = device.uuid().map_err(|DriverError(code)| error("cuDeviceGetUuid", code))?;
    Ok(uuid.bytes.iter().map(|&byte| format!("{:02x}", byte as u8)).collect())
}

fn kind(device: &CudaContext) -> Result<String> {
    device.name().map_err(|DriverError(code)| error("cuDeviceGetName", code))
}

/// The kind of GPU that all ranks have.
fn common_kind(capabilities: &[Capability]) -> String {
    let mut kinds = capabilities.iter().map(|c| c.facts.get(fact::KIND));
    let first = kinds.next().flatten().cloned().unwrap_or_default();
    if kinds.all(|kind| kind == Some(&first)) { first } else { MIXED.into() }
}

/// Refuses what the kernels and the memory they need cannot do.
fn check_device(device: &CudaContext) -> Result<()> {
    use sys::CUdevice_attribute as A;
    let major = attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    if major < 9 {
        return Err(CommError::invalid(
            "memory",
            format!("the GPU is of compute capability {major}.x; the kernels need 9.0 (Hopper) or later"),
        ));
    }
    let needed = [
        (A::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, "virtual memory management"),
        (
            A::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            "sharing memory by file descriptor",
        ),
    ];
    for (feature, name) in needed {
        if attribute(device, feature)? == 0 {
            return Err(CommError::invalid("memory", format!("the GPU or its driver lacks {name}")));
        }
    }
    Ok(())
}

/// Refuses a device that cannot reach as many others as there are ranks.
fn check_peers(ordinal: usize, ranks: usize) -> Result<()> {
    let mut reachable = 0;
    let devices = device_count()?;
    for other in (0..devices).filter(|&other| other != ordinal) {
        let mut can = 0;
        // SAFETY: both ordinals exist; the pointer is valid for the write.
        let code = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, ordinal as i32, other as i32) };
        raw::check("cuDeviceCanAccessPeer", code)?;
        reachable += usize::from(can != 0);
    }
    // Ranks that see their own device alone cannot ask; the check of every pair after creation tells.
    if devices > 1 && reachable + 1 < ranks.min(devices) && !is_meshed(ordinal, ranks)? {
        return Err(CommError::invalid(
            "memory",
            format!(
                "GPU {ordinal} reaches only {reachable} of the other {} GPUs by peer access; see `nvidia-smi topo -p2p \
                 rw`",
                devices - 1
            ),
        ));
    }
    Ok(())
}

/// Whether the device has as many neighbours by direct links as one in a hybrid cube mesh, and so need not reach all.
fn is_meshed(ordinal: usize, ranks: usize) -> Result<bool> {
    let links = Links::of_device(ordinal)?;
    let ends: BTreeSet<&String> = links.direct.iter().collect();
    Ok(ranks == 8 && ends.len() == 4)
}

impl BackendFactory for P2pFactory {
    fn name(&self) -> &str {
        crate::NAME
    }

    fn probe(&self, context: &CreateContext) -> Result<Capability> {
        let ordinal = ordinal(context)?;
        let ranks = context.host.size();
        if ranks > MAX_RANKS {
            return Err(CommError::invalid(
                "host",
                format!("{ranks} ranks; the p2p backend takes up to {MAX_RANKS}"),
            ));
        }
        if ranks > 1 && !context.host.can_exchange_fds() {
            return Err(CommError::invalid(
                "host",
                "the ranks' host communicator cannot pass file descriptors; ranks of one host meet over a unix socket",
            ));
        }
        let options = Options::parse(&context.options)?;
        // Dropping a context makes it current. In this order, the guard is dropped later and puts the caller's back.
        let (_caller, device) = {
            let device = raw::context(ordinal)?;
            (raw::Current::remember()?, device)
        };
        check_device(&device)?;
        check_peers(ordinal, ranks)?;
        let _current = raw::Current::enter(&device)?;
        Kernels::load(&device)?;
        if ranks > 1 {
            P2pKernels::load(&device, ranks, Overlap::Allowed)?;
        }
        let sm = attribute(&device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let facts = [
            (fact::HOST, host_name()),
            (fact::GPU, uuid(&device)?),
            (fact::KIND, kind(&device)?),
            (fact::MULTIPROCESSORS, sm.to_string()),
            (fact::DRIVER, driver_version()?),
            (fact::SHARE_DEVICES, if options.share_devices { fact::ON } else { "off" }.to_owned()),
        ];
        Ok(Capability {
            protocol: PROTOCOL,
            facts: facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        })
    }

    fn create(&self, context: &CreateContext, capabilities: &[Capability]) -> Result<Arc<dyn DeviceComm>> {
        Ok(Arc::new(self.connect(context, capabilities)?))
    }
}

fn base(context: &CreateContext, capabilities: &[Capability]) -> Result<Base> {
    let ordinal = ordinal(context)?;
    let room = placement::room(capabilities, context.host.same_process(), placement::connections())?;
    let device = raw::context(ordinal)?;
    Ok(Base {
        kernels: Kernels::load(&device)?,
        context: Arc::clone(&device),
        ordinal,
        timeout: context.timeout,
        checked: context.checked,
        options: Arc::new(Options::parse(&context.options)?),
        room,
        gpu: common_kind(capabilities),
        device: Arc::new(Device {
            uuid: uuid(&device)?,
            driver: driver_version()?,
            links: Links::of_device(ordinal)?,
            place: context.host.rank(),
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(host: &str, gpu: &str) -> Capability {
        let facts = [(fact::HOST, host), (fact::GPU, gpu)];
        Capability {
            protocol: PROTOCOL,
            facts: facts.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        }
    }

    #[test]
    fn ranks_with_different_gpus_have_no_kind_in_common() {
        let of = |kinds: &[&str]| {
            let ranks = kinds.iter().map(|&kind| {
                let mut rank = rank("a", kind);
                rank.facts.insert(fact::KIND.to_owned(), kind.to_owned());
                rank
            });
            common_kind(&ranks.collect::<Vec<_>>())
        };
        assert_eq!([of(&["A", "A"]), of(&["A", "B"]), of(&["A"])], ["A", MIXED, "A"]);
    }
}
