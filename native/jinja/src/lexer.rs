//! A template's text as tokens, as Jinja2 reads it with `trim_blocks` and `lstrip_blocks`.

use super::fault::{Fault, Outcome, fail};
use super::strings::{is_space, strip_end};

#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    Text(String),
    PrintBegin,
    PrintEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    Operator(&'static str),
}

const LONGEST_NAME: usize = 1_000;

/// The longest first.
const OPERATORS: [&str; 26] = [
    "**", "//", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";",
];

/// The tokens, each with its line.
pub fn tokens(source: &str) -> Outcome<Vec<(Token, u32)>> {
    let source = newlines(source);
    let mut lexer =
        Lexer { rest: &source, before: ' ', line: 1, line_starts: true, tokens: vec![] };
    while !lexer.rest.is_empty() {
        lexer.text().map_err(|fault| fault.at(lexer.line))?;
    }
    Ok(lexer.tokens)
}

/// CR LF and CR are line ends too, and the last one does not count.
fn newlines(source: &str) -> String {
    let mut text = source.replace("\r\n", "\n").replace('\r', "\n");
    if text.ends_with('\n') {
        text.pop();
    }
    text
}

struct Lexer<'a> {
    rest: &'a str,
    /// The last character that was read.
    before: char,
    line: u32,
    /// Whether what was read last ended in a newline.
    line_starts: bool,
    tokens: Vec<(Token, u32)>,
}

impl<'a> Lexer<'a> {
    /// Reads text up to the next tag, and the tag.
    fn text(&mut self) -> Outcome<()> {
        let Some(start) = tag(self.rest) else {
            let rest = self.rest;
            self.take(rest.len());
            self.push_text(rest);
            return Ok(());
        };
        let line_starts = self.line_starts;
        let text = self.take(start);
        let opening = self.take(2);
        let sign = self.rest.chars().next().filter(|sign| matches!(sign, '-' | '+'));
        self.take(sign.map_or(0, char::len_utf8));
        self.push_text(trimmed(text, sign, opening != "{{", line_starts));
        match opening {
            "{{" => self.tag(Token::PrintBegin, "}}"),
            "{#" => self.comment(),
            _block => match raw(self.rest) {
                Some(length) => self.raw(length),
                None => self.tag(Token::BlockBegin, "%}"),
            },
        }
    }

