//! `strftime_now`: the local time as `datetime.now().strftime` writes it.

use super::fault::Outcome;
use super::limits::Limits;
use super::printing::Writer;
use chrono::{DateTime, Datelike, Local, Timelike};

pub fn now(limits: &Limits, format: &str) -> Outcome<String> {
    strftime(limits, format, Local::now())
}

fn strftime(limits: &Limits, format: &str, time: DateTime<Local>) -> Outcome<String> {
    let mut writer = Writer::new(limits);
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            writer.push(c.encode_utf8(&mut [0; 4]))?;
            continue;
        }
        let flag = chars.next_if(|c| matches!(c, '-' | '_' | '0' | '^' | '#'));
        let text = chars.next().and_then(|directive| field(time, directive));
        match (text, flag) {
            (Some(text), Some('-')) => writer.push(unpadded(&text))?,
            (Some(text), Some('_')) => writer.push(&spaced(&text))?,
            (Some(text), Some('^' | '#')) => writer.push(&text.to_uppercase())?,
            (Some(text), _) => writer.push(&text)?,
            (None, _) => writer.push("%")?,
        }
    }
    Ok(writer.text)
}

fn unpadded(text: &str) -> &str {
    let trimmed = text.trim_start_matches(['0', ' ']);
    let is_number = text.trim_start().bytes().all(|byte| byte.is_ascii_digit());
    if !is_number || (trimmed.is_empty() && text.is_empty()) {
        return text;
    }
    if trimmed.is_empty() { "0" } else { trimmed }
}

fn spaced(text: &str) -> String {
    let trimmed = unpadded(text);
    " ".repeat(text.len() - trimmed.len()) + trimmed
}

/// What a directive stands for, in the locale C.
fn field(time: DateTime<Local>, directive: char) -> Option<String> {
    let hour = time.hour12().1;
    let chrono = |format: &str| time.format(format).to_string();
    Some(match directive {
        'd' | 'm' | 'y' | 'H' | 'I' | 'M' | 'S' | 'p' | 'P' | 'j' | 'a' | 'A' | 'b' | 'h' | 'B'
        | 'e' | 'k' | 'l' | 'U' | 'W' | 'u' | 'w' | 'G' | 'g' | 'V' | 'C' | 'D' | 'F' | 'R'
        | 'T' | 's' => chrono(&format!("%{directive}")),
        'Y' => time.year().to_string(),
        'f' => format!("{:06}", time.timestamp_subsec_micros().min(999_999)),
        'c' => chrono("%a %b %e %H:%M:%S %Y"),
        'x' => chrono("%m/%d/%y"),
        'X' => chrono("%H:%M:%S"),
        'r' => format!("{hour:02}{}", chrono(":%M:%S %p")),
        'n' => "\n".into(),
        't' => "\t".into(),
        '%' => "%".into(),
        // A time without a zone has none to name.
        'z' | 'Z' => String::new(),
        other => format!("%{other}"),
    })
}
