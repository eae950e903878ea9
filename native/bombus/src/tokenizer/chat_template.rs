//! Chat templates, in the Jinja dialect of transformers: Python's methods on strings, its
//! `tojson`, `raise_exception`, blocks trimmed.

use crate::error::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value as JinjaValue};
use minijinja::{Environment, Error as JinjaError, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};
use serde_json::{Map, Value};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Map<String, Value>,
    path: PathBuf,
}

const NAME: &str = "chat";

impl ChatTemplate {
    pub fn new(path: &Path, text: String, special_tokens: Map<String, Value>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_syntax(syntax(path)?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        // Templates come from outside: one that does not end must not hold the engine.
        environment.set_fuel(Some(1_000_000));
        environment.add_template_owned(NAME, text).map_err(|error| wrong(path, &error))?;
        Ok(Self { environment, special_tokens, path: path.to_owned() })
    }

    pub fn render(&self, messages: &Value, options: &Map<String, Value>) -> Result<String> {
        let mut context = self.special_tokens.clone();
        context.insert("messages".into(), messages.clone());
        context.insert("add_generation_prompt".into(), true.into());
        context.extend(options.clone());
        let template =
            self.environment.get_template(NAME).map_err(|error| wrong(&self.path, &error))?;
        template.render(JinjaValue::from(Serde(&context))).map_err(|error| {
            Error::Request(format!("the chat template refuses these messages: {error}"))
        })
    }
}

fn wrong(path: &Path, error: &JinjaError) -> Error {
    Error::Tokenizer(format!("`{}`: the chat template is not valid: {error}", path.display()))
}

fn syntax(path: &Path) -> Result<SyntaxConfig> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    syntax.map_err(|error| wrong(path, &error))
}

/// As `json.dumps(value, ensure_ascii=False)`: minijinja's own filter escapes for HTML.
fn to_json(value: JinjaValue) -> Result<JinjaValue, JinjaError> {
    let mut json = vec![];
    value
        .serialize(&mut Serializer::with_formatter(&mut json, PythonSpaces))
        .map_err(|error| JinjaError::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(JinjaValue::from_safe_string(String::from_utf8_lossy(&json).into_owned()))
}

/// `[1, 2]` and `{"a": 1}`, with a space behind comma and colon.
struct PythonSpaces;

impl Formatter for PythonSpaces {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

fn raise_exception(message: String) -> Result<JinjaValue, JinjaError> {
    Err(JinjaError::new(ErrorKind::InvalidOperation, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(template: &str, options: Value) -> Result<String> {
        let tokens = json!({"eos_token": "<|im_end|>"}).as_object().cloned().unwrap_or_default();
        let template = ChatTemplate::new(Path::new("t.jinja"), template.into(), tokens)?;
        let messages = json!([{"role": "user", "content": "<a> & é"}]);
        template.render(&messages, options.as_object().unwrap_or(&Map::new()))
    }

    #[test]
    fn the_dialect_is_transformers() {
        let python =
            "{%- for m in messages %}\n    {{- m.content.split(' ')[0].upper() }}\n{%- endfor %}";
        assert_eq!(render(python, json!({})).unwrap(), "<A>");
        let json_text = "{{ messages | tojson }}{{ eos_token }}";
        let expected = r#"[{"role": "user", "content": "<a> & é"}]<|im_end|>"#;
        assert_eq!(render(json_text, json!({})).unwrap(), expected);
        let option = "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}";
        assert_eq!(render(option, json!({"enable_thinking": false})).unwrap(), "no");
    }

    #[test]
    fn faults_end_in_errors() {
        let refused = render("{{ raise_exception('roles must alternate') }}", json!({}));
        assert!(refused.unwrap_err().to_string().contains("roles must alternate"));
        let broken = render("{% if %}", json!({}));
        assert!(broken.unwrap_err().to_string().contains("t.jinja"));
        let endless =
            "{% for a in range(10000) %}{% for b in range(10000) %}x{% endfor %}{% endfor %}";
        assert!(render(endless, json!({})).is_err());
    }
}
