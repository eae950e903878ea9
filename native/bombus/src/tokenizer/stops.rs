//! Strings that end a text.

use aho_corasick::{AhoCorasick, MatchKind};

#[derive(Default)]
pub struct Stops {
    /// sorted, for what begins like one of them
    strings: Vec<String>,
    /// None where there are no strings.
    automaton: Option<AhoCorasick>,
    longest: usize,
}

impl Stops {
    pub fn new(mut strings: Vec<String>) -> Self {
        strings.retain(|string| !string.is_empty());
        strings.sort();
        strings.dedup();
        let longest = strings.iter().map(String::len).max().unwrap_or(0);
        let builder = AhoCorasick::builder().match_kind(MatchKind::LeftmostFirst).build(&strings);
        // It fails only beyond billions of bytes.
        let automaton = builder.ok().filter(|_| longest > 0);
        Self { strings, automaton, longest }
    }

    /// Where the first of them begins.
    pub fn find(&self, text: &str) -> Option<usize> {
        self.automaton.as_ref()?.find(text).map(|found| found.start())
    }

    /// The length of the longest end of `text` that begins one of them.
    pub fn begun(&self, text: &str) -> usize {
        let from = text.len().saturating_sub(self.longest.saturating_sub(1));
        let ends = text.char_indices().map(|(start, _)| start).filter(|start| *start >= from);
        ends.map(|start| &text[start..]).find(|end| self.has(end)).map_or(0, str::len)
    }

    fn has(&self, beginning: &str) -> bool {
        let at = self.strings.partition_point(|string| string.as_str() < beginning);
        self.strings.get(at).is_some_and(|string| string.starts_with(beginning))
    }
}
