//! The NVLinks of this rank's device, as NVML tells them.

use comm_core::Result;
use comm_kernels::nvml::nvml;
use comm_kernels::raw::check;
use cudarc::driver::sys;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::PciInfo;
use serde::{Deserialize, Serialize};

/// Links that NVML numbers, at most.
pub(crate) const MOST_LINKS: u32 = 18;

/// One device's place on the bus, and where its active links lead.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub(crate) struct Links {
    pub(crate) bus: String,
    /// Links to NVLink switches.
    pub(crate) switch: u32,
    /// Places of the devices at the other ends of direct links, one entry a link.
    pub(crate) direct: Vec<String>,
    /// Why nothing is known, if nothing is.
    pub(crate) unknown: Option<String>,
}

impl Links {
    /// Of device `ordinal`. NVML's failures are not this rank's: then nothing is known about its links.
    pub(crate) fn of_device(ordinal: usize) -> Result<Self> {
        let mut name = [0; 32];
        // SAFETY: the buffer is as long as the call is told.
        let code = unsafe { sys::cuDeviceGetPCIBusId(name.as_mut_ptr(), name.len() as i32, ordinal as i32) };
        check("cuDeviceGetPCIBusId", code)?;
        let bus: String =
            name.iter().take_while(|&&byte| byte != 0).map(|&byte| char::from(byte as u8)).collect();
        Ok(Self::ask(&bus).unwrap_or_else(|error| Self {
            bus,
            unknown: Some(error.to_string()),
            ..Self::default()
        }))
    }

    fn ask(bus: &str) -> Result<Self, NvmlError> {
        let nvml = nvml()?;
        let device = nvml.device_by_pci_bus_id(bus)?;
        let place = |pci: &PciInfo| format!("{:x}:{:x}:{:x}", pci.domain, pci.bus, pci.device);
        let mut devices = Vec::new();
        for index in 0..nvml.device_count()? {
            // One that this process may not look at is not among the ranks' either.
            devices.extend(
                nvml.device_by_index(index).and_then(|device| device.pci_info()).map(|pci| place(&pci)),
            );
        }
        let mut links = Self { bus: place(&device.pci_info()?), ..Self::default() };
        for number in 0..MOST_LINKS {
            let link = device.link_wrapper_for(number);
            // A device with fewer links answers with an error for the rest.
            if !link.is_active().unwrap_or(false) {
                continue;
            }
            // What is at the other end and is no GPU is a switch.
            match link.remote_pci_info().map(|pci| place(&pci)) {
                Ok(end) if devices.contains(&end) => links.direct.push(end),
                Ok(_) => links.switch += 1,
                Err(error) => tracing::debug!(number, %error, "a link's other end is not known"),
            }
        }
        Ok(links)
    }
}
