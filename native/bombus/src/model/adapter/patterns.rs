//! Regular expressions for modules' names: PEFT's `rank_pattern` and `alpha_pattern` match their
//! ends, and give the modules numbers; `target_modules` and `exclude_modules` match whole names.
//! Reference: PEFT's `utils/other.py`, `get_pattern_key`.

use super::fields::{Fields, shown};
use crate::error::Result;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Patterns of a field, and the bytes of one.
const MOST: usize = 4096;
const LONGEST: usize = 512;
/// The bytes of a pattern that stands alone.
const LONGEST_ALONE: usize = 4096;
/// Bytes that a compiled pattern may take, and steps back that one match may need.
const COMPILED: usize = 64 << 10;
const COMPILED_ALONE: usize = 1 << 20;
const STEPS: usize = 50_000;
/// The patterns of a large adapter are matched in a few milliseconds.
const TIME: Duration = Duration::from_secs(2);

enum Pattern {
    /// Linear in the name's length.
    Plain(regex::bytes::Regex),
    /// With look-around or backreferences, as Python has them.
    Backtracking(fancy_regex::Regex),
}

impl Pattern {
    /// For the ends of names. The error says what is wrong with it.
    fn of_ends(pattern: &str) -> Result<Self, String> {
        Self::new(&format!(r"^(?:.*\.)?(?:{pattern})$"), COMPILED)
    }

    fn of_names(pattern: &str) -> Result<Self, String> {
        Self::new(&format!(r"^(?:{pattern})$"), COMPILED_ALONE)
    }

    fn new(whole: &str, most: usize) -> Result<Self, String> {
        let plain = regex::bytes::RegexBuilder::new(whole)
            .unicode(false)
            .size_limit(most)
            .dfa_size_limit(most)
            .build();
        match plain {
            Ok(plain) => Ok(Self::Plain(plain)),
            Err(regex::Error::CompiledTooBig(_)) => Err("it is too large".into()),
            Err(_) => fancy_regex::RegexBuilder::new(whole)
                .backtrack_limit(STEPS)
                .delegate_size_limit(most)
                .delegate_dfa_size_limit(most)
                .build()
                .map(Self::Backtracking)
                .map_err(|error| format!("it is no regular expression: {error}")),
        }
    }

    fn matches(&self, name: &str) -> Result<bool, String> {
        match self {
            Self::Plain(plain) => Ok(plain.is_match(name.as_bytes())),
            Self::Backtracking(regex) => {
                regex.is_match(name).map_err(|_| "it takes too many steps to match".into())
            }
        }
    }
}

/// The modules that a pattern of `field` matches, each with that pattern's number. `number` reads
/// a value, and is told which it is.
pub fn numbers<'a, T: Copy>(
    fields: &Fields,
    field: &str,
    modules: &[&'a str],
    number: impl Fn(&str, &Value) -> Result<T>,
) -> Result<BTreeMap<&'a str, T>> {
    let empty = Map::new();
    let patterns = fields.object(field)?.unwrap_or(&empty);
    if patterns.len() > MOST {
        let message = format!("`{field}` has {} patterns, more than {MOST}", patterns.len());
        return Err(fields.file.wrong(message));
    }
    let start = Instant::now();
    let mut found = BTreeMap::new();
    for (pattern, value) in patterns {
        let what = format!("`{field}` of {}", shown(&Value::from(pattern.as_str())));
        let number = number(&what, value)?;
        let wrong = |error: String| fields.file.wrong(format!("{what}: {error}"));
        if pattern.len() > LONGEST {
            return Err(wrong(format!("expected at most {LONGEST} bytes")));
        }
        let regex = Pattern::of_ends(pattern).map_err(wrong)?;
        for module in modules.iter().filter(|module| module.len() <= LONGEST) {
            if start.elapsed() > TIME {
                return Err(wrong("the patterns take too long to match".into()));
            }
            if !found.contains_key(module) && regex.matches(module).map_err(wrong)? {
                found.insert(*module, number);
            }
        }
    }
    Ok(found)
}

/// A field that is one pattern, for whole names.
pub struct Whole {
    pattern: Pattern,
    start: Instant,
}

impl Whole {
    pub fn read(fields: &Fields, field: &str, pattern: &str) -> Result<Self> {
        let wrong = |error: String| fields.file.wrong(format!("`{field}`: {error}"));
        if pattern.len() > LONGEST_ALONE {
            return Err(wrong(format!("expected at most {LONGEST_ALONE} bytes")));
        }
        let pattern = Pattern::of_names(pattern).map_err(wrong)?;
        Ok(Self { pattern, start: Instant::now() })
    }

    /// Fails where all matches so far took too long.
    pub fn matches(&self, fields: &Fields, field: &str, name: &str) -> Result<bool> {
        let wrong = |error: String| fields.file.wrong(format!("`{field}`: {error}"));
        if self.start.elapsed() > TIME {
            return Err(wrong("the pattern takes too long to match".into()));
        }
        Ok(name.len() <= LONGEST && self.pattern.matches(name).map_err(wrong)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 5] = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "lm_head",
    ];

    /// What `re.match(rf"(.*\.)?({pattern})$", name)` finds in Python.
    const EXPECTED: [(&str, [bool; 5]); 11] = [
        ("q_proj", [true, false, false, false, false]),
        (r"self_attn\..*", [true, true, false, false, false]),
        (r"^model\.layers\.0\.self_attn\.o_proj", [false, true, false, false, false]),
        (r"layers\.1\.mlp\.gate_proj", [false, false, true, false, false]),
        (r"(?!.*layers\.0)model\..*", [false, false, true, true, false]),
        (r"layers\.(\d+)\.self_attn\.(?:q|k)_proj", [true, false, false, false, false]),
        (".*", [true; 5]),
        ("proj", [false; 5]),
        (r"layers.(?P<n>\d).mlp.(?=up).*", [false, false, false, true, false]),
        (r"(model)\.layers\.\d\..*(?<!o)_proj", [true, false, true, true, false]),
        ("model.layers.0.self_attn.q_proj", [true, false, false, false, false]),
    ];

    #[test]
    fn patterns_match_as_in_python() {
        for (pattern, expected) in EXPECTED {
            let regex = Pattern::of_ends(pattern).unwrap();
            assert_eq!(NAMES.map(|name| regex.matches(name).unwrap()), expected, "{pattern}");
        }
    }

    #[test]
    fn hostile_patterns_are_refused_or_fast() {
        let large = format!("a{{1000}}{{1000}}{}", "(b|c)".repeat(20));
        let names: Vec<String> = (0..300).map(|n| format!("{}{n}!", "a".repeat(400))).collect();
        for pattern in
            [r"(a+)+b", r"(?=x?)(a+)+\1b", &large, r"(?:a?){500}b", "(", r"\Z(?<", &"(".repeat(500)]
        {
            let start = Instant::now();
            if let Ok(regex) = Pattern::of_ends(pattern) {
                _ = names.iter().take_while(|name| regex.matches(name).is_ok()).count();
            }
            assert!(start.elapsed() < Duration::from_secs(20), "{pattern}");
        }
    }
}
