//! Text from tokens, one at a time, with the tokenizer that ships.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::tokenizer::{TextStream, Tokenizer};
use common::repository;
use proptest::prelude::*;
use std::sync::{Arc, LazyLock};

static TOKENIZER: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::open(&repository().join("priv/models/demo")).unwrap()));

fn stream(text: &str, stop: &[&str]) -> (Vec<String>, bool) {
    let stop = stop.iter().map(|stop| stop.to_string()).collect();
    let mut stream = TextStream::new(TOKENIZER.clone(), stop);
    let mut pieces = vec![];
    for token in TOKENIZER.encode(text).unwrap() {
        let piece = stream.push(token);
        pieces.push(piece.text);
        if piece.stopped {
            return (pieces, true);
        }
    }
    pieces.push(stream.finish());
    (pieces, false)
}

#[test]
fn characters_that_span_tokens_come_whole() {
    let text = "Grüße 🐝 from 東京, naïve café 👩‍👩‍👧";
    let (pieces, _) = stream(text, &[]);
    assert_eq!(pieces.concat(), text);
    assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
    assert!(TOKENIZER.encode("🐝").unwrap().len() > 1, "the bee must span tokens");
}

#[test]
fn a_replacement_character_of_the_text_s_own_does_not_break_the_next() {
    let (pieces, _) = stream("\u{fffd}\u{1d54a}", &[]);
    assert_eq!(pieces.concat(), "\u{fffd}\u{1d54a}");
    let text = "\u{fffd}".repeat(100);
    assert_eq!(stream(&text, &[]).0.concat(), text);
}

#[test]
fn nothing_of_a_stop_string_leaks() {
    let (pieces, stopped) = stream("Coffee is good. THE END and more", &["THE END"]);
    assert_eq!((pieces.concat().as_str(), stopped), ("Coffee is good. ", true));
    let (pieces, stopped) = stream("Coffee is good. THE EN", &["THE END"]);
    assert_eq!((pieces.concat().as_str(), stopped), ("Coffee is good. THE EN", false));
    let (pieces, stopped) = stream("aaab", &["aab"]);
    assert_eq!((pieces.concat().as_str(), stopped), ("a", true));
    let (pieces, _) = stream("one two three", &["three", "two"]);
    assert_eq!(pieces.concat(), "one ");
}

proptest! {
    #[test]
    fn the_pieces_are_the_text(text in "\\PC{0,40}") {
        let ids = TOKENIZER.encode(&text).unwrap();
        let whole = TOKENIZER.decode(&ids).unwrap();
        prop_assert_eq!(stream(&text, &[]).0.concat(), whole);
    }

    #[test]
    fn a_stop_string_ends_the_text_before_it(
        before in "[a-c ]{0,12}", stop in "[a-c]{1,4}", after in "[a-c ]{0,8}"
    ) {
        let text = format!("{before}{stop}{after}");
        let (pieces, stopped) = stream(&text, &[&stop]);
        let expected = &text[..text.find(&stop).unwrap()];
        prop_assert!(stopped);
        prop_assert_eq!(pieces.concat(), expected);
    }
}
