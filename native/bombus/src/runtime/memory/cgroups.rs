//! The limits of the control groups that this process is in, of versions 1 and 2, and of those that
//! they lie in. Source: the kernel's admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst

use std::path::{Path, PathBuf};

/// Bytes that are left within all of them; none where there is no limit.
pub fn left() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let (groups, mounts) = (read("/proc/self/cgroup")?, read("/proc/self/mountinfo")?);
    left_in(&groups, &mounts, Path::new("/"))
}

/// groups: `/proc/self/cgroup`, mounts: `/proc/self/mountinfo`; what these name lies in `root`
fn left_in(groups: &str, mounts: &str, root: &Path) -> Option<u64> {
    let mounts: Vec<Mount> = mounts.lines().filter_map(Mount::parse).collect();
    let groups = groups.lines().filter_map(group);
    let places = groups.flat_map(|(version, path)| {
        let same = mounts.iter().filter(move |mount| mount.version == version);
        same.flat_map(move |mount| mount.levels(path)).map(move |level| (version, level))
    });
    let within = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    places.filter_map(|(version, level)| version.left(&within(&level))).min()
}

#[derive(Clone, Copy, PartialEq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// Of one group. File pages that were not used lately are given back first, so they do not count.
    fn left(self, group: &Path) -> Option<u64> {
        let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        let (limits, used, unused) = match self {
            Version::One => {
                (["memory.limit_in_bytes"; 2], "memory.usage_in_bytes", "total_inactive_file")
            }
            Version::Two => (["memory.max", "memory.high"], "memory.current", "inactive_file"),
        };
        let limit = limits.into_iter().filter_map(number).min()?;
        let unused = read("memory.stat").and_then(|stat| {
            let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
            lines.find(|(name, _)| *name == unused)?.1.trim().parse::<u64>().ok()
        });
        let used = number(used)?.saturating_sub(unused.unwrap_or(0));
        Some(limit.saturating_sub(used))
    }
}

/// A line `hierarchy:controllers:path` that memory is limited by.
fn group(line: &str) -> Option<(Version, &str)> {
    let mut fields = line.splitn(3, ':');
    let (hierarchy, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    match controllers {
        "" if hierarchy == "0" => Some((Version::Two, path)),
        _ if controllers.split(',').any(|controller| controller == "memory") => {
            Some((Version::One, path))
        }
        _ => None,
    }
}

/// Where groups are to be seen.
struct Mount<'a> {
    version: Version,
    /// the group that is mounted
    group: &'a str,
    at: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (mount, system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (group, at) = (fields.next()?, fields.next()?);
        let mut system = system.split(' ');
        let version = match system.next()? {
            "cgroup2" => Version::Two,
            "cgroup" if system.nth(1)?.split(',').any(|option| option == "memory") => Version::One,
            _ => return None,
        };
        Some(Self { version, group, at })
    }

    /// The folders of a group and of all that it lies in. In a container the path may be that of
    /// the host: then only what is mounted is seen.
    fn levels(&self, path: &str) -> Vec<PathBuf> {
        let below = Path::new(path).strip_prefix(self.group).unwrap_or(Path::new(""));
        let at = Path::new(self.at);
        let levels = below.ancestors().map(|level| at.join(level));
        levels.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
        24 1 0:22 / /proc rw,nosuid - proc proc rw\n\
        30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n\
        31 24 0:27 / /cg/memory rw - cgroup cgroup rw,memory\n\
        32 24 0:28 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
        33 24 0:29 /docker/abc /only/memory ro - cgroup cgroup rw,memory\n";

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (path, text) in files {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
    }

    fn left(groups: &str, mounts: &str, files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), files);
        left_in(groups, mounts, root.path())
    }

    #[test]
    fn nested_groups_of_version_2_count_with_all_they_lie_in() {
        let inner = [
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.high", "900\n"),
            ("sys/fs/cgroup/a/b/memory.current", "500\n"),
            ("sys/fs/cgroup/a/b/memory.stat", "anon 100\ninactive_file 300\nactive_file 100\n"),
        ];
        let groups = "0::/a/b\n";
        assert_eq!(left(groups, MOUNTS, &inner), Some(700));
        let outer = [
            ("sys/fs/cgroup/a/memory.max", "1000\n"),
            ("sys/fs/cgroup/a/memory.current", "950\n"),
            ("sys/fs/cgroup/memory.max", "5\n"),
        ];
        assert_eq!(left(groups, MOUNTS, &[&inner[..], &outer].concat()), Some(50));
        // A group that uses more than it may has nothing left.
        let over = [("sys/fs/cgroup/a/b/memory.max", "1\n"), inner[2]];
        assert_eq!(left(groups, MOUNTS, &over), Some(0));
    }

    #[test]
    fn groups_of_version_1_count_where_memory_is_theirs() {
        let files = [
            ("cg/memory/docker/abc/memory.limit_in_bytes", "1000\n"),
            ("cg/memory/docker/abc/memory.usage_in_bytes", "800\n"),
            ("cg/memory/docker/abc/memory.stat", "cache 9\ntotal_inactive_file 300\n"),
            ("cg/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("cg/memory/memory.usage_in_bytes", "5000\n"),
            ("cg/cpu/docker/abc/memory.limit_in_bytes", "1\n"),
            ("cg/cpu/docker/abc/memory.usage_in_bytes", "1\n"),
        ];
        let groups = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n";
        assert_eq!(left(groups, MOUNTS, &files), Some(500));
    }

    #[test]
    fn a_container_sees_its_own_group_alone() {
        let files = [
            ("only/memory/memory.limit_in_bytes", "1000\n"),
            ("only/memory/memory.usage_in_bytes", "400\n"),
        ];
        let mounts = MOUNTS.lines().last().unwrap();
        for path in ["/docker/abc", "/elsewhere/of/the/host"] {
            assert_eq!(left(&format!("4:memory:{path}\n"), mounts, &files), Some(600));
        }
    }

    #[test]
    fn what_is_no_limit_is_none() {
        assert_eq!(left("0::/\n", MOUNTS, &[]), None);
        assert_eq!(left("nonsense\n::\n", "nonsense\n - \n", &[]), None);
        let unlimited = [
            ("sys/fs/cgroup/memory.max", "max\n"),
            ("sys/fs/cgroup/memory.high", "max\n"),
            ("sys/fs/cgroup/memory.current", "7\n"),
        ];
        assert_eq!(left("0::/\n", MOUNTS, &unlimited), None);
    }
}
