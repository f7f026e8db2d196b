//! Which GPUs this process may use. Asked of NVML, which unlike CUDA takes no memory on them.

use nvml_wrapper::Nvml;

/// The GPUs, as `CUDA_VISIBLE_DEVICES` spells them; or why there are none.
///
/// # Errors
/// In words: no driver, no GPU, or all hidden by `CUDA_VISIBLE_DEVICES`.
pub fn visible() -> Result<Vec<String>, String> {
    let nvml = Nvml::init().map_err(|error| format!("no NVIDIA driver is usable here ({error})"))?;
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
    fn the_variable_is_read_as_cuda_reads_it() {
        assert_eq!(select(2, None), ["0", "1"]);
        assert_eq!(select(8, Some("6, 3")), ["6", "3"]);
        assert_eq!(select(2, Some("1,5,0")), ["1"]);
        assert_eq!(select(2, Some("GPU-abc,MIG-1")), ["GPU-abc", "MIG-1"]);
        assert!(select(2, Some("")).is_empty() && select(2, Some("-1")).is_empty());
    }
}
