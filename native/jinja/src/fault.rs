//! Why a template cannot be read or rendered.

pub type Outcome<T> = std::result::Result<T, Fault>;

/// The characters of a message: what a template raises, or calls its names, may be of any length.
const LONGEST: usize = 1_000;

#[derive(Debug)]
pub struct Fault {
    pub message: String,
    /// The template's line, 0 where it is not known yet.
    pub line: u32,
}

impl Fault {
    #[cold]
    pub fn new(message: impl Into<String>) -> Self {
        let mut message = message.into();
        if let Some((end, _)) = message.char_indices().nth(LONGEST) {
            message.truncate(end);
            message.push_str("...");
        }
        Self { message, line: 0 }
    }

    /// The innermost line stays.
    pub fn at(mut self, line: u32) -> Self {
        if self.line == 0 {
            self.line = line;
        }
        self
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            0 => write!(f, "{}", self.message),
            line => write!(f, "{} (line {line})", self.message),
        }
    }
}

/// `return Err(...)` with a formatted message.
macro_rules! fail {
    ($($text:tt)*) => { return Err($crate::fault::Fault::new(format!($($text)*))) };
}
pub(crate) use fail;
