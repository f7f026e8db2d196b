//! What must hold where there is no driver, and what NCCL's library answers without one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use comm_core::{BackendFactory, CommError, CreateContext, MemoryKind, ThreadComm};
use comm_nccl::{NcclFactory, NcclLibrary, Version};

fn context(memory: MemoryKind, options: &[(&str, &str)]) -> CreateContext {
    let timeout = Duration::from_secs(5);
    let host = ThreadComm::create(1, timeout).unwrap().remove(0);
    let options: BTreeMap<_, _> =
        options.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
    CreateContext { host: Arc::new(host), memory, timeout, checked: false, options }
}

#[test]
fn host_memory_and_bad_options_are_refused_before_anything_is_loaded() {
    let factory = NcclFactory::new();
    let error = factory.probe(&context(MemoryKind::Host, &[])).unwrap_err();
    assert!(matches!(&error, CommError::InvalidArgument { argument, .. } if argument == "memory"), "{error}");
    let device = MemoryKind::Cuda { ordinal: 0 };
    let error = factory.probe(&context(device, &[("nccl.max_ctas", "lots")])).unwrap_err();
    assert!(error.to_string().contains("nccl.max_ctas"), "{error}");
    let error = factory.create(&context(device, &[]), &[]).map(drop).unwrap_err();
    assert!(
        matches!(&error, CommError::InvalidArgument { argument, .. } if argument == "capabilities"),
        "{error}"
    );
}

#[test]
fn a_missing_driver_or_device_is_a_typed_error() {
    let device = MemoryKind::Cuda { ordinal: 4096 };
    let error = NcclFactory::new().probe(&context(device, &[])).unwrap_err();
    if comm_kernels::driver::probe().is_ok() {
        assert!(error.to_string().contains("4096"), "{error}");
    } else {
        assert!(matches!(&error, CommError::Library { library, .. } if library.contains("cuda")), "{error}");
    }
}

#[test]
fn the_library_answers_without_a_gpu() {
    let library = match NcclLibrary::load() {
        Ok(library) => library,
        Err(error) => {
            println!("SKIP: {error}");
            return;
        }
    };
    assert!(library.version() >= Version::new(2, 19, 0), "{library:?}");
    assert!(library.path().is_absolute(), "{library:?}");
    let optional: BTreeMap<_, _> = library.api().optional().into_iter().collect();
    for symbol in
        ["ncclCommSplit", "ncclMemAlloc", "ncclCommRegister", "ncclCommDeregister", "ncclGetLastError"]
    {
        assert!(optional[symbol], "{symbol} is missing from {library:?}");
    }
    if library.version() >= Version::new(2, 28, 0) {
        assert!(optional["ncclAlltoAll"] && optional["ncclCommWindowRegister"]);
    }
    let error = library.error("ncclAllReduce", comm_nccl::sys::INVALID_USAGE).to_string();
    assert!(
        error.contains("ncclAllReduce") && error.contains("5") && error.contains("invalid usage"),
        "{error}"
    );
    let error = library.need(None::<fn()>, "ncclTeleport").unwrap_err().to_string();
    let version = library.version().to_string();
    assert!(error.contains("ncclTeleport") && error.contains(&version), "{error}");
}
