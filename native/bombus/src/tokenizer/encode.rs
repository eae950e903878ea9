//! Text to token ids, piece by piece: it ends as soon as there are more tokens than fit, or nobody
//! waits for them any more.

use super::added::{Added, Found};
use super::bound::{Bound, Spelling};
use super::definition::{Definition, invalid};
use super::pieces::Pieces;
use crate::error::{Error, Result, catch};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokenizers::{
    AddedToken, Encoding, Model as _, ModelWrapper, NormalizedString, Normalizer as _,
};

/// Bytes that a text may have, once it is normalized and split.
const LONGEST: f64 = (64 << 20) as f64;

/// Bytes of a text that goes through the crate's own pre-tokenizers, which take a thousand bytes
/// for each byte.
const LONGEST_WHOLE: usize = 1 << 20;

/// Pieces between two looks at the clock.
const PIECES: usize = 64;

/// The time for a text, and more for each byte: a hundred times what published tokenizers take.
const PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE_PER_BYTE: Duration = Duration::from_micros(20);

/// What a text may cost.
pub struct Limit<'a> {
    /// More tokens than this are refused.
    pub tokens: usize,
    /// Whether nobody waits any more.
    pub cancelled: &'a AtomicBool,
}

pub struct Encoder {
    path: PathBuf,
    /// None where only the crate knows how to split a text.
    pieces: Option<Pieces>,
    /// Whether texts in ASCII are normalized already.
    keeps_ascii: bool,
    added: Added,
    normalized: Added,
    before: Vec<u32>,
    behind: Vec<u32>,
    growth: f64,
    bound: Option<Bound>,
}

impl Encoder {
    pub fn new(
        definition: &Definition,
        tokenizer: &tokenizers::Tokenizer,
        vocabulary: &HashMap<String, u32>,
    ) -> Result<Self> {
        let wrong = |error: String| definition.invalid(&error);
        let pieces = Pieces::new(&definition.pre_tokenizer);
        let pieces = pieces.map_err(|error| wrong(format!("`pre_tokenizer`: {error}")))?;
        if pieces.is_none() && definition.backtracks() {
            return Err(wrong(
                "`pre_tokenizer`: patterns that look around are supported beside `Split`, \
                 `Digits`, `ByteLevel` and `Metaspace` only"
                    .into(),
            ));
        }
        let [added, normalized] = added(tokenizer).map_err(wrong)?;
        let (before, behind) =
            around(tokenizer).map_err(|error| wrong(format!("`post_processor`: {error}")))?;
        let kind = definition.normalizer["type"].as_str();
        let keeps_ascii = matches!(kind, None | Some("NFC" | "NFD" | "NFKC" | "NFKD"));
        let strips = added.strips() || normalized.strips();
        let bound = pieces.as_ref().filter(|_| !strips);
        let bound = bound.and_then(|pieces| bound_of(definition, tokenizer, vocabulary, pieces));
        Ok(Self {
            path: definition.path.clone(),
            pieces,
            keeps_ascii,
            added,
            normalized,
            before,
            behind,
            growth: definition.text_growth,
            bound,
        })
    }

    /// Puts these tokens around a text too.
    pub fn put_around(&mut self, before: Option<u32>, behind: Option<u32>) {
        self.before.splice(..0, before);
        self.behind.extend(behind);
    }

    /// `special`: with the tokens that the tokenizer puts around a text
    pub fn encode(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
        special: bool,
        limit: &Limit,
    ) -> Result<Vec<u32>> {
        self.check(text, limit)?;
        let (before, behind): (&[u32], &[u32]) =
            if special { (&self.before, &self.behind) } else { (&[], &[]) };
        let mut ids = Ids::new(before, text.len(), limit);
        let made = catch(|| match &self.pieces {
            Some(pieces) => self.pieces(pieces, tokenizer, text, &mut ids),
            None => self.whole(tokenizer, text, &mut ids),
        });
        made.map_err(|error| match error {
            Error::Panic(panic) => invalid(&self.path, &panic),
            error => error,
        })?;
        ids.ids.extend(behind);
        Ok(ids.ids)
    }

