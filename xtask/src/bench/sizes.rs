//! Message sizes on the command line.

use anyhow::{Context, Result, bail, ensure};

/// The largest size taken: beyond it a mistyped unit is likelier than a machine that can hold it.
const LARGEST: u64 = 1 << 42;

/// Parses `1K..1G` (doubling), `1K..1G*4` (by a factor), `4K` or lists of these: `1K,64K,1M..16M`.
///
/// Units are powers of 1024. The sizes come in the order given.
///
/// # Errors
/// When it is none of these.
pub fn parse_sizes(text: &str) -> Result<Vec<u64>> {
    let mut sizes = Vec::new();
    for part in text.split(',') {
        let part = part.trim();
        match part.split_once("..") {
            None => sizes.push(parse_size(part)?),
            Some((first, rest)) => {
                let (last, factor) = match rest.split_once('*') {
                    Some((last, factor)) => {
                        (last, factor.parse().with_context(|| format!("{factor:?} is not a factor"))?)
                    }
                    None => (rest, 2),
                };
                let (first, last): (u64, u64) =
                    (parse_size(first)?, parse_size(last.trim_start_matches('='))?);
                ensure!(factor >= 2, "the factor of {part:?} must be at least 2");
                ensure!(0 < first && first <= last, "the range {part:?} is empty");
                sizes.extend(
                    std::iter::successors(Some(first), |&size| size.checked_mul(factor))
                        .take_while(|&s| s <= last),
                );
            }
        }
    }
    Ok(sizes)
}

/// Parses one size, for example `512`, `4K`, `1M` or `1GiB`.
///
/// # Errors
/// When it is none, or absurdly large.
pub fn parse_size(text: &str) -> Result<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => bail!("{text:?} is not a size; write for example 512, 4K, 1M or 1G"),
    };
    let number: u64 =
        number.parse().with_context(|| format!("{text:?} is not a size; write for example 4K"))?;
    number
        .checked_mul(1 << shift)
        .filter(|&size| size <= LARGEST)
        .with_context(|| format!("{text:?} is larger than the {} allowed", human(LARGEST)))
}

/// A size as people say it: `512`, `4K`, `1.5M`.
pub fn human(bytes: u64) -> String {
    for (shift, unit) in [(30, "G"), (20, "M"), (10, "K")] {
        let one = 1_u64 << shift;
        if bytes >= one {
            let whole = bytes / one;
            return if bytes.is_multiple_of(one) {
                format!("{whole}{unit}")
            } else {
                format!("{:.1}{unit}", bytes as f64 / one as f64)
            };
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_double_unless_told_otherwise() {
        assert_eq!(parse_sizes("1K..8K").unwrap(), [1024, 2048, 4096, 8192]);
        assert_eq!(parse_sizes("1K..100K*4").unwrap(), [1024, 4096, 16384, 65536]);
        assert_eq!(parse_sizes("7,1M , 3..12").unwrap(), [7, 1 << 20, 3, 6, 12]);
        assert_eq!(parse_sizes("1G").unwrap(), [1 << 30]);
        assert_eq!(parse_sizes("0").unwrap(), [0]);
    }

    #[test]
    fn nonsense_is_named() {
        for text in
            ["", "1X", "K", "8K..1K", "0..8", "1K..8K*1", "1K..8K*x", "99999999999999999999", "9999999G"]
        {
            let error = format!("{:#}", parse_sizes(text).unwrap_err());
            assert!(!error.is_empty(), "{text}");
        }
        assert!(parse_sizes("12Q").unwrap_err().to_string().contains("12Q"));
    }

    #[test]
    fn sizes_read_as_people_say_them() {
        assert_eq!([0, 512, 4096, 1536, 3 << 20, 1 << 30].map(human), ["0", "512", "4K", "1.5K", "3M", "1G"]);
    }
}
