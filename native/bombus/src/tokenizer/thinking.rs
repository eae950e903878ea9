//! Whether a text stands in the middle of a model's thinking.

/// What begins and ends it, as in mlx-lm.
const MARKS: [(&str, &str); 4] = [
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("[THINK]", "[/THINK]"),
];

/// Longer than all marks.
const LONGEST: usize = 32;

#[derive(Default)]
pub struct Thinking {
    open: bool,
    /// The end of the text so far, which may be the beginning of a mark.
    tail: String,
}

impl Thinking {
    /// A prompt may end where thinking has begun: templates of models that always think do that.
    pub fn after(prompt_end: &str) -> Self {
        let end = prompt_end.trim_end();
        Self { open: MARKS.iter().any(|(begin, _)| end.ends_with(begin)), tail: String::new() }
    }

    pub fn is_open(&self) -> bool {
        self.open
    }

    pub fn push(&mut self, text: &str) {
        self.tail.push_str(text);
        while let Some((end, opens)) = first(&self.tail) {
            self.open = opens;
            self.tail.drain(..end);
        }
        let keep = self.tail.len().saturating_sub(LONGEST);
        let keep = (keep..=self.tail.len()).find(|at| self.tail.is_char_boundary(*at));
        self.tail.drain(..keep.unwrap_or(0));
    }
}

/// The end of the first mark, and whether it begins thinking.
fn first(text: &str) -> Option<(usize, bool)> {
    let end = |mark: &str| text.find(mark).map(|start| start + mark.len());
    let marks = MARKS.iter().flat_map(|(begin, finish)| [(begin, true), (finish, false)]);
    marks.filter_map(|(mark, opens)| Some((end(mark)?, opens))).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_open_and_close_it() {
        let open = |prompt: &str, parts: &[&str]| {
            let mut thinking = Thinking::after(prompt);
            parts.iter().for_each(|part| thinking.push(part));
            thinking.is_open()
        };
        assert!(open("", &["<think>\nwell", " then"]));
        assert!(open("", &["<th", "ink>", "é"]));
        assert!(!open("", &["<think>a</th", "ink>b"]));
        assert!(!open("<|assistant|><think>\n\n</think>\n\n", &["hello"]));
        assert!(open("<|assistant|><think>\n", &["well"]));
        assert!(!open("<|assistant|><think>\n", &["well</think>so"]));
        assert!(!open("", &["say <think"]));
    }
}
