//! What a pattern in a tokenizer's file may cost. The file comes from outside: a few bytes of it
//! could compile to gigabytes, or backtrack for ever.

use fancy_regex::{Assertion, Expr, Regex, RegexBuilder};

/// Bytes that a pattern may have; those of published tokenizers have a few hundred.
const LONGEST: usize = 16 << 10;

/// States that a pattern may compile to, each some ten bytes.
const MOST_STATES: u64 = 200_000;

/// The states of a class such as `\p{L}`, about.
const CLASS: u64 = 500;

/// How often one search may backtrack: as often as it takes for a text of such a length to have
/// no match.
const BACKTRACKS: usize = 4_000_000;

/// A pattern that is fit to use.
pub struct Pattern {
    pub regex: Regex,
    /// Whether a search may take more than linear time.
    pub backtracks: bool,
}

#[derive(Default)]
struct Cost {
    states: u64,
    backtracks: bool,
}

pub fn compile(pattern: &str) -> Result<Pattern, String> {
    let wrong = |what: &str| format!("the pattern {:?} {what}", shortened(pattern));
    if pattern.len() > LONGEST {
        return Err(wrong(&format!("is longer than {LONGEST} bytes")));
    }
    let tree =
        Expr::parse_tree(pattern).map_err(|error| wrong(&format!("is not valid: {error}")))?;
    let cost =
        cost(&tree.expr).ok_or_else(|| wrong("refers back to a group, which is not bounded"))?;
    if cost.states > MOST_STATES {
        return Err(wrong("repeats so often that it takes too much memory"));
    }
    let regex = RegexBuilder::new(pattern).backtrack_limit(BACKTRACKS).build();
    let regex = regex.map_err(|error| wrong(&format!("is not valid: {error}")))?;
    Ok(Pattern { regex, backtracks: cost.backtracks })
}

/// A literal string as a pattern.
pub fn literal(text: &str) -> Result<Pattern, String> {
    compile(&fancy_regex::escape(text))
}

/// The beginning of a text, for messages.
pub fn shortened(text: &str) -> String {
    match text.char_indices().nth(80) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

/// None where it refers back to what a group matched.
fn cost(expr: &Expr) -> Option<Cost> {
    let simple = |states| Some(Cost { states, backtracks: false });
    let hard = |cost: Cost| Some(Cost { backtracks: true, ..cost });
    match expr {
        Expr::Empty => simple(1),
        Expr::Any { .. } => simple(10),
        Expr::Literal { val, .. } => simple(val.len() as u64),
        Expr::Assertion(assertion) => {
            Some(Cost { states: 1, backtracks: looks_around(*assertion) })
        }
        Expr::Delegate { .. } => simple(CLASS),
        Expr::Concat(all) | Expr::Alt(all) => sum(all),
        Expr::Group(inner) => cost(inner),
        Expr::LookAround(inner, _) | Expr::AtomicGroup(inner) => hard(cost(inner)?),
        Expr::Repeat { child, lo, hi, .. } => {
            let times = if *hi == usize::MAX { lo.saturating_add(1) } else { *hi };
            let child = cost(child)?;
            let states = child.states.saturating_mul(times.max(1) as u64);
            Some(Cost { states, ..child })
        }
        Expr::KeepOut | Expr::ContinueFromPreviousMatchEnd => hard(Cost::default()),
        Expr::Conditional { condition, true_branch, false_branch } => {
            let parts = [condition, true_branch, false_branch].map(|part| cost(part));
            hard(parts.into_iter().try_fold(Cost::default(), |all, part| Some(both(all, part?)))?)
        }
        Expr::Backref(_) | Expr::BackrefExistsCondition(_) => None,
    }
}

fn sum(all: &[Expr]) -> Option<Cost> {
    all.iter().try_fold(Cost::default(), |sum, one| Some(both(sum, cost(one)?)))
}

fn both(one: Cost, other: Cost) -> Cost {
    Cost {
        states: one.states.saturating_add(other.states),
        backtracks: one.backtracks || other.backtracks,
    }
}

fn looks_around(assertion: Assertion) -> bool {
    !matches!(
        assertion,
        Assertion::StartText
            | Assertion::EndText
            | Assertion::StartLine { .. }
            | Assertion::EndLine { .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_costs_too_much_is_refused() {
        let published = [
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
            r"[!-/:-~]?[A-Za-z]+|[\x{4e00}-\x{9fa5}]+",
        ];
        for pattern in published {
            compile(pattern).unwrap();
        }
        assert!(!compile(r" {2,}|\s+").unwrap().backtracks);
        assert!(compile(r"\bword").unwrap().backtracks);
        let refused = [
            (r"(?:(?:\p{L}{1000}){1000}){1000}".to_owned(), "too much memory"),
            (r"(?:(?=a)b){1000000}".to_owned(), "too much memory"),
            (r"(.*)\1".to_owned(), "refers back"),
            ("(".repeat(1000), "not valid"),
            ("a".repeat(20_000), "longer"),
        ];
        for (pattern, expected) in refused {
            let error = compile(&pattern).err().unwrap();
            assert!(error.contains(expected), "{error}");
        }
    }
}
