use super::*;
use serde_json::json;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../test/fixtures/templates.json");

fn render(template: &str, options: Json) -> Result<String> {
    let messages = json!([{"role": "user", "content": "<a> & é"}]);
    render_with(template, &messages, options)
}

fn render_with(template: &str, messages: &Json, options: Json) -> Result<String> {
    let tokens = json!({"eos_token": "<|im_end|>"});
    templates(&json!(template), &tokens)?.render(messages, object(&options))
}

fn templates(field: &Json, tokens: &Json) -> Result<ChatTemplates> {
    let path = Path::new("tokenizer_config.json");
    let opened =
        ChatTemplates::open(Path::new("nowhere"), (path, Some(field)), object(tokens).clone());
    opened.map(|templates| templates.expect("a template"))
}

fn object(json: &Json) -> &Map<String, Json> {
    json.as_object().expect("an object")
}

#[test]
fn templates_render_as_in_transformers() {
    let fixtures = std::env::var("TEMPLATES").unwrap_or(FIXTURES.into());
    let fixtures: Json = serde_json::from_slice(&std::fs::read(fixtures).unwrap()).unwrap();
    let mut wrong = vec![];
    for case in fixtures["cases"].as_array().unwrap() {
        let template = case["template"].as_str().unwrap();
        let field = |name: &str| case.get(name).unwrap_or(&fixtures[name]);
        let options = case.get("options").cloned().unwrap_or(json!({"tools": field("tools")}));
        let rendered = templates(&json!(template), field("special_tokens"))
            .and_then(|templates| templates.render(field("messages"), object(&options)));
        if rendered.as_deref().ok() != case["text"].as_str() {
            wrong.push(format!(
                "{template:?}\n  expected {}\n  got      {rendered:?}",
                case["text"]
            ));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// Texts and lists of parts, for templates that show one of them or both.
#[test]
fn contents_have_the_form_that_the_template_shows() {
    let fixtures: Json = serde_json::from_slice(&std::fs::read(FIXTURES).unwrap()).unwrap();
    for content in fixtures["contents"].as_array().unwrap() {
        let templates = templates(&content["template"], &fixtures["special_tokens"]).unwrap();
        for case in content["cases"].as_array().unwrap() {
            let options = json!({"add_generation_prompt": true});
            let rendered = templates.render(&case["messages"], object(&options)).unwrap();
            assert_eq!(case["text"], rendered, "{}", content["template"]);
        }
    }
}

#[test]
fn roles_have_a_form_of_their_own() {
    let parts = "{% for part in m.content %}{{ part.text }}{% endfor %}";
    let template = format!(
        "{{% for m in messages %}}{{% if m.role == 'tool' %}}[{{{{ m.content }}}}]{{% else %}}{parts}{{% endif %}}|{{% endfor %}}"
    );
    let part = |text: &str| json!({"type": "text", "text": text});
    let messages = json!([
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": [part("1"), part("2")]},
        {"role": "critic", "content": "b"}
    ]);
    assert_eq!(render_with(&template, &messages, json!({})).unwrap(), "a||[12]|b|");
    let refused = "{% if messages[0].role == 'user' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}";
    let messages = json!([{"role": "critic", "content": [part("a")]}]);
    assert_eq!(render_with(refused, &messages, json!({})).unwrap(), "a");
}

#[test]
fn the_last_part_is_continued() {
    let template = "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}</s>{% endfor %}";
    let on = json!({"continue_final_message": true});
    for last in
        [json!("b c"), json!([{"type": "text", "text": "b"}, {"type": "text", "text": " c"}])]
    {
        let messages =
            json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": last}]);
        let text = render_with(template, &messages, on.clone()).unwrap();
        assert_eq!(text, "<user>a</s><assistant>b c");
    }
}

#[test]
fn faults_end_in_errors() {
    let refused = render("{{ raise_exception('roles must alternate') }}", json!({})).unwrap_err();
    assert!(refused.to_string().contains("roles must alternate"), "{refused}");
    let broken = render("{% if %}", json!({})).unwrap_err();
    assert!(broken.to_string().contains("tokenizer_config.json"), "{broken}");
    let line = render("a\nb\n{{ messages.nothing.x }}", json!({})).unwrap_err();
    assert!(line.to_string().contains("(line 3)"), "{line}");
}

/// Values from Python, which prints all digits.
#[test]
fn whole_numbers_have_all_their_digits() {
    let text =
        r#"{"tools": [18446744073709551616, -170141183460469231731687303715884105728, 1e20]}"#;
    let options: Json = bombus_jinja::parse_json("template options", text).unwrap();
    let expected = "[18446744073709551616, -170141183460469231731687303715884105728, 1e+20]";
    for template in ["{{ tools }}", "{{ tools | tojson }}"] {
        assert_eq!(render(template, options.clone()).unwrap(), expected);
    }
    assert_eq!(render("{{ tools[0] + 1 }}", options).unwrap(), "18446744073709551617");
}

/// Templates that ended the process, or did not end.
#[test]
fn hostile_templates_end_in_errors() {
    let long = |text: &str, times: usize| text.repeat(times);
    let grow = |step: &str| {
        format!(
            "{{% set n = namespace(x=[]) %}}{{% for i in range(99999) %}}{{% set n.x = {step} %}}{{% endfor %}}"
        )
    };
    let shared = |end: &str| {
        format!(
            "{{% set n = namespace(x=[], y=[]) %}}{{% for i in range(200) %}}{{% set n.x = [n.x, n.x] %}}{{% set n.y = [n.y, n.y] %}}{{% endfor %}}{end}"
        )
    };
    let big = |step: &str| {
        format!(
            "{{% set n = namespace(x='y' * 9999999) %}}{{% for a in range(99999) %}}{step}{{% endfor %}}"
        )
    };
    let hostile = [
        format!("{{{{ {}1 }}}}", long("-", 60_000)),
        format!("{{{{ {}1 }}}}", long("not ", 60_000)),
        format!("{{{{ 1{} }}}}", long(" + 1", 60_000)),
        format!("{{{{ a{} }}}}", long(".a", 60_000)),
        format!("{{{{ a{} }}}}", long("[0]", 60_000)),
        format!("{{{{ a{} }}}}", long("()", 60_000)),
        format!("{{{{ a{} }}}}", long(" | upper", 60_000)),
        format!("{{{{ a{} }}}}", long(" is defined", 60_000)),
        format!("{{{{ a{} }}}}", long(" and a", 60_000)),
        format!("{{{{ a{} }}}}", long(" if a", 60_000)),
        format!("{{{{ a{} }}}}", long(" if a else a", 60_000)),
        format!("{{{{ {}1 }}}}", long("[", 60_000)),
        format!("{{{{ {}1{} }}}}", long("(", 60_000), long(")", 60_000)),
        format!("{{{{ {}1 }}}}", long("{1:", 60_000)),
        format!("{{{{ {} }}}}", long("a(", 60_000)),
        long("{% if a %}", 60_000),
        long("{% for a in b %}", 60_000),
        long("{% set a %}", 60_000),
        format!("{{% set {}a = 1 %}}", long("(", 60_000)),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
        "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}".into(),
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(),
        "{% set n = namespace() %}{% set n.n = n %}{{ n }}".into(),
        "{% set n = namespace() %}{% set n.n = [n] %}{{ n ~ n.n }}{{ n.n | string }}".into(),
        grow("[n.x]") + "{{ n.x }}",
        grow("{'a': n.x}"),
        grow("(n.x,)"),
        grow("[n.x] | map('list')"),
        grow("[n.x].copy"),
        shared("{{ n.x }}"),
        shared("{{ n.x == n.y }}"),
        shared("{{ n.x < n.y }}"),
        shared("{{ n.x | tojson }}"),
        shared("{{ n.x | pprint }}"),
        shared("{{ n.x in [n.y] }}"),
        shared("{{ [n.x, n.y] | sort }}"),
        shared("{{ '%s' % (n.x,) }}"),
        shared("{{ n.x ~ '' }}"),
        "{{ 'x' * 10 ** 10 }}".into(),
        "{{ [1] * 10 ** 10 }}".into(),
        "{{ 'x'.center(10 ** 12) }}".into(),
        "{{ 'x' | indent(10 ** 12) }}".into(),
        "{{ '\\t'.expandtabs(10 ** 12) }}".into(),
        "{{ '1'.zfill(10 ** 12) }}".into(),
        "{{ [1] | tojson(indent=10 ** 12) }}".into(),
        "{{ [1] | batch(10 ** 12, 1) | list }}".into(),
        "{{ [1] | slice(10 ** 12) | list }}".into(),
        "{{ '%1000000000000d' % 1 }}".into(),
        "{{ '%.1000000000000f' % 1.0 }}".into(),
        "{{ '{:1000000000000}'.format(1) }}".into(),
        "{{ '{:.1000000000000f}'.format(1.0) }}".into(),
        "{{ 10 ** 10 ** 10 }}".into(),
        "{{ range(10 ** 12) | list }}".into(),
        "{{ (range(99999) | join('x')).replace('', 'y' * 99999) }}".into(),
        "{{ ('x' * 99999).join(range(99999) | map('string')) }}".into(),
        "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}".into(),
        "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}".into(),
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".into(),
        "{% for a in range(99999) %}{{ range(99999) | list | length }}{% endfor %}".into(),
        "{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}".into(),
        big("{{ 'a'.strip(n.x) }}"),
        big("{{ 'a'.split(n.x) }}"),
        big("{{ 'a' | replace(n.x, 'b') }}"),
        big("{{ n.x in n.x }}"),
        big("{{ n.x | int }}"),
        big("{{ {n.x: 1} == {n.x: 1} }}"),
        big("{{ messages[0][n.x] is defined }}"),
        big("{{ 'a' | center(n.x | length) | length }}"),
        big("{{ n.x % 1 }}"),
        "{% set n = range(99999) | list %}{% for a in n %}{{ n | last }}{{ n | reverse | first }}{% endfor %}".into(),
        "{% set n = ['a.' * 9999] %}{% for a in range(99999) %}{{ n | map(attribute=n[0]) | list | length }}{% endfor %}".into(),
        format!("{{% for a in range(99999) %}}{{% set {} = 1 %}}{{% endfor %}}", long("a", 99_999)),
    ];
    for template in hostile {
        let shown: String = template.chars().take(200).collect();
        let rendered = render(&template, json!({}));
        assert!(rendered.is_err(), "{shown}");
    }
}

/// What a rendering leaves behind must be freed without going deep, and at all.
#[test]
fn long_chains_of_objects_are_dropped() {
    let chains = [
        "{% set n = namespace(x=1) %}{% for i in range(99999) %}{% set n.x = namespace(x=n.x) %}{% endfor %}",
        "{% set n = namespace(x=1) %}{% for i in range(9999) %}{% macro f(x) %}{{ x }}{% endmacro %}{% set n.x = f %}{% endfor %}",
        "{% set n = namespace(l=1) %}{% macro f(p) %}{% for a in [1] recursive %}{% set n.l = loop %}{% endfor %}{% endmacro %}{% for i in range(9999) %}{{ f(n.l) }}{% endfor %}",
        "{% for i in [1, 2] %}{% if loop.changed(loop) %}x{% endif %}{% endfor %}",
    ];
    for template in chains {
        render(template, json!({})).unwrap();
    }
}

/// Mutated templates: any answer will do, but for a crash or one that never comes.
#[test]
fn mutated_templates_have_an_answer() {
    let fixtures: Json = serde_json::from_slice(&std::fs::read(FIXTURES).unwrap()).unwrap();
    let sources: Vec<&str> = fixtures["cases"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|case| case["template"].as_str())
        .collect();
    let rounds = std::env::var("ROUNDS").map_or(2_000, |rounds| rounds.parse().unwrap());
    let mut random = Random(std::env::var("SEED").map_or(20, |seed| seed.parse().unwrap()));
    for _round in 0..rounds {
        let template = mutated(&sources, &mut random);
        let rendered = templates(&json!(template), &json!({}));
        _ = rendered.map(|it| it.render(&fixtures["messages"], &Map::new()));
    }
}

/// xorshift64
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound.max(1) as u64).unwrap()
    }
}

