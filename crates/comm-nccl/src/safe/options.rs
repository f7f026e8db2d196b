//! What `CreateContext::options` can set.

use std::collections::BTreeMap;
use std::ffi::{CString, c_int};
use std::str::FromStr;

use comm_core::{CommError, Result};

use super::marks::Placement;
use crate::sys::Config;

const WATCH_GRAPHS: &str = "nccl.watch_graphs";
/// Decides where the option is not given.
const WATCH_GRAPHS_VARIABLE: &str = "COMM_NCCL_WATCH_GRAPHS";

/// Settings of a communicator and its splits.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    min_ctas: Option<c_int>,
    max_ctas: Option<c_int>,
    cga_cluster_size: Option<c_int>,
    traffic_class: Option<c_int>,
    cta_policy: Option<c_int>,
    split_share: Option<c_int>,
    net_name: Option<CString>,
    /// Bytes of the buffer through which pitched gathers go.
    pub(crate) staging_bytes: usize,
    /// How captured work is watched, if it is.
    pub(crate) watch_graphs: Option<Placement>,
}

/// Large enough that a gather's copies run at full bandwidth, small beside a model.
const STAGING_BYTES: usize = 8 << 20;

impl Options {
    /// From the context's options, and the environment.
    pub(crate) fn parse(options: &BTreeMap<String, String>) -> Result<Self> {
        let mut parsed = Self::from_map(options)?;
        if let Ok(text) = std::env::var(WATCH_GRAPHS_VARIABLE)
            && !text.is_empty()
            && !options.contains_key(WATCH_GRAPHS)
        {
            parsed.watch_graphs = placement(WATCH_GRAPHS_VARIABLE, &text)?;
        }
        Ok(parsed)
    }

    fn from_map(options: &BTreeMap<String, String>) -> Result<Self> {
        let net_name = options
            .get("nccl.net_name")
            .map(|name| CString::new(name.as_str()))
            .transpose()
            .map_err(|_| CommError::invalid("options", "nccl.net_name contains a zero byte"))?;
        Ok(Self {
            min_ctas: number(options, "nccl.min_ctas")?,
            max_ctas: number(options, "nccl.max_ctas")?,
            cga_cluster_size: number(options, "nccl.cga_cluster_size")?,
            traffic_class: number(options, "nccl.traffic_class")?,
            cta_policy: number(options, "nccl.cta_policy")?,
            split_share: number(options, "nccl.split_share")?,
            net_name,
            staging_bytes: number(options, "nccl.staging_bytes")?.unwrap_or(STAGING_BYTES),
            watch_graphs: placement(WATCH_GRAPHS, options.get(WATCH_GRAPHS).map_or("on", String::as_str))?,
        })
    }

    /// All settings in words, equal where the settings are.
    pub(crate) fn describe(&self) -> String {
        let given = |name: &str, value: Option<c_int>| value.map(|value| format!("{name}={value}"));
        let net_name = self.net_name.as_ref().map(|name| format!("net_name={}", name.to_string_lossy()));
        let always = [
            format!("staging_bytes={}", self.staging_bytes),
            format!("watch_graphs={}", describe_placement(self.watch_graphs)),
        ];
        let settings = [
            given("min_ctas", self.min_ctas),
            given("max_ctas", self.max_ctas),
            given("cga_cluster_size", self.cga_cluster_size),
            given("traffic_class", self.traffic_class),
            given("cta_policy", self.cta_policy),
            given("split_share", self.split_share),
            net_name,
        ];
        settings.into_iter().flatten().chain(always).collect::<Vec<_>>().join(", ")
    }

    /// The configuration that NCCL gets. It points into `self`.
    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new();
        // Calls on a blocking communicator can wait inside NCCL for ranks that never come.
        config.blocking = 0;
        let settings = [
            (&mut config.min_ctas, self.min_ctas),
            (&mut config.max_ctas, self.max_ctas),
            (&mut config.cga_cluster_size, self.cga_cluster_size),
            (&mut config.traffic_class, self.traffic_class),
            (&mut config.cta_policy, self.cta_policy),
            (&mut config.split_share, self.split_share),
        ];
        for (field, value) in settings {
            if let Some(value) = value {
                *field = value;
            }
        }
        if let Some(name) = &self.net_name {
            config.net_name = name.as_ptr();
        }
        config
    }
}

/// How captured work is watched by a setting's text: `on` is what costs calls that follow one another nothing.
fn placement(name: &str, text: &str) -> Result<Option<Placement>> {
    match text {
        "on" | "beside" => Ok(Some(Placement::Beside)),
        "inline" => Ok(Some(Placement::Inline)),
        "off" => Ok(None),
        _ => Err(CommError::invalid(
            "options",
            format!("{name} is {text:?}, but must be on, beside, inline or off"),
        )),
    }
}

const fn describe_placement(placement: Option<Placement>) -> &'static str {
    match placement {
        Some(Placement::Beside) => "beside",
        Some(Placement::Inline) => "inline",
        None => "off",
    }
}

fn number<T: FromStr>(options: &BTreeMap<String, String>, name: &str) -> Result<Option<T>> {
    let Some(text) = options.get(name) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        CommError::invalid("options", format!("{name} is {text:?}, but must be a whole number in range"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::UNDEFINED;

    #[test]
    fn options_reach_the_configuration() {
        let options = [("nccl.max_ctas", "8"), ("nccl.net_name", "Socket"), ("other.thing", "x")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()));
        let parsed = Options::from_map(&options.into()).unwrap();
        let config = parsed.config();
        assert_eq!((config.blocking, config.max_ctas, config.min_ctas), (0, 8, UNDEFINED));
        assert!(!config.net_name.is_null());
        assert_eq!(
            parsed.describe(),
            "max_ctas=8, net_name=Socket, staging_bytes=8388608, watch_graphs=beside"
        );
        let wrong = BTreeMap::from([("nccl.min_ctas".to_owned(), "many".to_owned())]);
        let message = Options::from_map(&wrong).unwrap_err().to_string();
        assert!(message.contains("nccl.min_ctas") && message.contains("many"), "{message}");
    }

    #[test]
    fn graphs_are_watched_unless_that_is_switched_off() {
        let with = |text: &str| Options::from_map(&[(WATCH_GRAPHS.to_owned(), text.to_owned())].into());
        let watch = |text: &str| with(text).unwrap().watch_graphs;
        assert_eq!(Options::from_map(&BTreeMap::new()).unwrap().watch_graphs, watch("on"));
        assert_eq!([watch("on"), watch("beside")], [Some(Placement::Beside); 2]);
        assert_eq!([watch("inline"), watch("off")], [Some(Placement::Inline), None]);
        // Ranks that say the same in different words agree.
        assert_eq!(with("on").unwrap().describe(), with("beside").unwrap().describe());
        assert_ne!(with("on").unwrap().describe(), with("inline").unwrap().describe());
        assert!(with("1").unwrap_err().to_string().contains("on, beside, inline or off"));
    }
}
