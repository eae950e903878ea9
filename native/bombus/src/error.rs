//! What can go wrong in the engine, by kind, each with a message for a person.

use std::path::Path;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What gets MLX's CUDA build, for messages.
pub const INSTALL_CUDA_BUILD: &str =
    "python3 -m pip install --target mlx mlx-cuda-13==0.32.2 'nvidia-cuda-crt==13.*'";

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Io(String),
    #[error("{0}")]
    AlreadyThere(String),
    #[error("{0}")]
    Config(String),
    #[error("{0}")]
    Checkpoint(String),
    #[error("{0}")]
    Tokenizer(String),
    #[error("{0}")]
    Adapter(String),
    #[error("{0}")]
    Unsupported(String),
    #[error("{0}")]
    Request(String),
    #[error("{0}")]
    PromptTooLong(String),
    #[error("{0}")]
    NoGpu(String),
    #[error("the queue is full ({0} requests are running or waiting)")]
    Overloaded(usize),
    #[error("{0}")]
    RevisionNotFound(String),
    #[error("{0}")]
    Gated(String),
    #[error("{0}")]
    Unauthorized(String),
    #[error("{0}")]
    RateLimited(String),
    #[error("{0}")]
    Server(String),
    #[error("{0}")]
    NoNetwork(String),
    #[error("{0}")]
    Offline(String),
    #[error("{0}")]
    DiskFull(String),
    #[error("{0}")]
    BadDownload(String),
    #[error("{0}")]
    Busy(String),
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    #[error("{0}")]
    Backend(String),
    #[error("the engine panicked: {0}")]
    Panic(String),
    #[error("the model's engine has stopped")]
    Stopped,
    #[error("the serving is stopping")]
    Stopping,
    #[error("the request did not end within its :timeout")]
    Timeout,
    #[error("the {0} was unloaded")]
    Unloaded(&'static str),
}

/// The characters of a piece in backticks that a message shows: a path, a name, a value.
const PIECE: usize = 400;
/// The characters of a message.
const MESSAGE: usize = 3_000;

impl Error {
    /// The text for a person. What it quotes comes from files and servers, and may be of any length:
    /// long pieces are shown without their middles.
    pub fn message(&self) -> String {
        let text = self.to_string();
        let quoted =
            |(place, piece)| if place % 2 == 1 { shortened(piece, PIECE) } else { piece.into() };
        let pieces: Vec<String> = text.split('`').enumerate().map(quoted).collect();
        shortened(&pieces.join("`"), MESSAGE)
    }

    /// The kind as a stable name: `reason` in Elixir.
    pub fn reason(&self) -> &'static str {
        match self {
            Error::NotFound(_) => "not_found",
            Error::Io(_) => "io",
            Error::AlreadyThere(_) => "already_there",
            Error::Config(_) => "bad_config",
            Error::Checkpoint(_) => "bad_checkpoint",
            Error::Tokenizer(_) => "bad_tokenizer",
            Error::Adapter(_) => "bad_adapter",
            Error::Unsupported(_) => "unsupported",
            Error::Request(_) => "bad_request",
            Error::PromptTooLong(_) => "prompt_too_long",
            Error::NoGpu(_) => "no_gpu",
            Error::Overloaded(_) => "overloaded",
            Error::RevisionNotFound(_) => "revision_not_found",
            Error::Gated(_) => "gated",
            Error::Unauthorized(_) => "unauthorized",
            Error::RateLimited(_) => "rate_limited",
            Error::Server(_) => "server_error",
            Error::NoNetwork(_) => "no_network",
            Error::Offline(_) => "offline",
            Error::DiskFull(_) => "disk_full",
            Error::BadDownload(_) => "bad_download",
            Error::Busy(_) => "busy",
            Error::OutOfMemory(_) => "out_of_memory",
            Error::Backend(_) => "backend",
            Error::Panic(_) => "panic",
            Error::Stopped | Error::Stopping => "stopped",
            Error::Timeout => "timeout",
            Error::Unloaded(_) => "unloaded",
        }
    }

    pub fn io(path: &Path, source: &std::io::Error) -> Self {
        let message = format!("could not read `{}`: {source}", path.display());
        match source.kind() {
            std::io::ErrorKind::NotFound => Error::NotFound(message),
            _ => Error::Io(message),
        }
    }

    /// The payload of a caught panic.
    pub fn panic(payload: &(dyn std::any::Any + Send)) -> Self {
        let text = payload
            .downcast_ref::<&str>()
            .map(|text| text.to_string())
            .or_else(|| payload.downcast_ref::<String>().cloned());
        Error::Panic(text.unwrap_or_else(|| "without a message".into()))
    }
}

/// The first three quarters of `most` characters and the last.
fn shortened(text: &str, most: usize) -> String {
    if text.chars().nth(most).is_none() {
        return text.into();
    }
    let start: String = text.chars().take(most * 3 / 4).collect();
    let end: Vec<char> = text.chars().rev().take(most / 4).collect();
    start + " ... " + &end.into_iter().rev().collect::<String>()
}

/// Runs `work` and turns a panic into an error, so that it ends here.
pub fn catch<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
        .unwrap_or_else(|payload| Err(Error::panic(payload.as_ref())))
}

/// The same; what panics is named.
pub fn catch_in<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch(work).map_err(|error| match error {
        Error::Panic(message) => Error::Panic(format!("{what}: {message}")),
        error => error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_panicked_is_named() {
        let panicked = catch_in("loading `models/x`", || -> Result<()> { panic!("an index of 7") });
        let error = panicked.unwrap_err();
        assert_eq!(error.to_string(), "the engine panicked: loading `models/x`: an index of 7");
        assert_eq!(error.reason(), "panic");
        let other = catch_in("loading `models/x`", || -> Result<()> { Err(Error::Stopped) });
        assert_eq!(other, Err(Error::Stopped));
    }

    #[test]
    fn messages_are_bounded() {
        let long = "é".repeat(1_000_000);
        let message =
            Error::Adapter(format!("`a/{long}.json`: there is no `x`: `{long}`")).message();
        assert!(message.len() < 2_000 && message.starts_with("`a/é"), "{message}");
        assert!(message.contains("é.json`: there is no `x`: `é"), "{message}");
        let raised = Error::Request(format!("{long}, and more")).message();
        assert!(raised.len() < 7_000 && raised.ends_with("é, and more"), "{raised}");
        let short = "x".repeat(400);
        assert_eq!(Error::Io(format!("`{short}`")).message(), format!("`{short}`"));
    }

    #[test]
    fn the_cuda_build_is_installed_as_the_readme_says() {
        let readme = include_str!("../../../README.md");
        assert!(readme.lines().any(|line| line.trim() == super::INSTALL_CUDA_BUILD));
    }
}
