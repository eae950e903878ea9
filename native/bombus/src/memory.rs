//! How much memory the machine has left.

use std::path::Path;

/// What is kept free for all else.
const MARGIN: u64 = 128 << 20;

/// Whether so many bytes can be had without the kernel ending this process; where it does not
/// say (only Linux does), they can.
pub fn has_room_for(bytes: usize) -> bool {
    let read = |path: &str| std::fs::read_to_string(Path::new(path)).ok();
    let machine = read("/proc/meminfo").and_then(|text| available(&text));
    let group = read("/sys/fs/cgroup/memory.max")
        .zip(read("/sys/fs/cgroup/memory.current"))
        .and_then(|(max, current)| left(&max, &current));
    let left = machine.into_iter().chain(group).min();
    left.is_none_or(|left| bytes as u64 + MARGIN <= left)
}

/// `MemAvailable`, in bytes
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Of a control group's limit; none where that is "max"
fn left(max: &str, current: &str) -> Option<u64> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    Some(number(max)?.saturating_sub(number(current)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_what_linux_says() {
        let meminfo = "MemTotal:       24689764 kB\nMemAvailable:   20480000 kB\n";
        assert_eq!(available(meminfo), Some(20_480_000 * 1024));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
        assert_eq!(left("1000\n", "400\n"), Some(600));
        assert_eq!(left("max\n", "400\n"), None);
    }

    #[test]
    fn there_is_room_for_little_and_not_for_everything() {
        assert!(has_room_for(1 << 20));
        #[cfg(target_os = "linux")]
        assert!(!has_room_for(usize::MAX >> 8));
    }
}