    /// What shows without making tokens.
    fn check(&self, text: &str, limit: &Limit) -> Result<()> {
        let least = self.bound.as_ref().map_or(0, |bound| bound.tokens(text));
        if least > limit.tokens {
            return Err(too_long(least, limit.tokens));
        }
        let most = match self.pieces {
            Some(_) => (LONGEST / self.growth) as usize,
            None => LONGEST_WHOLE,
        };
        match text.len() > most {
            true => Err(Error::PromptTooLong(format!(
                "the text has {} bytes, where this tokenizer takes at most {most}",
                text.len()
            ))),
            false => Ok(()),
        }
    }

    fn pieces(
        &self,
        pieces: &Pieces,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
        ids: &mut Ids,
    ) -> Result<()> {
        let model = tokenizer.get_model();
        for part in self.added.split(text) {
            let range = match part {
                Found::Token(id) => {
                    ids.push(id)?;
                    continue;
                }
                Found::Text(range) => range,
            };
            let mut first = range.start == 0;
            let normal = self.normalize(tokenizer, &text[range])?;
            for part in self.normalized.split(&normal) {
                match part {
                    Found::Token(id) => ids.push(id)?,
                    Found::Text(range) => {
                        first &= range.start == 0;
                        let part = &normal[range];
                        pieces.each(part, first, &mut |piece| ids.piece(model, piece))?;
                    }
                }
            }
        }
        Ok(())
    }

    fn normalize<'a>(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &'a str,
    ) -> Result<Cow<'a, str>> {
        let Some(normalizer) = tokenizer.get_normalizer() else { return Ok(text.into()) };
        if self.keeps_ascii && text.is_ascii() {
            return Ok(text.into());
        }
        let mut normal = NormalizedString::from(text);
        normalizer.normalize(&mut normal).map_err(|error| Error::Tokenizer(error.to_string()))?;
        Ok(normal.get().to_owned().into())
    }

    fn whole(&self, tokenizer: &tokenizers::Tokenizer, text: &str, ids: &mut Ids) -> Result<()> {
        let encoding = tokenizer.encode_fast(text, false);
        let encoding = encoding.map_err(|error| Error::Tokenizer(error.to_string()))?;
        encoding.get_ids().iter().try_for_each(|id| ids.push(*id))
    }
}

/// Token ids in the making.
struct Ids<'a> {
    ids: Vec<u32>,
    pieces: usize,
    /// Beyond these, nobody needs to know how many there are.
    most: usize,
    limit: &'a Limit<'a>,
    deadline: Instant,
}

impl<'a> Ids<'a> {
    fn new(before: &[u32], bytes: usize, limit: &'a Limit) -> Self {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        Self {
            ids: before.to_vec(),
            pieces: 0,
            most: limit.tokens.saturating_mul(2).saturating_add(1024),
            limit,
            deadline: Instant::now() + PATIENCE + PATIENCE_PER_BYTE * bytes,
        }
    }

    fn push(&mut self, id: u32) -> Result<()> {
        self.ids.push(id);
        self.check()
    }

    fn piece(&mut self, model: &ModelWrapper, piece: &str) -> Result<()> {
        let tokens = model.tokenize(piece);
        let tokens = tokens.map_err(|error| Error::Tokenizer(error.to_string()))?;
        self.ids.extend(tokens.iter().map(|token| token.id));
        self.check()
    }

    fn check(&mut self) -> Result<()> {
        if self.ids.len() > self.most {
            return Err(too_long(self.ids.len(), self.limit.tokens));
        }
        self.pieces += 1;
        if !self.pieces.is_multiple_of(PIECES) {
            return Ok(());
        }
        if self.limit.cancelled.load(Relaxed) {
            return Err(Error::Stopped);
        }
        if Instant::now() > self.deadline {
            let wrong = "the tokenizer's pattern takes too long for this text";
            return Err(Error::Request(wrong.into()));
        }
        Ok(())
    }
}

fn too_long(least: usize, context: usize) -> Error {
    Error::PromptTooLong(format!("at least {least} tokens, where the context is {context}"))
}

