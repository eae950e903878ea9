//! Texts that keep to a grammar: which tokens may come next, and which must.
//!
//! The llguidance crate does the work; here it meets a tokenizer. A grammar is compiled once for each
//! tokenizer, and every request begins with a copy.

mod vocabulary;

use crate::error::{Error, Result, catch};
use crate::tokenizer::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use vocabulary::Vocabulary;

/// What a text must be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// a JSON object, whatever is in it
    Json,
    /// JSON that a schema describes: the schema's text
    JsonSchema(String),
    /// what a regular expression matches, from its first character to its last
    Regex(String),
    /// a grammar in llguidance's dialect of Lark
    Lark(String),
}

/// Bytes of a schema, an expression or a grammar.
const LONGEST: usize = 1 << 20;

/// Grammars that are kept compiled, for each tokenizer.
const KEPT: usize = 64;

impl Format {
    fn grammar(&self) -> Result<TopLevelGrammar> {
        let text = match self {
            Format::Json => "",
            Format::JsonSchema(text) | Format::Regex(text) | Format::Lark(text) => text,
        };
        if text.len() > LONGEST {
            let bytes = text.len();
            let message = format!("format: {bytes} bytes, where at most {LONGEST} are taken");
            return Err(Error::Request(message));
        }
        Ok(match self {
            Format::Json => TopLevelGrammar::from_json_schema(spaced(json!({ "type": "object" }))),
            Format::JsonSchema(text) => {
                let schema = bombus_jinja::parse_json("format", text).map_err(Error::Request)?;
                TopLevelGrammar::from_json_schema(spaced(schema))
            }
            Format::Regex(text) => TopLevelGrammar::from_regex(text),
            Format::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        })
    }
}

/// JSON as Python writes it, with one space behind `,` and `:` and no other: small models fall into
/// white space without an end.
fn spaced(mut schema: Value) -> Value {
    if let Some(fields) = schema.as_object_mut() {
        fields.entry("x-guidance").or_insert_with(|| {
            json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " })
        });
    }
    schema
}

/// What may come next in one text.
#[derive(Clone)]
pub struct Constraint {
    matcher: Arc<Mutex<Matcher>>,
    /// The id that stands for the end of the text.
    end: u32,
    /// The tokens that end it.
    ends: Arc<[u32]>,
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        formatter.write_str("Constraint")
    }
}

/// The tokens that may come next, a bit each.
#[derive(Clone, Debug, PartialEq)]
pub struct Allowed {
    words: Vec<u32>,
}

impl Allowed {
    pub fn has(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    fn clear(&mut self, id: u32) {
        if let Some(word) = self.words.get_mut(id as usize / 32) {
            *word &= !(1 << (id % 32));
        }
    }

    fn set(&mut self, id: u32) {
        if let Some(word) = self.words.get_mut(id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }
}

impl Constraint {
    /// Compiles a format for a tokenizer, unless it has done so before. `ends`: the tokens that end a text
    pub fn new(format: &Format, tokenizer: &Arc<Tokenizer>, ends: &[u32]) -> Result<Self> {
        let compiler = Compiler::of(tokenizer)?;
        let matcher = compiler.matcher(format)?;
        Ok(Self { matcher: Arc::new(Mutex::new(matcher)), end: compiler.end, ends: ends.into() })
    }

    /// The tokens that may come next; `withheld`: those that may not come yet, unless nothing else may.
    pub fn allowed(&self, withheld: &[u32]) -> Result<Allowed> {
        let mut matcher = self.lock();
        let mask = guarded(|| matcher.compute_mask_or_eos())?;
        let mut allowed = Allowed { words: mask.as_slice().to_vec() };
        let may_end = allowed.has(self.end);
        let is_end = |id: &u32| self.ends.contains(id);
        let others = mask.num_set() - usize::from(may_end);
        // It stands for no token.
        allowed.clear(self.end);
        if may_end && (others == 0 || !withheld.iter().any(is_end)) {
            self.ends.iter().for_each(|id| allowed.set(*id));
        }
        Ok(allowed)
    }

    /// Takes a token in.
    pub fn take(&self, id: u32) -> Result<()> {
        guarded(|| self.lock().consume_token(id))
    }

    /// The tokens that must follow, where there is only one way on.
    pub fn forced(&self) -> Vec<u32> {
        catch(|| Ok(self.lock().compute_ff_tokens())).unwrap_or_default()
    }

    /// Whether the text is whole, and nothing can follow.
    pub fn is_done(&self) -> bool {
        self.lock().is_stopped()
    }

    fn lock(&self) -> MutexGuard<'_, Matcher> {
        self.matcher.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the crate fails with, also where it panics.
fn guarded<T>(work: impl FnOnce() -> anyhow::Result<T>) -> Result<T> {
    catch(|| work().map_err(|error| Error::Request(format!("format: {}", first_line(&error)))))
}

fn first_line(error: &impl std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().chars().take(400).collect()
}

/// What compiles grammars for one tokenizer.
struct Compiler {
    factory: ParserFactory,
    compiled: Mutex<VecDeque<(Format, Matcher)>>,
    end: u32,
}

static COMPILERS: Mutex<Vec<(Weak<Tokenizer>, Arc<Compiler>)>> = Mutex::new(vec![]);

impl Compiler {
    fn of(tokenizer: &Arc<Tokenizer>) -> Result<Arc<Self>> {
        let mut compilers = COMPILERS.lock().unwrap_or_else(PoisonError::into_inner);
        compilers.retain(|(tokenizer, _)| tokenizer.strong_count() > 0);
        let same = |(known, _): &&(Weak<Tokenizer>, _)| known.as_ptr() == Arc::as_ptr(tokenizer);
        if let Some((_, compiler)) = compilers.iter().find(same) {
            return Ok(compiler.clone());
        }
        let compiler = Arc::new(Self::new(tokenizer)?);
        compilers.push((Arc::downgrade(tokenizer), compiler.clone()));
        Ok(compiler)
    }

    fn new(tokenizer: &Arc<Tokenizer>) -> Result<Self> {
        let vocabulary = Vocabulary::new(tokenizer)?;
        let end = vocabulary.end();
        let vocabulary: TokEnv = Arc::new(vocabulary);
        let capabilities =
            InferenceCapabilities { ff_tokens: true, ..InferenceCapabilities::default() };
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = guarded(|| ParserFactory::new(&vocabulary, capabilities, &slices))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory, compiled: Mutex::default(), end })
    }

    fn matcher(&self, format: &Format) -> Result<Matcher> {
        let lock = || self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, matcher)) = lock().iter().find(|(known, _)| known == format) {
            return Ok(matcher.deep_clone());
        }
        let grammar = format.grammar()?;
        let parser = guarded(|| self.factory.create_parser(grammar))?;
        let matcher = Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return Err(Error::Request(format!("format: {}", first_line(&error))));
        }
        let mut compiled = lock();
        compiled.truncate(KEPT - 1);
        compiled.push_front((format.clone(), matcher.deep_clone()));
        Ok(matcher)
    }
}

#[cfg(test)]
mod tests;
