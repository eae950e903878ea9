//! PEFT's `rank_pattern` and `alpha_pattern`: regular expressions for the ends of modules' names,
//! each with a number. The first that matches is a module's.
//! Reference: PEFT's `utils/other.py`, `get_pattern_key`.

use super::fields::{Fields, shown};
use crate::error::Result;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Patterns of a field, and the bytes of one.
const MOST: usize = 4096;
const LONGEST: usize = 512;
/// Bytes that a compiled pattern may take, and steps back that one match may need.
const COMPILED: usize = 64 << 10;
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
    /// The error says what is wrong with it.
    fn new(pattern: &str) -> Result<Self, String> {
        let whole = format!(r"^(?:.*\.)?(?:{pattern})$");
        let plain = regex::bytes::RegexBuilder::new(&whole)
            .unicode(false)
            .size_limit(COMPILED)
            .dfa_size_limit(COMPILED)
            .build();
        match plain {
            Ok(plain) => Ok(Self::Plain(plain)),
            Err(regex::Error::CompiledTooBig(_)) => Err("it is too large".into()),
            Err(_) => fancy_regex::RegexBuilder::new(&whole)
                .backtrack_limit(STEPS)
                .delegate_size_limit(COMPILED)
                .delegate_dfa_size_limit(COMPILED)
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

/// The number of every module that a pattern of `field` matches. `number`: reads one, and is told
/// where it stands
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
        let regex = Pattern::new(pattern).map_err(wrong)?;
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
            let regex = Pattern::new(pattern).unwrap();
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
            if let Ok(regex) = Pattern::new(pattern) {
                _ = names.iter().take_while(|name| regex.matches(name).is_ok()).count();
            }
            assert!(start.elapsed() < Duration::from_secs(20), "{pattern}");
        }
    }
}