/// The tokens that are found in a text, and those that are found in the normalized text.
fn added(tokenizer: &tokenizers::Tokenizer) -> Result<[Added; 2], String> {
    let mut tokens: Vec<(u32, AddedToken)> = tokenizer
        .get_added_vocabulary()
        .get_added_tokens_decoder()
        .iter()
        .map(|(id, token)| (*id, token.clone()))
        .collect();
    tokens.sort_by_key(|(id, _)| *id);
    let (normalized, plain): (Vec<_>, Vec<_>) =
        tokens.into_iter().partition(|(_, token)| token.normalized);
    let plain = plain.into_iter().map(|(id, token)| (token.content.clone(), id, token));
    let normal = normalized
        .into_iter()
        .map(|(id, token)| Ok((normalized_content(tokenizer, &token)?, id, token)));
    // A token that is normalized to nothing is nowhere.
    let normal = normal.filter(|token| !token.as_ref().is_ok_and(|(text, ..)| text.is_empty()));
    Ok([Added::new(plain.collect())?, Added::new(normal.collect::<Result<_, String>>()?)?])
}

fn normalized_content(
    tokenizer: &tokenizers::Tokenizer,
    token: &AddedToken,
) -> Result<String, String> {
    let mut content = NormalizedString::from(token.content.as_str());
    if let Some(normalizer) = tokenizer.get_normalizer() {
        normalizer.normalize(&mut content).map_err(|error| error.to_string())?;
    }
    Ok(content.get().to_owned())
}

/// The added tokens that the normalizer changes, as it changes them.
pub fn normalized_tokens(
    tokenizer: &tokenizers::Tokenizer,
) -> Result<HashMap<u32, String>, String> {
    let mut changed = HashMap::new();
    let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
    for (id, token) in added.iter().filter(|(_, token)| token.normalized) {
        let content = normalized_content(tokenizer, token)?;
        if content != token.content {
            changed.insert(*id, content);
        }
    }
    Ok(changed)
}

/// The tokens that a tokenizer puts before and behind a text.
fn around(tokenizer: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    const TEXT: u32 = u32::MAX;
    let text = tokenizers::Token::new(TEXT, "text".into(), (0, 4));
    let mut ids = vec![];
    let done = catch(|| {
        let encoding = Encoding::from_tokens(vec![text], 0);
        let encoding = tokenizer.post_process(encoding, None, true);
        let encoding = encoding.map_err(|error| Error::Tokenizer(error.to_string()))?;
        ids = encoding.get_ids().to_vec();
        Ok(())
    });
    done.map_err(|error| error.to_string())?;
    let places: Vec<usize> = (0..ids.len()).filter(|place| ids[*place] == TEXT).collect();
    match places[..] {
        [place] => Ok((ids[..place].to_vec(), ids[place + 1..].to_vec())),
        _ => Err("expected the text once".into()),
    }
}

fn bound_of(
    definition: &Definition,
    tokenizer: &tokenizers::Tokenizer,
    vocabulary: &HashMap<String, u32>,
    pieces: &Pieces,
) -> Option<Bound> {
    let kinds = definition.normalizers();
    let composes = kinds == ["NFC"];
    let keeps = |kind: &&str| matches!(*kind, "Prepend" | "Replace");
    if !pieces.keep_everything() || !(composes || kinds.iter().all(keeps)) {
        return None;
    }
    // What is replaced by less would be more bytes than its token has.
    if definition.shortens() {
        return None;
    }
    let spelling = match tokenizer.get_model() {
        ModelWrapper::BPE(_) if pieces.ends_in_bytes() => Spelling::Characters,
        ModelWrapper::BPE(model) if model.byte_fallback && pieces.keeps_text() => {
            Spelling::Fallback
        }
        ModelWrapper::Unigram(model) if model.byte_fallback() && pieces.keeps_text() => {
            Spelling::Fallback
        }
        _ => return None,
    };
    let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
    let added = added.values().map(|token| token.content.as_str());
    Bound::new(vocabulary, added, spelling, composes)
}
