//! What reads the mutated files, and what is done with those that it takes.

use super::corpus::{Corpus, parity};
use super::folder::Folder;
use super::random::Random;
use super::{json, text};
use anyhow::Result;
use bombus::backend::Device;
use bombus::backend::cpu;
use bombus::config::Config;
use bombus::engine::scheduler::Limits;
use bombus::engine::{Engine, Event, Prompt, Request, Sink};
use bombus::error::{Error, Result as Outcome};
use bombus::files::safetensors::TensorFiles;
use bombus::model::adapter::Adapter;
use bombus::tokenizer::{Limit, Tokenizer};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::time::Duration;

/// A parser and its part of the inputs.
pub const PARSERS: [(&str, usize); 10] = [
    ("safetensors", 14),
    ("index", 12),
    ("config", 12),
    ("generation_config", 6),
    ("model", 3),
    ("adapter_config", 14),
    ("adapter", 9),
    ("tokenizer", 6),
    ("tokenizer_config", 10),
    ("chat_template", 14),
];

pub struct Parsers {
    corpus: Corpus,
    /// Whole models, for adapters.
    engines: [Engine; 2],
    conversations: Vec<(Value, Map<String, Value>)>,
}

/// Which parser an input is for.
pub fn parser(random: &mut Random) -> usize {
    let total: usize = PARSERS.iter().map(|(_, part)| part).sum();
    let mut place = random.below(total);
    let found = PARSERS.iter().position(|(_, part)| {
        let own = place < *part;
        place = place.wrapping_sub(*part);
        own
    });
    found.unwrap_or(0)
}

fn device() -> Device {
    Device::Cpu(cpu::Options { threads: 1, ..cpu::Options::default() })
}

impl Parsers {
    pub fn new() -> Result<Self> {
        let load = |case| Engine::load(&parity(case), device(), Limits::default());
        Ok(Self {
            corpus: Corpus::read()?,
            engines: [load("f32-tied")?, load("f32-dense")?],
            conversations: conversations(),
        })
    }

    /// Writes the files of an input.
    pub fn write(&self, random: &mut Random, parser: usize, folder: &mut Folder) -> Result<()> {
        let corpus = &self.corpus;
        let empty: [Value; 0] = [];
        match PARSERS[parser].0 {
            "safetensors" => folder.write("model.safetensors", &self.tensors(random))?,
            "index" => {
                for shard in 1..=3 {
                    let name = format!("model-0000{shard}-of-00003.safetensors");
                    folder.link(&corpus.shards.join(name))?;
                }
                let index = document(random, &corpus.indexes, &empty);
                folder.write("model.safetensors.index.json", &index)?;
            }
            "config" => {
                folder.link(&corpus.model.join("model.safetensors"))?;
                folder.write("config.json", &document(random, &corpus.configs, &empty))?;
            }
            "generation_config" => {
                folder.link(&corpus.model.join("model.safetensors"))?;
                folder.link(&corpus.model.join("config.json"))?;
                let config = document(random, &corpus.generation_configs, &empty);
                folder.write("generation_config.json", &config)?;
            }
            "model" => {
                folder.link(&corpus.model.join("config.json"))?;
                folder.write("model.safetensors", &self.tensors(random))?;
            }
            "adapter_config" | "adapter" => self.write_adapter(random, parser, folder)?,
            "tokenizer" => {
                let tokenizer = document(random, &corpus.tokenizers, &corpus.components);
                folder.write("tokenizer.json", &tokenizer)?;
            }
            "tokenizer_config" => {
                folder.write("tokenizer.json", &json::written(&corpus.tokenizers[0]))?;
                let config = document(random, &corpus.tokenizer_configs, &empty);
                folder.write("tokenizer_config.json", &config)?;
            }
            _ => {
                folder.write("tokenizer.json", &json::written(&corpus.tokenizers[0]))?;
                let (template, other) =
                    (random.pick(&corpus.templates), random.pick(&corpus.templates));
                let mutated = text::mutate_template(random, template, other);
                folder.write("chat_template.jinja", mutated.as_bytes())?;
            }
        }
        Ok(())
    }

    fn write_adapter(&self, random: &mut Random, parser: usize, folder: &mut Folder) -> Result<()> {
        let peft = random.below(2);
        let (config, tensors) = random.pick(&self.corpus.adapters[peft]);
        let name = ["adapters.safetensors", "adapter_model.safetensors"][peft];
        if PARSERS[parser].0 == "adapter" {
            folder.write("adapter_config.json", &json::written(config))?;
            return folder.write(name, &changed_tensors(random, tensors));
        }
        let configs = [config.clone()];
        folder.write("adapter_config.json", &document(random, &configs, &[]))?;
        folder.write(name, tensors)
    }

    fn tensors(&self, random: &mut Random) -> Vec<u8> {
        let file = random.pick(&self.corpus.tensors);
        changed_tensors(random, file)
    }

