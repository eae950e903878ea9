//! Nothing points back: `lib.rs` lists the modules, and each uses only those above it.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The modules that `lib.rs` lists, from the top.
fn layers() -> Vec<String> {
    let lib = std::fs::read_to_string(source().join("lib.rs")).unwrap();
    let names = lib.lines().filter_map(|line| line.strip_prefix("//! - `")?.split('`').next());
    names.map(str::to_owned).collect()
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// All files below, without those of tests alone.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        match path.is_dir() {
            true if name != "tests" => files(&path, found),
            false if name.ends_with(".rs") && !name.ends_with("tests.rs") => found.push(path),
            _ => {}
        }
    }
}

/// `backend::cpu::linear` for `backend/cpu/linear.rs`
fn module_of(file: &Path) -> String {
    let path = file.strip_prefix(source()).unwrap().with_extension("");
    let parts: Vec<&str> = path.iter().map(|part| part.to_str().unwrap()).collect();
    parts.join("::").trim_end_matches("::mod").to_owned()
}

/// The paths below `crate` that a file names, in `use` and elsewhere, but for its tests.
fn uses(file: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(file).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let code: Vec<&str> =
        text.lines().map(str::trim).filter(|line| !line.starts_with("//")).collect();
    let code = code.join(" ");
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        expand("", &code[at + "crate::".len()..], &mut found);
    }
    let module = module_of(file);
    let parts: Vec<&str> = module.split("::").collect();
    for (at, _) in code.match_indices("super::") {
        if code[..at].ends_with("super::") {
            continue;
        }
        let rest = code[at..].trim_start_matches("super::");
        let levels = (code.len() - at - rest.len()) / "super::".len();
        let base = parts[..parts.len().saturating_sub(levels)].join("::");
        expand(&base, rest, &mut found);
    }
    found
}

/// Adds the paths that a tree of `use` names: `a::{b, c::{d, e}}`.
fn expand(base: &str, tree: &str, found: &mut BTreeSet<String>) {
    let end =
        tree.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).unwrap_or(tree.len());
    let path = format!("{base}::{}", &tree[..end]);
    let path = path.trim_matches(':').to_owned();
    let rest = &tree[end..];
    if !rest.starts_with('{') || !tree[..end].ends_with("::") && end > 0 {
        found.insert(path);
        return;
    }
    let (mut depth, mut start) = (0, 1);
    for (at, character) in rest.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 1 && character == ',' || depth == 0 {
            expand(&path, rest[start..at].trim(), found);
            start = at + 1;
        }
        if depth == 0 {
            return;
        }
    }
}

/// The place of the listed module that a path is in.
fn layer(layers: &[String], path: &str) -> Option<usize> {
    let holds = |layer: &String| path == layer || path.starts_with(&format!("{layer}::"));
    let found = layers.iter().enumerate().filter(|(_, layer)| holds(layer));
    found.max_by_key(|(_, layer)| layer.len()).map(|(place, _)| place)
}

#[test]
fn no_module_uses_one_below_it() {
    let layers = layers();
    let mut all = vec![];
    files(&source(), &mut all);
    let (mut faults, mut seen) = (vec![], 0);
    for file in all {
        let module = module_of(&file);
        // These name their children alone.
        if matches!(module.as_str(), "lib" | "model" | "runtime") {
            continue;
        }
        let own =
            layer(&layers, &module).unwrap_or_else(|| panic!("lib.rs does not list {module}"));
        for path in uses(&file) {
            seen += 1;
            let Some(used) = layer(&layers, &path) else { continue };
            if used > own {
                faults.push(format!("{module} uses {path}"));
            }
        }
    }
    assert!(seen > 500, "{seen} uses");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_tree_of_uses_is_all_its_paths() {
    let mut found = BTreeSet::new();
    expand("", "a::{b, c::{self, d as e}, f::g}; use x::y;", &mut found);
    let found: Vec<&str> = found.iter().map(String::as_str).collect();
    assert_eq!(found, ["a::b", "a::c::d", "a::c::self", "a::f::g"]);
}
