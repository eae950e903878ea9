//! The files that inputs are made of: the demo model's and the tests' fixtures, made small.

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Everything by kind. Of each there are several, and parts of one may come into another.
pub struct Corpus {
    pub configs: Vec<Value>,
    pub generation_configs: Vec<Value>,
    pub indexes: Vec<Value>,
    pub shards: PathBuf,
    pub model: PathBuf,
    pub tensors: Vec<Vec<u8>>,
    /// mlx-lm's and PEFT's: configuration and tensors
    pub adapters: [Vec<(Value, Vec<u8>)>; 2],
    pub tokenizers: Vec<Value>,
    /// what may stand in a tokenizer
    pub components: Vec<Value>,
    pub tokenizer_configs: Vec<Value>,
    pub templates: Vec<String>,
}

/// A case of each family beside Qwen3.
const FAMILIES: [&str; 15] = [
    "f32-llama3",
    "f32-mistral-windows",
    "f32-phi3",
    "f32-smollm3",
    "f32-granite",
    "f32-ernie",
    "f32-hunyuan",
    "f32-ministral3",
    "f32-glm4",
    "f32-olmo2",
    "f32-olmo3",
    "f32-gemma2",
    "f32-gemma3",
    "f32-exaone4",
    "f32-cohere2",
];

pub fn repository() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

pub fn parity(case: &str) -> PathBuf {
    repository().join("test/fixtures/parity").join(case)
}

fn json_of(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&bytes)?)
}

impl Corpus {
    pub fn read() -> Result<Self> {
        let demo = repository().join("priv/models/demo");
        let adapter = |case: &str, name: &str, file: &str| {
            let folder = parity(case).join("adapters").join(name);
            let config = json_of(&folder.join("adapter_config.json"))?;
            Ok::<_, anyhow::Error>((config, std::fs::read(folder.join(file))?))
        };
        let mlx_lm = |name| adapter("f32-tied", name, "adapters.safetensors");
        let peft = |name| adapter("f32-dense", name, "adapter_model.safetensors");
        let cases = ["f32-tied", "f32-untied", "f32-overrides", "f32-rope-parameters"];
        let mut configs = cases
            .into_iter()
            .chain(FAMILIES)
            .map(|case| json_of(&parity(case).join("config.json")))
            .collect::<Result<Vec<_>>>()?;
        configs.push(quantized_by_others(configs[0].clone()));
        let tokenizer_config = json_of(&demo.join("tokenizer_config.json"))?;
        Ok(Self {
            configs,
            generation_configs: vec![
                json_of(&demo.join("generation_config.json"))?,
                json!({"eos_token_id": [0, 2], "temperature": 0.7, "top_p": 0.8, "top_k": 20,
                    "repetition_penalty": 1.05, "do_sample": true, "pad_token_id": 0}),
            ],
            indexes: vec![json_of(
                &parity("f32-three-shards").join("model.safetensors.index.json"),
            )?],
            shards: parity("f32-three-shards"),
            model: parity("f32-tied"),
            tensors: vec![std::fs::read(parity("f32-tied").join("model.safetensors"))?],
            adapters: [
                vec![mlx_lm("last-qv")?, mlx_lm("dora")?, mlx_lm("embedding")?],
                vec![peft("peft")?, peft("peft-dora")?, peft("peft-patterns")?],
            ],
            tokenizers: tokenizers(&json_of(&demo.join("tokenizer.json"))?),
            components: components(),
            templates: templates(&tokenizer_config),
            tokenizer_configs: tokenizer_configs(tokenizer_config),
        })
    }
}

