//! How slowly a body may come.
//!
//! A read that waits for long fails by itself. A server that sends a byte now and then would hold a
//! download for ever: so a body also fails where too little of it comes in a while.

use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::time::{Duration, Instant};

/// Bytes a second.
const LEAST: u64 = 1024;

pub struct Paced<R> {
    body: R,
    /// Over so long the rate is measured.
    window: Duration,
    begun: Instant,
    received: u64,
}

impl<R: Read> Paced<R> {
    pub fn new(body: R, window: Duration) -> Self {
        Self { body, window, begun: Instant::now(), received: 0 }
    }
}

impl<R: Read> Read for Paced<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.body.read(buffer)?;
        self.received += read as u64;
        let elapsed = self.begun.elapsed();
        if read == 0 || elapsed < self.window {
            return Ok(read);
        }
        if self.received < (LEAST as f64 * elapsed.as_secs_f64()) as u64 {
            return Err(io::Error::new(ErrorKind::TimedOut, Slow(elapsed)));
        }
        (self.begun, self.received) = (Instant::now(), 0);
        Ok(read)
    }
}

/// Less came than must.
#[derive(Debug)]
struct Slow(Duration);

impl fmt::Display for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for {:.1} s it was slower than {LEAST} bytes a second", self.0.as_secs_f64())
    }
}

impl std::error::Error for Slow {}

pub fn is_slow(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Slow>())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `size` bytes at a time, after a pause.
    struct Drip(usize);

    impl Read for Drip {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            std::thread::sleep(Duration::from_millis(5));
            buffer[..self.0].fill(0);
            Ok(self.0)
        }
    }

    #[test]
    fn only_a_body_that_is_slow_fails() {
        let window = Duration::from_millis(50);
        let read = |size, most| {
            let mut body = Paced::new(Drip(size), window).take(most);
            io::copy(&mut body, &mut io::sink())
        };
        let error = read(1, 1_000_000).unwrap_err();
        assert!(is_slow(&error), "{error}");
        // 1000 bytes in 5 ms, over some windows.
        assert_eq!(read(1000, 60_000).unwrap(), 60_000);
        assert!(!is_slow(&io::Error::from(ErrorKind::TimedOut)));
    }
}
