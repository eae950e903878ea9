//! Mutations of bytes and of templates.

use super::json::NUMBERS;
use super::random::Random;

/// No input is longer.
const MOST: usize = 1 << 20;

fn range(random: &mut Random, length: usize) -> std::ops::Range<usize> {
    let start = random.below(length + 1);
    start..(start + random.size(64)).min(length)
}

/// Some changes to bytes. `other`: a file of the same kind
pub fn mutate(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..1 + random.size(5) {
        let place = random.below(bytes.len());
        let part = range(random, bytes.len());
        match random.below(9) {
            0 if !bytes.is_empty() => bytes[place] ^= 1u8 << random.below(8),
            1 if !bytes.is_empty() => bytes[place] = random.next() as u8,
            2 => bytes.truncate(place),
            3 => _ = bytes.drain(part),
            4 => {
                let copy = bytes[part].repeat(1 + random.size(200));
                bytes.splice(place..place, copy);
            }
            5 => {
                let taken = range(random, other.len());
                bytes.splice(part, other[taken].iter().copied());
            }
            6 => {
                let (digits, number) = (number_at(bytes, place), random.pick(NUMBERS).bytes());
                bytes.splice(digits, number);
            }
            7 => {
                let mark = *random.pick(b"{}[]\",:\\\0\n\xff\xf0");
                let count = if random.one_in(10) { 1 + random.size(20_000) } else { 1 };
                bytes.splice(place..place, std::iter::repeat_n(mark, count));
            }
            _ => bytes.extend(range(random, other.len()).map(|place| other[place])),
        }
        bytes.truncate(MOST);
    }
}

/// The digits from `place` on, or nothing there.
fn number_at(bytes: &[u8], place: usize) -> std::ops::Range<usize> {
    let digit = |place: &usize| bytes.get(*place).is_some_and(u8::is_ascii_digit);
    let start = (place..bytes.len()).find(digit).unwrap_or(place.min(bytes.len()));
    start..start + (start..bytes.len()).take_while(digit).count()
}

/// Words of Jinja that stand anywhere in a mutated template.
const WORDS: &[&str] = &[
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "{%-",
    "-%}",
    "{%+",
    " for ",
    " in ",
    " if ",
    " elif ",
    " else ",
    " endif ",
    " endfor ",
    " set ",
    " endset ",
    " macro ",
    " endmacro ",
    " call ",
    " filter ",
    " endfilter ",
    " generation ",
    " break ",
    " continue ",
    "namespace(x=1)",
    "ns.x",
    "loop",
    "loop.index0",
    "loop.previtem",
    "range(9999)",
    "range(10**9)",
    " not ",
    " and ",
    " or ",
    " is ",
    " is not defined ",
    "(",
    ")",
    "[",
    "]",
    "[::-1]",
    "[1:-1]",
    ".",
    ",",
    ":",
    "|",
    "~",
    "+",
    "-",
    "*",
    "**",
    "//",
    "%",
    "==",
    "<",
    "=",
    "'a'*99999",
    "messages",
    "tools",
    "none",
    "true",
    "1e308",
];
const CALLS: &[&str] = &[
    "|tojson(indent=4)",
    "|trim",
    "|length",
    "|join(',')",
    "|map(attribute='content')|list",
    "|selectattr('role','equalto','user')|list",
    "|string|upper",
    "|replace('a','b'*999)",
    "|reverse",
    "|sort",
    "|unique",
    "|batch(2)|list",
    "|items",
    "|dictsort",
    "|default('x')",
    "|first",
    "|last",
    "|pprint",
    "|indent(9)",
    "|int",
    "|float",
    "|abs",
    "|round(3)",
    "|e",
    ".split('|')",
    ".strip()",
    ".startswith('<')",
    ".format(1,2)",
    ".items()",
    ".join(['a'])",
    ".replace('x','y')",
    ".get('a')",
];

/// Some changes to a template.
pub fn mutate_template(random: &mut Random, template: &str, other: &str) -> String {
    let mut words = words(template);
    let others = self::words(other);
    for _ in 0..1 + random.size(6) {
        let place = random.below(words.len() + 1);
        let end = (place + random.size(12)).min(words.len());
        match random.below(8) {
            0 => _ = words.drain(place..end),
            1 => words.insert(place, *random.pick(WORDS)),
            2 => words.insert(place, *random.pick(CALLS)),
            3 => {
                let times =
                    if random.one_in(10) { 1 + random.size(5000) } else { 1 + random.below(3) };
                let copy = words[place..end].repeat(times);
                words.splice(place..place, copy);
            }
            4 if !others.is_empty() => {
                let start = random.below(others.len());
                let stop = (start + random.size(30)).min(others.len());
                words.splice(place..end, others[start..stop].iter().copied());
            }
            5 if !words.is_empty() => {
                let (a, b) = (random.below(words.len()), random.below(words.len()));
                words.swap(a, b);
            }
            6 => words.insert(place, *random.pick(NUMBERS)),
            _ => {
                let deep =
                    *random.pick(&["(", "[", "{", "not ", "-", "{% if 1 %}", "a.", "1+", "{{"]);
                let times = if random.one_in(8) { random.size(30_000) } else { random.size(20) };
                words.splice(place..place, std::iter::repeat_n(deep, times));
            }
        }
        words.truncate(MOST / 16);
    }
    let mut text = words.concat();
    text.truncate(text.floor_char_boundary(MOST));
    text
}

/// A template's words: names, marks, space.
fn words(text: &str) -> Vec<&str> {
    let kind = |c: char| match c {
        c if c.is_alphanumeric() || c == '_' => 0,
        c if c.is_whitespace() => 1,
        '{' | '%' => 2,
        '}' | '-' => 3,
        c => 4 + c as u32,
    };
    let mut words = vec![];
    let mut start = 0;
    let mut before = None;
    for (place, c) in text.char_indices() {
        if before.is_some_and(|before| before != kind(c)) {
            words.push(&text[start..place]);
            start = place;
        }
        before = Some(kind(c));
    }
    words.push(&text[start..]);
    words
}
