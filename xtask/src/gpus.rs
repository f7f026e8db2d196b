//! Which GPUs this process may use. Asked of NVML, which unlike CUDA takes no memory on them.

use comm_kernels::nvml::nvml;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

/// The GPUs, as `CUDA_VISIBLE_DEVICES` spells them; or why there are none.
///
/// # Errors
/// In words: no driver, no GPU, or all hidden by `CUDA_VISIBLE_DEVICES`.
pub fn visible() -> Result<Vec<String>, String> {
    let nvml = nvml().map_err(|error| format!("no NVIDIA driver is usable here ({error})"))?;
    let count = nvml
        .device_count()
        .map_err(|error| format!("the NVIDIA driver does not count its GPUs ({error})"))?;
    let allowed = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let gpus = select(count, allowed.as_deref());
    match (count, gpus.is_empty()) {
        (0, _) => Err("the NVIDIA driver has no GPU".into()),
        (_, true) => Err(format!("CUDA_VISIBLE_DEVICES={} hides all GPUs", allowed.unwrap_or_default())),
        _ => Ok(gpus),
    }
}

/// The variable by which ranks know that they share GPUs; the p2p backend reads it too.
pub const SHARE_ENV: &str = "COMM_P2P_SHARE_DEVICES";

/// Whether ranks share GPUs, as this process's environment says.
pub fn are_shared() -> bool {
    std::env::var(SHARE_ENV).is_ok_and(|value| value == "on")
}

/// For what measures.
///
/// # Errors
/// When the environment lets ranks share GPUs.
pub fn refuse_shared() -> anyhow::Result<()> {
    anyhow::ensure!(!are_shared(), "{SHARE_ENV}=on: times of ranks that share GPUs mean nothing; unset it");
    Ok(())
}

/// The GPUs that a world takes: one for each rank, or, where they may be shared, as many as there are and at least one.
pub fn needed(world: usize, there: usize, share: bool) -> usize {
    if share { world.min(there.max(1)) } else { world }
}

/// The number, among the GPUs that a process sees, of that of a rank: its own, or, where they are shared, in turn.
pub fn of_rank(local_rank: usize, seen: usize, share: bool) -> usize {
    if share { local_rank % seen.max(1) } else { local_rank }
}

/// The UUIDs of all GPUs by number; none where they are not to be had.
pub fn uuids() -> Vec<String> {
    let Ok(nvml) = nvml() else { return Vec::new() };
    let uuid = |index| nvml.device_by_index(index).and_then(|device| device.uuid());
    (0..nvml.device_count().unwrap_or(0)).map(|index| uuid(index).unwrap_or_default()).collect()
}

/// NVML's handle of a GPU that `CUDA_VISIBLE_DEVICES` spells like this: by its number, its UUID or the beginning of one.
///
/// # Errors
/// NVML's, also when there is no such GPU.
pub fn device<'nvml>(nvml: &'nvml Nvml, gpu: &str) -> Result<Device<'nvml>, NvmlError> {
    if let Ok(index) = gpu.parse() {
        return nvml.device_by_index(index);
    }
    let begins = |index: &u32| {
        nvml.device_by_index(*index).and_then(|device| device.uuid()).is_ok_and(|uuid| uuid.starts_with(gpu))
    };
    match (0..nvml.device_count()?).find(begins) {
        Some(index) => nvml.device_by_index(index),
        // A part of a GPU, say.
        None => nvml.device_by_uuid(gpu),
    }
}

/// What CUDA would make of the variable: entries up to the first that is no device.
fn select(count: u32, allowed: Option<&str>) -> Vec<String> {
    let Some(allowed) = allowed else { return (0..count).map(|index| index.to_string()).collect() };
    (allowed.split(',').map(str::trim))
        .take_while(|entry| match entry.parse::<u32>() {
            Ok(index) => index < count,
            Err(_) => entry.starts_with("GPU-") || entry.starts_with("MIG-"),
        })
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_dealt_over_the_gpus_there_are() {
        let deal = |world: usize, there: usize| -> Vec<usize> {
            let seen = needed(world, there, true);
            (0..world).map(|rank| of_rank(rank, seen, true)).collect()
        };
        assert_eq!(deal(8, 4), [0, 1, 2, 3, 0, 1, 2, 3]);
        assert_eq!(deal(5, 2), [0, 1, 0, 1, 0]);
        assert_eq!(deal(3, 1), [0, 0, 0]);
        // With enough of them nobody shares.
        assert_eq!(deal(3, 8), [0, 1, 2]);
        assert_eq!((needed(8, 4, false), of_rank(7, 4, false), needed(2, 0, true)), (8, 7, 1));
    }

    #[test]
    fn the_variable_is_read_as_cuda_reads_it() {
        assert_eq!(select(2, None), ["0", "1"]);
        assert_eq!(select(8, Some("6, 3")), ["6", "3"]);
        assert_eq!(select(2, Some("1,5,0")), ["1"]);
        assert_eq!(select(2, Some("GPU-abc,MIG-1")), ["GPU-abc", "MIG-1"]);
        assert!(select(2, Some("")).is_empty() && select(2, Some("-1")).is_empty());
    }
}