    fn take(&mut self, length: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(length);
        if let Some(last) = taken.chars().next_back() {
            self.before = last;
            self.line_starts = last == '\n';
        }
        self.line += taken.matches('\n').count() as u32;
        self.rest = rest;
        taken
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    fn push_text(&mut self, text: &str) {
        if !text.is_empty() {
            self.push(Token::Text(text.to_owned()));
        }
    }

    fn comment(&mut self) -> Outcome<()> {
        let end = self.rest.find("#}").ok_or_else(|| Fault::new("a comment has no end"))?;
        let sign = self.rest[..end].chars().next_back();
        self.take(end + 2);
        self.after(sign);
        Ok(())
    }

    /// What lies behind a tag's end belongs to it: a newline, or with `-` all white space.
    fn after(&mut self, sign: Option<char>) {
        let length = match sign {
            Some('+') => 0,
            Some('-') => self.rest.len() - self.rest.trim_start_matches(is_space).len(),
            _none => usize::from(self.rest.starts_with('\n')),
        };
        self.take(length);
    }

    /// `{% raw %}`: its text up to `{% endraw %}`. `opening`: the length of what is left of the tag
    fn raw(&mut self, opening: usize) -> Outcome<()> {
        self.take(opening);
        let (mut search, line_starts) = (0, self.line_starts);
        while let Some(found) = self.rest[search..].find("{%") {
            let start = search + found;
            let tag = &self.rest[start + 2..];
            let sign = tag.chars().next().filter(|sign| matches!(sign, '-' | '+'));
            let inner = tag.strip_prefix(['-', '+']).unwrap_or(tag);
            if let Some((length, close)) = endraw(inner) {
                let text = self.take(start);
                self.take(2 + tag.len() - inner.len() + length);
                self.push_text(trimmed(text, sign, true, line_starts));
                self.after(close);
                return Ok(());
            }
            search = start + 2;
        }
        fail!("a raw block has no end")
    }

    /// The tokens of a tag, up to its end.
    fn tag(&mut self, begin: Token, end: &'static str) -> Outcome<()> {
        let last = if end == "}}" { Token::PrintEnd } else { Token::BlockEnd };
        self.push(begin);
        let mut open = vec![];
        loop {
            if open.is_empty()
                && let Some((length, sign)) = closing(self.rest, end)
            {
                self.take(length);
                self.push(last);
                match (end, sign) {
                    ("}}", Some('-')) | ("%}", _) => self.after(sign),
                    _keeps_what_follows => {}
                }
                return Ok(());
            }
            self.token(&mut open)?;
        }
    }

    fn token(&mut self, open: &mut Vec<&'static str>) -> Outcome<()> {
        let Some(first) = self.rest.chars().next() else { fail!("a tag has no end") };
        if is_space(first) {
            let length = self.rest.len() - self.rest.trim_start_matches(is_space).len();
            self.take(length);
        } else if first.is_ascii_digit() {
            self.number()?;
        } else if first == '_' || first.is_alphanumeric() {
            let length = self.rest.find(|c: char| c != '_' && !c.is_alphanumeric());
            let name = self.take(length.unwrap_or(self.rest.len()));
            if name.len() > LONGEST_NAME {
                fail!("a name is longer than {LONGEST_NAME} bytes");
            }
            self.push(Token::Name(name.to_owned()));
        } else if matches!(first, '\'' | '"') {
            self.string(first)?;
        } else {
            self.operator(open)?;
        }
        Ok(())
    }

    fn operator(&mut self, open: &mut Vec<&'static str>) -> Outcome<()> {
        let found = OPERATORS.into_iter().find(|operator| self.rest.starts_with(operator));
        let Some(operator) = found else {
            fail!("unexpected character {:?}", self.rest.chars().next().unwrap_or(' '));
        };
        match operator {
            "(" => open.push(")"),
            "[" => open.push("]"),
            "{" => open.push("}"),
            ")" | "]" | "}" if open.pop() != Some(operator) => fail!("unexpected `{operator}`"),
            _other => {}
        }
        self.take(operator.len());
        self.push(Token::Operator(operator));
        Ok(())
    }

    fn string(&mut self, quote: char) -> Outcome<()> {
        let mut escaped = false;
        let end = self.rest.char_indices().skip(1).find(|&(_, c)| {
            let ends = c == quote && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let Some((end, _)) = end else { fail!("a string has no end") };
        let text = self.take(end + 1);
        let text = unescaped(&text[1..end])?;
        self.push(Token::Str(text));
        Ok(())
    }

    fn number(&mut self) -> Outcome<()> {
        if self.before != '.'
            && let Some(length) = float(self.rest)
        {
            let digits = self.take(length).replace('_', "");
            let value = digits.parse().map_err(|_error| Fault::new("a wrong number"))?;
            self.push(Token::Float(value));
            return Ok(());
        }
        let (length, radix) = integer(self.rest);
        let digits = self.take(length).replace('_', "");
        let digits = if radix == 10 { &digits[..] } else { &digits[2..] };
        let value = i128::from_str_radix(digits, radix);
        self.push(Token::Int(value.map_err(|_error| Fault::new("a number is too large"))?));
        Ok(())
    }
}

/// Where the next tag begins.
fn tag(text: &str) -> Option<usize> {
    let follows = |at: usize| matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#'));
    text.match_indices('{').map(|(at, _)| at).find(|&at| follows(at))
}

/// Text before a tag: `-` takes white space away, and a block alone in its line what indents it.
fn trimmed(text: &str, sign: Option<char>, block: bool, line_starts: bool) -> &str {
    match sign {
        Some('-') => strip_end(text),
        None if block => {
            let line = text.rfind('\n').map_or(0, |newline| newline + 1);
            let indents = text[line..].chars().all(is_space) && (line > 0 || line_starts);
            if indents { &text[..line] } else { text }
        }
        _as_it_is => text,
    }
}

/// The end of a tag with its sign, and its length.
fn closing(rest: &str, end: &str) -> Option<(usize, Option<char>)> {
    if rest.starts_with(end) {
        return Some((end.len(), None));
    }
    let sign = rest.chars().next().filter(|&sign| sign == '-' || (sign == '+' && end == "%}"))?;
    rest[1..].starts_with(end).then_some((end.len() + 1, Some(sign)))
}

/// The length of ` raw %}` with the white space that belongs to it.
fn raw(rest: &str) -> Option<usize> {
    let inner = rest.trim_start_matches(is_space).strip_prefix("raw")?;
    let inner = inner.trim_start_matches(is_space);
    if let Some(text) = inner.strip_prefix("-%}") {
        return Some(rest.len() - text.trim_start_matches(is_space).len());
    }
    inner.strip_prefix("%}").map(|text| rest.len() - text.len())
}

/// The length of ` endraw %}`, and its sign.
fn endraw(rest: &str) -> Option<(usize, Option<char>)> {
    let inner = rest.trim_start_matches(is_space).strip_prefix("endraw")?;
    let inner = inner.trim_start_matches(is_space);
    let (length, sign) = closing(inner, "%}")?;
    Some((rest.len() - inner.len() + length, sign))
}

/// The length of digits, with `_` between them.
fn digits(text: &str, radix: u32) -> usize {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(|&byte| char::from(byte).is_digit(radix));
    let mut length = 0;
    while digit(length) || (length > 0 && bytes.get(length) == Some(&b'_') && digit(length + 1)) {
        length += 1;
    }
    length
}

/// The length of a number with a fraction or an exponent.
fn float(text: &str) -> Option<usize> {
    let whole = digits(text, 10);
    let fraction = match text[whole..].strip_prefix('.').map(|rest| digits(rest, 10)) {
        Some(length) if length > 0 => length + 1,
        _none => 0,
    };
    let end = whole + fraction;
    let exponent = text[end..].strip_prefix(['e', 'E']).map(|rest| {
        let unsigned = rest.strip_prefix(['+', '-']).unwrap_or(rest);
        (1 + rest.len() - unsigned.len(), digits(unsigned, 10))
    });
    match exponent {
        Some((sign, length)) if length > 0 => Some(end + sign + length),
        _none => (fraction > 0).then_some(end),
    }
}

/// The length of a whole number, and its base.
fn integer(text: &str) -> (usize, u32) {
    for (prefix, radix) in [("0x", 16), ("0o", 8), ("0b", 2)] {
        let has_prefix = text.get(..2).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
        let digits_start = usize::from(text[1..].starts_with('_')) + 2;
        let length =
            if has_prefix { digits(text.get(digits_start..).unwrap_or(""), radix) } else { 0 };
        if length > 0 {
            return (digits_start + length, radix);
        }
    }
    let length = digits(text, 10);
    // As in Python, a number that begins with 0 has no other digits.
    let zeros = text[..length].find(|c| c != '0' && c != '_').unwrap_or(length);
    (if text.starts_with('0') { zeros.max(1) } else { length }, 10)
}

/// Python's escapes.
fn unescaped(text: &str) -> Outcome<String> {
    let mut result = String::with_capacity(text.len());
    let mut high = None;
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        result.push_str(&rest[..at]);
        let (length, code) = escape(&rest[at + 1..], &mut result)?;
        rest = &rest[at + 1 + length..];
        if let Some(code) = code {
            push_code(&mut result, code, &mut high);
        }
    }
    result.push_str(rest);
    Ok(result)
}

/// One escape behind its backslash: its length, and the character's number where it has one.
fn escape(rest: &str, result: &mut String) -> Outcome<(usize, Option<u32>)> {
    let Some(first) = rest.chars().next() else { fail!("a string ends in a backslash") };
    let code = match first {
        '\n' => return Ok((1, None)),
        '\\' | '\'' | '"' => first as u32,
        'a' => 7,
        'b' => 8,
        'f' => 12,
        'n' => 10,
        'r' => 13,
        't' => 9,
        'v' => 11,
        '0'..='7' => {
            let length =
                rest.bytes().take(3).take_while(|byte| (b'0'..=b'7').contains(byte)).count();
            return Ok((length, u32::from_str_radix(&rest[..length], 8).ok()));
        }
        'x' => return hex(rest, 2),
        'u' => return hex(rest, 4),
        'U' => return hex(rest, 8),
        'N' => fail!("the escape `\\N{{...}}` is not supported: write the character itself"),
        unknown => {
            result.push('\\');
            // Python turns such a character into an escape of its own, behind the backslash.
            match unknown as u32 {
                ..=0x7f => result.push(unknown),
                code @ ..=0xff => result.push_str(&format!("x{code:02x}")),
                code @ ..=0xffff => result.push_str(&format!("u{code:04x}")),
                code => result.push_str(&format!("U{code:08x}")),
            }
            return Ok((unknown.len_utf8(), None));
        }
    };
    Ok((1, Some(code)))
}

fn hex(rest: &str, length: usize) -> Outcome<(usize, Option<u32>)> {
    let digits =
        rest.get(1..=length).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
    let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
    match code {
        Some(code) if code <= 0x10_ffff => Ok((length + 1, Some(code))),
        _wrong => fail!("the escape `\\{}` needs {length} digits", &rest[..1]),
    }
}

/// Two halves of a surrogate pair are one character.
fn push_code(result: &mut String, code: u32, high: &mut Option<(usize, u32)>) {
    if let Some((end, first)) = high.take()
        && end == result.len()
        && (0xdc00..0xe000).contains(&code)
    {
        result.truncate(end - char::REPLACEMENT_CHARACTER.len_utf8());
        let whole = 0x10000 + ((first - 0xd800) << 10) + (code - 0xdc00);
        result.push(char::from_u32(whole).unwrap_or(char::REPLACEMENT_CHARACTER));
        return;
    }
    result.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
    if (0xd800..0xdc00).contains(&code) {
        *high = Some((result.len(), code));
    }
}
