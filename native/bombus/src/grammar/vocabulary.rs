//! A tokenizer as llguidance sees it: the bytes of every token, and the tokens of a text.

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use llguidance::toktrie::{TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use std::sync::{Arc, Weak};

pub struct Vocabulary {
    trie: TokTrie,
    /// It lives as long as requests with it do.
    tokenizer: Weak<Tokenizer>,
}

impl Vocabulary {
    pub fn new(tokenizer: &Arc<Tokenizer>) -> Result<Self> {
        let mut words = tokenizer.token_bytes().ok_or_else(|| {
            let message = "format: the bytes of this tokenizer's tokens cannot be told";
            Error::Unsupported(message.into())
        })?;
        // No token's: whichever ends a text is the request's affair.
        let end = words.len() as u32;
        words.push(b"\xff<|end of the text|>".to_vec());
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end), &words);
        Ok(Self { trie, tokenizer: Arc::downgrade(tokenizer) })
    }

    /// The id that stands for the end of the text.
    pub fn end(&self) -> u32 {
        self.trie.eos_token()
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let encode = |text: &str| {
            let ids = self.tokenizer.upgrade().and_then(|it| it.encode_plain(text).ok());
            ids.unwrap_or_else(|| self.trie.greedy_tokenize(text.as_bytes()))
        };
        self.trie.tokenize_with_greedy_fallback(bytes, encode)
    }
}