/// Fields that other ways to quantize leave in a configuration.
fn quantized_by_others(mut config: Value) -> Value {
    config["quantization_config"] = json!({"quant_method": "awq", "bits": 4, "group_size": 128,
        "version": "gemm", "zero_point": true, "modules_to_not_convert": ["lm_head"]});
    config["rope_scaling"] = json!({"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 512});
    config
}

/// The demo's with few tokens, and one for each other kind of model.
fn tokenizers(demo: &Value) -> Vec<Value> {
    let few = |value: &Value, last: u64| match value {
        Value::Object(vocabulary) => vocabulary
            .iter()
            .filter(|(_, id)| id.as_u64().is_some_and(|id| id < last))
            .map(|(token, id)| (token.clone(), id.clone()))
            .collect::<Map<_, _>>(),
        _ => Map::new(),
    };
    let mut bpe = demo.clone();
    let vocabulary = few(&demo["model"]["vocab"], 300);
    let has = |merge: &&Value| {
        let halves: Vec<String> = match merge {
            Value::String(text) => text.split(' ').map(str::to_owned).collect(),
            Value::Array(halves) => {
                halves.iter().filter_map(|half| half.as_str().map(str::to_owned)).collect()
            }
            _ => vec![],
        };
        vocabulary.contains_key(&halves.concat())
    };
    let merges = demo["model"]["merges"].as_array().into_iter().flatten().filter(has).cloned();
    bpe["model"]["merges"] = merges.collect();
    bpe["model"]["vocab"] = vocabulary.into();
    let of = |model: Value| {
        let mut tokenizer = bpe.clone();
        tokenizer["model"] = model;
        tokenizer["pre_tokenizer"] = json!({"type": "WhitespaceSplit"});
        tokenizer["decoder"] = Value::Null;
        tokenizer
    };
    let words: Map<String, Value> = ["<unk>", "a", "b", "##b", "hello", "\u{2581}a"]
        .into_iter()
        .enumerate()
        .map(|(id, word)| (word.to_owned(), id.into()))
        .collect();
    let scored: Vec<Value> = words.keys().map(|word| json!([word, -1.5])).collect();
    vec![
        of(json!({"type": "WordLevel", "vocab": words, "unk_token": "<unk>"})),
        of(json!({"type": "WordPiece", "vocab": words, "unk_token": "<unk>",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100})),
        of(json!({"type": "Unigram", "vocab": scored, "unk_id": 0, "byte_fallback": false})),
        bpe,
    ]
}

/// Normalizers, pre-tokenizers, decoders and post-processors of all kinds, with their fields.
fn components() -> Vec<Value> {
    vec![
        json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true}),
        json!({"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAA"}),
        json!({"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAAAACAAQAAgMz8AgC4BQAAhyIAgMzkAgC4PQAAeyIAgMzsAgC4BQ"}),
        json!({"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": "xx"}),
        json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}),
        json!({"type": "Prepend", "prepend": "\u{2581}"}),
        json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKD"},
            {"type": "Lowercase"}, {"type": "StripAccents"}, {"type": "Nmt"}]}),
        json!({"type": "Strip", "strip_left": true, "strip_right": true}),
        json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true}),
        json!({"type": "FixedLength", "length": 0}),
        json!({"type": "Digits", "individual_digits": true}),
        json!({"type": "Punctuation", "behavior": "MergedWithNext"}),
        json!({"type": "CharDelimiterSplit", "delimiter": "a"}),
        json!({"type": "UnicodeScripts"}),
        json!({"type": "BertPreTokenizer"}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
        json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
        json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true}),
        json!({"type": "BPEDecoder", "suffix": "</w>"}),
        json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u{2581}"},
            "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]}),
        json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_end|>",
            "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens":
            {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}}}),
        json!({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0],
            "trim_offsets": true, "add_prefix_space": false}),
        json!({"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}),
        json!({"strategy": {"Fixed": 30_000_000}, "direction": "Left", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}),
        json!({"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 4_000_000,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}),
    ]
}

fn tokenizer_configs(config: Value) -> Vec<Value> {
    let mut more = config.clone();
    more["added_tokens_decoder"] = json!({"1280": {"content": "<|stop|>", "special": true,
        "lstrip": false, "rstrip": false, "normalized": false, "single_word": false}});
    more["chat_template"] = json!([{"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ tools | tojson }}"}]);
    more["extra_special_tokens"] = json!({"image_token": "<|image|>"});
    more["bos_token"] = json!({"content": "<|im_start|>", "__type": "AddedToken"});
    vec![config, more]
}

fn templates(tokenizer_config: &Value) -> Vec<String> {
    let demo = tokenizer_config["chat_template"].as_str().unwrap_or_default();
    let mut templates = vec![demo.to_owned()];
    templates.extend(TEMPLATES.map(str::to_owned));
    templates
}

/// With what the templates of the Hub use.
const TEMPLATES: [&str; 6] = [
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}{%- for tool in tools %}{{- \"\\n\" }}{{- tool | tojson }}{%- endfor %}{%- endif %}{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.multi_step_tool and message.role == \"user\" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}{%- for message in messages %}{%- if '</think>' in message.content %}{%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{{- reasoning_content }}{%- endif %}{{- message.role + message.content }}{%- endfor %}",
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
    "{% macro render(message, depth=0) %}{{ depth }}{% if message is mapping %}{% for key, value in message.items() %}{{ key }}: {{ render(value, depth + 1) }}{% endfor %}{% elif message is iterable and message is not string %}{{ message | join(', ') }}{% else %}{{ message }}{% endif %}{% endmacro %}{% for message in messages %}{{ render(message) }}{% generation %}{{ message.content }}{% endgeneration %}{% endfor %}",
    "{% set today = strftime_now('%d %b %Y') %}{% for m in messages | selectattr('role', 'equalto', 'user') | list %}{{ m | tojson(indent=2, ensure_ascii=False) }}{{ m.content[0:3] ~ m.content | length }}{% if not loop.last %}{{ loop.nextitem.role }}{% endif %}{% endfor %}{{ today[:4] }}",
    "{% for i in range(3) %}{% for c in 'abc' %}{% if c == 'b' %}{% continue %}{% endif %}{{ (i * 2 ** 3 // 3) % 5 }}{{ c | upper }}{% endfor %}{% endfor %}{{ {'a': [1, 2.5, none, true], 'b': messages} | pprint }}{{ [3, 1, 2] | sort | reverse | list | string }}",
    "{% set x %}{% filter upper %}{{ messages[-1].content or 'none' }}{% endfilter %}{% endset %}{{ x.strip().replace('A', 'b').split(' ') | map('length') | sum }}{{ '%s-%d' | format('a', 3) }}{{ '{} {}'.format(1, x) }}{{ 'a' if messages is defined else 'b' }}",
];
