//! Texts that keep to a format, on the shipped model: whole, in a batch with others, with every other option.

#![allow(clippy::unwrap_used)]

mod common;

use bombus::backend::Device;
use bombus::engine::scheduler::Limits;
use bombus::engine::sequence::FinishReason;
use bombus::engine::{Engine, Prompt, Request};
use bombus::error::Error;
use bombus::grammar::Format;
use bombus::model::adapter::Adapter;
use bombus::sampler::Sampling;
use bombus::tokenizer::Tokenizer;
use common::*;
use serde_json::Value;
use std::sync::Arc;

struct Demo {
    engine: Engine,
    tokenizer: Arc<Tokenizer>,
}

impl Demo {
    fn load(device: Device, limits: Limits) -> Self {
        let folder = repository().join("priv/models/demo");
        let tokenizer = Arc::new(Tokenizer::open(&folder).unwrap());
        Self { engine: Engine::load(&folder, device, limits).unwrap(), tokenizer }
    }

    fn request(&self, format: Option<Format>, tokens: usize, seed: u64) -> Request {
        let sampling = Sampling { temperature: 0.8, seed, ..Sampling::default() };
        Request {
            tokenizer: Some(self.tokenizer.clone()),
            sampling,
            format,
            ..Request::new(Prompt::Text("Write about tea".into()), tokens)
        }
    }
}

fn schema() -> Format {
    Format::JsonSchema(
        r#"{"type": "object", "required": ["title", "tags", "stars"], "additionalProperties": false,
            "properties": {
              "title": {"type": "string", "maxLength": 20},
              "tags": {"type": "array", "items": {"enum": ["tea", "news", "sea"]}, "minItems": 1, "maxItems": 3},
              "stars": {"type": "integer", "minimum": 1, "maximum": 5}}}"#
            .into(),
    )
}

fn fits(text: &str) -> bool {
    let value: Value = serde_json::from_str(text).unwrap();
    let (title, tags) = (value["title"].as_str().unwrap(), value["tags"].as_array().unwrap());
    let known = |tag: &Value| ["tea", "news", "sea"].contains(&tag.as_str().unwrap());
    value.as_object().unwrap().len() == 3
        && title.chars().count() <= 20
        && (1..=3).contains(&tags.len())
        && tags.iter().all(known)
        && (1..=5).contains(&value["stars"].as_i64().unwrap())
}

#[test]
fn every_text_fits_its_schema() {
    on_every_device(|device| {
        let demo = Demo::load(device, Limits::default());
        // MLX's CPU device takes ten times as long.
        let seeds = if matches!(device, Device::Cpu(_)) { 0..12 } else { 0..2 };
        for seed in seeds {
            let answer = generate(&demo.engine, demo.request(Some(schema()), 200, seed)).unwrap();
            assert_eq!(answer.reason, FinishReason::Stop, "{}", answer.text);
            assert!(fits(&answer.text), "{}", answer.text);
        }
        let regex = Some(Format::Regex("(red|blue) [0-9]{2}".into()));
        let answer = generate(&demo.engine, demo.request(regex, 50, 3)).unwrap();
        let (color, number) = answer.text.split_once(' ').unwrap();
        assert!(["red", "blue"].contains(&color) && number.parse::<u32>().is_ok());
        assert_eq!(answer.reason, FinishReason::Stop);
    });
}

#[test]
fn others_of_a_batch_are_as_alone() {
    on_every_device(|device| {
        let demo = Demo::load(device, Limits { prefix_cache: 0, ..Limits::default() });
        let folder = repository().join("priv/models/adapters/pirate");
        let pirate = Arc::new(Adapter::open(&folder, None).unwrap());
        let request = |seed: u64| {
            let format = [None, Some(schema()), Some(Format::Json)][seed as usize % 3].clone();
            let mut request = demo.request(format, 60, seed);
            request.sampling.temperature = 0.0;
            request.sampling.repetition_penalty = if seed.is_multiple_of(2) { 1.1 } else { 1.0 };
            request.adapter = (seed % 4 == 1).then(|| pirate.clone());
            request
        };
        let alone: Vec<_> =
            (0..9).map(|seed| generate(&demo.engine, request(seed)).unwrap()).collect();
        let crowd: Vec<_> =
            (0..9).map(|seed| start(&demo.engine, request(seed)).unwrap()).collect();
        for (running, alone) in crowd.into_iter().zip(alone) {
            assert_eq!(running.wait().unwrap(), alone);
        }
    });
}

#[test]
fn a_format_goes_with_the_other_options() {
    on_every_device(|device| {
        let demo = Demo::load(device, Limits { prefill_chunk: 4, ..Limits::default() });
        // A seed repeats, with logits for every token too.
        let with_logprobs = || {
            let mut request = demo.request(Some(schema()), 200, 5);
            request.sampling.logprobs = Some(2);
            request
        };
        let (answer, usage, logprobs) =
            start(&demo.engine, with_logprobs()).unwrap().wait_for_all().unwrap();
        assert_eq!((logprobs.len(), usage.output_tokens), (answer.ids.len(), answer.ids.len()));
        assert_eq!(generate(&demo.engine, with_logprobs()).unwrap(), answer);
        assert!(fits(&answer.text));
        // What is forced counts, and ends where the text must.
        let forced =
            Some(Format::Regex("The ship sailed over the sea and came home again[.!]".into()));
        let cut = generate(&demo.engine, demo.request(forced.clone(), 5, 1)).unwrap();
        assert_eq!((cut.ids.len(), cut.reason), (5, FinishReason::Length));
        let mut stopped = demo.request(forced.clone(), 50, 1);
        stopped.stop = vec![" sea".into()];
        let stopped = generate(&demo.engine, stopped).unwrap();
        assert_eq!(
            (&stopped.text[..], stopped.reason),
            ("The ship sailed over the", FinishReason::Stop)
        );
        let whole = generate(&demo.engine, demo.request(forced, 50, 1)).unwrap();
        assert!(whole.text.starts_with("The ship sailed over the sea and came home again"));
        // No end before so many tokens, where the format can do without.
        let mut long = demo.request(Some(Format::Regex("a*".into())), 12, 2);
        long.min_new_tokens = 6;
        assert!(generate(&demo.engine, long).unwrap().ids.len() >= 6);
        let mut short = demo.request(Some(Format::Regex("ab".into())), 12, 2);
        short.min_new_tokens = 6;
        assert_eq!(generate(&demo.engine, short).unwrap().text, "ab");
        assert!(all_free());
    });
}

fn all_free() -> bool {
    use bombus::runtime::metrics::SEQUENCES;
    use std::sync::atomic::Ordering::Relaxed;
    SEQUENCES.load(Relaxed) == 0
}

#[test]
fn what_cannot_be_kept_to_is_an_error_before_anything_runs() {
    let demo = Demo::load(Device::Cpu(Default::default()), Limits::default());
    let fails = |request: Request| match generate(&demo.engine, request) {
        Err(Error::Request(message)) => message,
        other => panic!("{other:?}"),
    };
    let bad = Some(Format::JsonSchema(r#"{"type": "objekt"}"#.into()));
    assert!(fails(demo.request(bad, 9, 0)).contains("objekt"));
    let mut without = demo.request(Some(Format::Json), 9, 0);
    without.tokenizer = None;
    without.prompt = Prompt::Ids(vec![5, 6]);
    assert!(fails(without).contains("needs a tokenizer"));
}