fn mutated(sources: &[&str], random: &mut Random) -> String {
    let mut chars: Vec<char> = sources[random.below(sources.len())].chars().collect();
    for _ in 0..=random.below(4) {
        let other: Vec<char> = sources[random.below(sources.len())].chars().collect();
        let at = random.below(chars.len() + 1);
        let end = at + random.below((chars.len() - at).min(12) + 1);
        let start = random.below(other.len() + 1);
        let part = &other[start..start + random.below(other.len() - start + 1)];
        match random.below(5) {
            0 => drop(chars.drain(at..end)),
            1 => drop(chars.splice(at..end, part.iter().copied())),
            2 => chars.insert(at, char::from(32 + random.below(95) as u8)),
            3 => {
                let repeated = chars[at..end].repeat(1 + random.below(300));
                drop(chars.splice(at..at, repeated));
            }
            _swap if chars.len() > 1 => {
                let other = random.below(chars.len());
                let at = at.min(chars.len() - 1);
                chars.swap(at, other);
            }
            _short => {}
        }
    }
    chars.into_iter().collect()
}

#[test]
fn the_last_message_is_continued() {
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let trimmed = "{% for m in messages %}{{ m.content | trim }}</s>{% endfor %}";
    let messages =
        json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]);
    let on = json!({"continue_final_message": true});
    assert_eq!(render_with(template, &messages, on.clone()).unwrap(), "<user>a</s><assistant>b ");
    assert_eq!(render_with(trimmed, &messages, on.clone()).unwrap(), "a</s>b");
    let off = json!({"add_generation_prompt": false});
    assert_eq!(render_with(template, &messages, off).unwrap(), "<user>a</s><assistant>b </s>");
    let both = json!({"continue_final_message": true, "add_generation_prompt": true});
    assert!(render_with(template, &messages, both).is_err());
    let gone = render_with("{{ messages[0].content }}", &messages, on);
    assert!(gone.unwrap_err().to_string().contains("cannot be continued"));
}

