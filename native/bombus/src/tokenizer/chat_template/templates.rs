//! The chat templates of a tokenizer: one, or several with names.

use super::ChatTemplate;
use crate::error::{Error, Result};
use crate::files::{self, MOST_TEMPLATES, TEMPLATES};
use serde_json::{Map, Value as Json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The template that is used where none is chosen, and where tools are given.
const DEFAULT: &str = "default";
const WITH_TOOLS: &str = "tool_use";

/// The file of the one that is used by default.
const FILE: &str = "chat_template.jinja";

pub struct ChatTemplates {
    templates: BTreeMap<String, ChatTemplate>,
    /// By name: `bos_token` and the like.
    special_tokens: Map<String, Json>,
}

impl ChatTemplates {
    /// Of a tokenizer's folder: the files of templates, else the field `chat_template` of
    /// `tokenizer_config.json`, which stands at `path`. `None` where there are none.
    pub fn open(
        folder: &Path,
        (path, field): (&Path, Option<&Json>),
        special_tokens: Map<String, Json>,
    ) -> Result<Option<Self>> {
        let mut templates = Self::new(special_tokens);
        templates.add_file(DEFAULT, &folder.join(FILE))?;
        for file in named(&folder.join(TEMPLATES))? {
            let name = file.file_stem().unwrap_or_default().to_string_lossy();
            templates.add_file(&name, &file)?;
        }
        if templates.templates.is_empty() {
            templates.add_field(path, field.unwrap_or(&Json::Null))?;
        }
        Ok((!templates.templates.is_empty()).then_some(templates))
    }

    fn add_file(&mut self, name: &str, path: &Path) -> Result<()> {
        match files::read_text(path, files::TEMPLATE) {
            Err(Error::NotFound(_)) => Ok(()),
            source => self.add(name, path, source?),
        }
    }

    pub fn new(special_tokens: Map<String, Json>) -> Self {
        Self { templates: BTreeMap::new(), special_tokens }
    }

    /// A template, or a list of `{"name", "template"}`.
    fn add_field(&mut self, path: &Path, field: &Json) -> Result<()> {
        let wrong = || {
            let text = "`chat_template`: expected a template, or a list of `name` and `template`";
            Error::Tokenizer(format!("`{}`: {text}", path.display()))
        };
        match field {
            Json::Null => Ok(()),
            Json::String(source) => self.add(DEFAULT, path, source.clone()),
            Json::Array(named) => named.iter().try_for_each(|template| {
                let field = |name: &str| template.get(name)?.as_str();
                let (name, source) = field("name").zip(field("template")).ok_or_else(wrong)?;
                self.add(name, path, source.to_owned())
            }),
            Json::Object(named) => named.iter().try_for_each(|(name, source)| {
                self.add(name, path, source.as_str().ok_or_else(wrong)?.to_owned())
            }),
            _other => Err(wrong()),
        }
    }

    pub fn add(&mut self, name: &str, path: &Path, source: String) -> Result<()> {
        self.templates.insert(name.to_owned(), ChatTemplate::new(path, source)?);
        Ok(())
    }

    /// The names that the templates take from outside, beside the messages.
    pub fn options(&self) -> Vec<String> {
        let names = self.templates.values().flat_map(|template| template.template.names());
        let names: BTreeSet<&str> =
            names.map(|name| &**name).filter(|name| *name != "messages").collect();
        names.into_iter().map(str::to_owned).collect()
    }

    /// `messages`: an array of objects; `options`: what the template takes, and `chat_template`,
    /// the name of one where there are several
    pub fn render(&self, messages: &Json, options: &Map<String, Json>) -> Result<String> {
        self.choose(options)?.render(&self.special_tokens, messages, options)
    }

    fn choose(&self, options: &Map<String, Json>) -> Result<&ChatTemplate> {
        let has_tools = options.get("tools").is_some_and(|tools| !tools.is_null());
        let chosen = match options.get("chat_template") {
            None | Some(Json::Null) => None,
            Some(name) => Some(name.as_str().unwrap_or_default()),
        };
        let found = match chosen {
            Some(name) => self.templates.get(name),
            None if has_tools && self.templates.contains_key(WITH_TOOLS) => {
                self.templates.get(WITH_TOOLS)
            }
            None => self.templates.get(DEFAULT),
        };
        found.ok_or_else(|| self.unknown(chosen))
    }

    #[cold]
    fn unknown(&self, chosen: Option<&str>) -> Error {
        let names: Vec<String> = self.templates.keys().map(|name| format!("`{name}`")).collect();
        let names = names.join(", ");
        Error::Request(match chosen {
            Some(name) => format!("there is no chat template `{name}`, but {names}"),
            None => format!(
                "the tokenizer has several chat templates and no default: choose {names} with \
                 the template option `chat_template`"
            ),
        })
    }
}

/// The files of templates that have names. A folder that is a link to nowhere is an error.
fn named(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder);
    if entries.is_err() && folder.is_symlink() {
        files::open(folder)?;
    }
    let files = entries.into_iter().flatten().flatten().map(|file| file.path());
    let is_template =
        |file: &PathBuf| file.extension().is_some_and(|extension| extension == "jinja");
    let named: Vec<_> = files.filter(is_template).take(MOST_TEMPLATES + 1).collect();
    match named.len() > MOST_TEMPLATES {
        true => Err(Error::Tokenizer(format!(
            "`{}` has more than {MOST_TEMPLATES} chat templates",
            folder.display()
        ))),
        false => Ok(named),
    }
}