    /// Reads the files, and uses what they are.
    pub fn run(&self, parser: usize, folder: &Folder) -> Outcome<()> {
        let path = folder.path();
        match PARSERS[parser].0 {
            "safetensors" | "index" => {
                let files = TensorFiles::open(path)?;
                files.names().take(40).try_for_each(|name| files.require(name)?.read().map(drop))
            }
            "config" | "generation_config" | "model" => {
                Config::open(path)?;
                let limits = Limits { max_context: Some(64), ..Limits::default() };
                let engine = Engine::load(path, device(), limits)?;
                generate(&engine, None)
            }
            "adapter_config" | "adapter" => {
                let adapter = Arc::new(Adapter::open(path, None)?);
                let peft = path.join("adapter_model.safetensors").exists();
                generate(&self.engines[usize::from(peft)], Some(adapter))
            }
            _ => self.tokenize(path),
        }
    }

    fn tokenize(&self, path: &std::path::Path) -> Outcome<()> {
        let tokenizer = Tokenizer::open(path)?;
        for text in [
            "hello a b",
            "",
            "  Grüße 🙂 漢\r\n<|im_end|>it's 1234\u{0}",
            "aaaaaaaaaaaaaaaaaaaaaaaa!",
        ] {
            let ids = tokenizer.encode(text)?;
            tokenizer.decode(&ids)?;
        }
        tokenizer.decode(&[0, 5, 299, 300, u32::MAX])?;
        let limit = Limit { tokens: 1 << 20, cancelled: &AtomicBool::new(false) };
        let mut last = Ok(());
        for (messages, options) in &self.conversations {
            last = tokenizer.encode_chat(messages, options, &limit).map(drop);
        }
        // Without a template there is none to ask for.
        if tokenizer.has_chat_template() { last } else { Ok(()) }
    }
}

/// One of the documents with changes: mostly to its values, else to its text.
fn document(random: &mut Random, documents: &[Value], parts: &[Value]) -> Vec<u8> {
    let mut document = random.pick(documents).clone();
    if random.one_in(4) {
        let mut bytes = json::written(&document);
        let other = json::written(random.pick(documents));
        text::mutate(random, &mut bytes, &other);
        return bytes;
    }
    json::mutate(random, &mut document, parts);
    json::written(&document)
}

/// A file of tensors with a changed header, changed data, or changed anywhere.
fn changed_tensors(random: &mut Random, file: &[u8]) -> Vec<u8> {
    let mut bytes = file.to_vec();
    if random.one_in(4) {
        text::mutate(random, &mut bytes, file);
        return bytes;
    }
    let length = u64::from_le_bytes(file[..8].try_into().unwrap_or_default()) as usize;
    let (header, data) = file[8..].split_at(length);
    let header = match serde_json::from_slice(header) {
        Ok(value) if random.one_in(2) => document(random, &[value], &[]),
        _ => {
            let mut header = header.to_vec();
            text::mutate(random, &mut header, file);
            header
        }
    };
    let mut length = header.len() as u64;
    if random.one_in(8) {
        length = random.next() >> random.below(64);
    }
    let mut data = data.to_vec();
    if random.one_in(3) {
        text::mutate(random, &mut data, file);
    }
    [&length.to_le_bytes()[..], &header, &data].concat()
}

/// Two tokens, and the scores of three.
fn generate(engine: &Engine, adapter: Option<Arc<Adapter>>) -> Outcome<()> {
    let (sender, events) = channel();
    let scores = sender.clone();
    let sink = Sink::new(move |event| sender.send(event).is_ok());
    let request = Request {
        adapter: adapter.clone(),
        min_new_tokens: 1,
        ..Request::new(Prompt::Ids(vec![1, 2, 3]), 2)
    };
    let generation = engine.generate(request, sink)?;
    let score = engine.score(
        vec![1, 2, 3],
        adapter,
        None,
        Sink::new(move |event| scores.send(event).is_ok()),
    )?;
    let mut outcome = Ok(());
    let mut ended = 0;
    while ended < 2 {
        match events.recv_timeout(Duration::from_secs(60)) {
            Ok(Event::Failed(error)) => {
                outcome = Err(error);
                ended += 1;
            }
            Ok(Event::Done { .. } | Event::Scores(_)) => ended += 1,
            Ok(_) => {}
            Err(_) => return Err(Error::Panic("a request without an end".into())),
        }
    }
    drop((generation, score));
    outcome
}

/// What templates are asked to render.
fn conversations() -> Vec<(Value, Map<String, Value>)> {
    let tool = json!({"type": "function", "function": {"name": "weather", "description": "now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}});
    let call = json!({"role": "assistant", "content": null, "tool_calls": [{"type": "function",
        "id": "1", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]});
    let options = |value: Value| value.as_object().cloned().unwrap_or_default();
    vec![
        (json!([{"role": "user", "content": "hello"}]), Map::new()),
        (
            json!([{"role": "system", "content": "be <b>"}, {"role": "user", "content": "é 🙂"},
                {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
                {"role": "user", "content": [{"type": "text", "text": "again"}]}]),
            options(json!({"enable_thinking": false})),
        ),
        (
            json!([{"role": "user", "content": "weather?"}, call,
                {"role": "tool", "content": "{\"t\": 3}"}]),
            options(json!({"tools": [tool], "documents": null})),
        ),
    ]
}