#[test]
fn a_template_is_chosen_by_its_name() {
    let named =
        json!([{"name": "tool_use", "template": "with tools"}, {"name": "rag", "template": "rag"}]);
    let named = templates(&named, &json!({})).unwrap();
    let render = |options: Json| named.render(&json!([]), object(&options));
    assert_eq!(render(json!({"tools": []})).unwrap(), "with tools");
    assert_eq!(render(json!({"chat_template": "rag"})).unwrap(), "rag");
    let none = render(json!({})).unwrap_err().to_string();
    assert!(none.contains("`rag`, `tool_use`"), "{none}");
    assert!(render(json!({"chat_template": "nope"})).unwrap_err().to_string().contains("`nope`"));
}

#[test]
fn a_template_names_its_options() {
    let template = "{% set x = 1 %}{{ x }}{{ bos_token }}{{ messages }}{% if a %}{% set b = 1 %}{% endif %}{{ b }}{% macro f(c) %}{{ c }}{{ d }}{% endmacro %}{{ f(e) }}{% for g in h %}{{ loop.index }}{{ g }}{% endfor %}{{ range(i) }}";
    let named = templates(&json!(template), &json!({"bos_token": "<s>"})).unwrap();
    assert_eq!(named.options(), ["a", "b", "bos_token", "d", "e", "h", "i"]);
}
