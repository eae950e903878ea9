//! Tokens as a tree. The grammar is Jinja2's, function by function.

mod expressions;

use super::ast::{Body, Expr, For, Kind, Macro, Name, Node, Statement};
use super::fault::{Fault, Outcome, fail};
use super::lexer::{self, Token};
use super::names;
use std::sync::Arc;

/// How many brackets and blocks may be open at once. Python takes 100 blocks in each other.
const OPEN: u32 = 150;

pub fn parse(source: &str) -> Outcome<Body> {
    let mut parser = Parser { tokens: lexer::tokens(source)?, at: 0, open: 0 };
    let body = parser.body(&[]);
    let line = parser.line();
    body.map_err(|fault| fault.at(line))
}

struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
    open: u32,
}

const NAMELESS: &str = "end of the tag";

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    fn line(&self) -> u32 {
        let last = self.tokens.len().saturating_sub(1);
        self.tokens.get(self.at.min(last)).map_or(1, |(_, line)| *line)
    }

    fn is_operator(&self, operator: &str) -> bool {
        matches!(self.peek(), Some(Token::Operator(found)) if *found == operator)
    }

    fn is_name(&self, name: &str) -> bool {
        self.name_at(self.at) == Some(name)
    }

    fn name_at(&self, at: usize) -> Option<&str> {
        match self.tokens.get(at) {
            Some((Token::Name(name), _)) => Some(name),
            _other => None,
        }
    }

    fn skip_operator(&mut self, operator: &str) -> bool {
        let found = self.is_operator(operator);
        self.at += usize::from(found);
        found
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    fn expect_operator(&mut self, operator: &str) -> Outcome<()> {
        if self.skip_operator(operator) { Ok(()) } else { Err(self.unexpected(operator)) }
    }

    fn expect_name(&mut self, name: &str) -> Outcome<()> {
        if self.skip_name(name) { Ok(()) } else { Err(self.unexpected(name)) }
    }

    fn expect(&mut self, token: &Token) -> Outcome<()> {
        if self.peek() != Some(token) {
            return Err(self.unexpected(NAMELESS));
        }
        self.at += 1;
        Ok(())
    }

    fn name(&mut self) -> Outcome<Name> {
        let Some(name) = self.name_at(self.at) else { return Err(self.unexpected("name")) };
        let name = Name::from(name);
        self.at += 1;
        Ok(name)
    }

    #[cold]
    fn unexpected(&self, expected: &str) -> Fault {
        let found = match self.peek() {
            None | Some(Token::Text(_)) => "the end of the template".to_owned(),
            Some(Token::PrintBegin | Token::BlockBegin) => "a tag".to_owned(),
            Some(Token::PrintEnd | Token::BlockEnd) => "the end of the tag".to_owned(),
            Some(Token::Name(name)) => format!("`{name}`"),
            Some(Token::Str(text)) => format!("`{text:?}`"),
            Some(Token::Int(value)) => format!("`{value}`"),
            Some(Token::Float(value)) => format!("`{value}`"),
            Some(Token::Operator(operator)) => format!("`{operator}`"),
        };
        Fault::new(format!("expected `{expected}`, found {found}")).at(self.line())
    }

    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        if self.open >= OPEN {
            fail!("more than {OPEN} brackets or blocks are open at once");
        }
        self.open += 1;
        let parsed = parse(self);
        self.open -= 1;
        parsed
    }

    /// Statements up to a tag of one of these names, which stays; with none up to the end.
    fn body(&mut self, ends: &[&str]) -> Outcome<Body> {
        let mut body = vec![];
        while let Some((token, line)) = self.tokens.get(self.at).cloned() {
            self.at += 1;
            let kind = match token {
                Token::Text(text) => Kind::Text(text.into()),
                Token::PrintBegin => {
                    let value = self.tuple(true, &[], false)?;
                    self.expect(&Token::PrintEnd)?;
                    Kind::Print(value)
                }
                Token::BlockBegin if ends.iter().any(|end| self.is_name(end)) => return Ok(body),
                Token::BlockBegin => {
                    let kind = self.nested(Self::statement).map_err(|fault| fault.at(line))?;
                    self.expect(&Token::BlockEnd)?;
                    kind
                }
                _other => fail!("unexpected text in a tag"),
            };
            body.push(Statement { line, kind });
        }
        if let Some(end) = ends.last() {
            fail!("`{end}` is missing");
        }
        Ok(body)
    }

    /// The rest of a tag's end, and what follows up to one of the ends.
    fn block(&mut self, ends: &[&str]) -> Outcome<Body> {
        self.skip_operator(":");
        self.expect(&Token::BlockEnd)?;
        self.body(ends)
    }

    /// As `block`, with one end that is read too.
    fn whole_block(&mut self, end: &str) -> Outcome<Body> {
        let body = self.block(&[end])?;
        self.at += 1;
        Ok(body)
    }

    fn statement(&mut self) -> Outcome<Kind> {
        let name = self.name()?;
        match &*name {
            "for" => self.for_loop(),
            "if" => self.condition(),
            "set" => self.set(),
            "with" => self.with(),
            "macro" => self.macro_definition(),
            "call" => self.call_block(),
            "filter" => {
                let filter = self.filter_chain(None, true)?;
                let Some(filter) = filter else { return Err(self.unexpected("filter")) };
                Ok(Kind::Filter(filter, self.whole_block("endfilter")?))
            }
            "print" => self.print(),
            "block" => self.named_block(),
            "autoescape" => self.autoescape(),
            // Marks what the assistant says, for a training's mask.
            "generation" => Ok(Kind::Scope(self.whole_block("endgeneration")?)),
            "break" => Ok(Kind::Break),
            "continue" => Ok(Kind::Continue),
            "extends" => self.other("extends"),
            "include" => self.other("include"),
            "import" => self.other("import"),
            "from" => self.other("from"),
            _unknown => fail!("unknown tag `{name}`"),
        }
    }

    fn other(&mut self, name: &'static str) -> Outcome<Kind> {
        while !matches!(self.peek(), None | Some(Token::BlockEnd)) {
            self.at += 1;
        }
        Ok(Kind::Other(name))
    }

    fn for_loop(&mut self) -> Outcome<Kind> {
        let target = self.target(&["in"], false)?;
        self.expect_name("in")?;
        let items = self.tuple(false, &["recursive"], false)?;
        let condition = if self.skip_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.skip_name("recursive");
        let body = self.block(&["else", "endfor"])?;
        let otherwise = if self.skip_name("else") {
            self.whole_block("endfor")?
        } else {
            self.at += 1;
            vec![]
        };
        let each = For { target, items, condition, recursive, body, otherwise };
        Ok(Kind::For(Arc::new(each)))
    }

    fn condition(&mut self) -> Outcome<Kind> {
        let mut branches = vec![];
        loop {
            let test = self.tuple(false, &[], false)?;
            branches.push((test, self.block(&["elif", "else", "endif"])?));
            if self.skip_name("elif") {
                continue;
            }
            let otherwise = if self.skip_name("else") {
                self.whole_block("endif")?
            } else {
                self.at += 1;
                vec![]
            };
            return Ok(Kind::If { branches, otherwise });
        }
    }

    fn set(&mut self) -> Outcome<Kind> {
        let target = self.target(&[], true)?;
        if self.skip_operator("=") {
            return Ok(Kind::Set(target, self.tuple(true, &[], false)?));
        }
        let filter = self.filter_chain(None, false)?;
        let body = self.whole_block("endset")?;
        Ok(Kind::Capture { target, filter, body })
    }

    fn with(&mut self) -> Outcome<Kind> {
        let mut values = vec![];
        while self.peek() != Some(&Token::BlockEnd) {
            if !values.is_empty() {
                self.expect_operator(",")?;
            }
            let target = self.target(&[], false)?;
            self.expect_operator("=")?;
            values.push((target, self.expression()?));
        }
        Ok(Kind::With(values, self.whole_block("endwith")?))
    }

    fn macro_definition(&mut self) -> Outcome<Kind> {
        let name = self.name()?;
        let (parameters, defaults) = self.signature()?;
        let body = self.whole_block("endmacro")?;
        Ok(Kind::Macro(new_macro(name, parameters, defaults, body)))
    }

    fn signature(&mut self) -> Outcome<(Vec<Name>, Vec<Expr>)> {
        let (mut parameters, mut defaults) = (vec![], vec![]);
        self.expect_operator("(")?;
        while !self.is_operator(")") {
            if !parameters.is_empty() {
                self.expect_operator(",")?;
            }
            parameters.push(self.name()?);
            if self.skip_operator("=") {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                fail!("a parameter without a default follows one that has one");
            }
        }
        self.expect_operator(")")?;
        Ok((parameters, defaults))
    }

    fn call_block(&mut self) -> Outcome<Kind> {
        let (parameters, defaults) =
            if self.is_operator("(") { self.signature()? } else { (vec![], vec![]) };
        let call = self.expression()?;
        if !matches!(call.node, Node::Call(..)) {
            return Err(self.unexpected("call"));
        }
        let body = self.whole_block("endcall")?;
        Ok(Kind::Call { call, caller: new_macro("caller".into(), parameters, defaults, body) })
    }

    fn print(&mut self) -> Outcome<Kind> {
        let mut values = vec![];
        while self.peek() != Some(&Token::BlockEnd) {
            if !values.is_empty() {
                self.expect_operator(",")?;
            }
            values.push(self.expression()?);
        }
        // An empty text before them makes a text of a single value too.
        values.insert(0, Expr::new(Node::Text("".into()))?);
        Ok(Kind::Print(Expr::new(Node::Concat(values))?))
    }

    fn named_block(&mut self) -> Outcome<Kind> {
        let name = self.name()?;
        self.skip_name("scoped");
        self.skip_name("required");
        let body = self.whole_block("endblock")?;
        self.skip_name(&name);
        Ok(Kind::Scope(body))
    }

    fn autoescape(&mut self) -> Outcome<Kind> {
        if !matches!(self.expression()?.node, Node::Bool(false)) {
            fail!("`autoescape` is not supported: prompts are no HTML");
        }
        Ok(Kind::Scope(self.whole_block("endautoescape")?))
    }
}

fn new_macro(name: Name, parameters: Vec<Name>, defaults: Vec<Expr>, body: Body) -> Arc<Macro> {
    let used = names::undeclared(&body);
    let uses = |name: &str| used.contains(name) && !parameters.iter().any(|known| &**known == name);
    let (caller, varargs, kwargs) = (uses("caller"), uses("varargs"), uses("kwargs"));
    Arc::new(Macro { name, parameters, defaults, body, caller, varargs, kwargs })
}
