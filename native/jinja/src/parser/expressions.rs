//! Expressions, from the loosest operator to the tightest.

use super::super::ast::{Arguments, Binary, Compare, Expr, Name, Node, Target};
use super::super::fault::{Outcome, fail};
use super::super::lexer::Token;
use super::Parser;

impl Parser {
    /// What is assigned to: names, and tuples of them. `fields`: fields of namespaces too
    pub(super) fn target(&mut self, ends: &[&str], fields: bool) -> Outcome<Target> {
        let value = self.tuple(false, ends, true)?;
        as_target(value, fields)
    }

    /// One expression, or several with commas between them. `simple`: only names and literals
    pub(super) fn tuple(
        &mut self,
        conditional: bool,
        ends: &[&str],
        simple: bool,
    ) -> Outcome<Expr> {
        let mut items = vec![];
        let mut is_tuple = false;
        loop {
            if !items.is_empty() {
                self.expect_operator(",")?;
            }
            if self.ends_tuple(ends) {
                break;
            }
            items.push(match (simple, conditional) {
                (true, _) => self.target_item()?,
                (false, true) => self.expression()?,
                (false, false) => self.or()?,
            });
            if !self.is_operator(",") {
                break;
            }
            is_tuple = true;
        }
        match items.pop() {
            Some(only) if !is_tuple => Ok(only),
            Some(last) => {
                items.push(last);
                Expr::new(Node::Tuple(items))
            }
            None => Err(self.unexpected("expression")),
        }
    }

    fn ends_tuple(&self, ends: &[&str]) -> bool {
        matches!(self.peek(), None | Some(Token::PrintEnd | Token::BlockEnd))
            || self.is_operator(")")
            || ends.iter().any(|end| self.is_name(end))
    }

    /// A name, `namespace.field`, or names in parentheses.
    fn target_item(&mut self) -> Outcome<Expr> {
        if !matches!(self.peek(), Some(Token::Name(_))) {
            return self.primary();
        }
        let value = self.primary()?;
        if !self.skip_operator(".") {
            return Ok(value);
        }
        let field = self.name()?;
        Expr::new(Node::Attribute(Box::new(value), field))
    }

    pub(super) fn expression(&mut self) -> Outcome<Expr> {
        self.nested(Self::conditional)
    }

    fn conditional(&mut self) -> Outcome<Expr> {
        let mut value = self.or()?;
        while self.skip_name("if") {
            let test = Box::new(self.or()?);
            let otherwise =
                if self.skip_name("else") { Some(Box::new(self.expression()?)) } else { None };
            value = Expr::new(Node::If { test, then: Box::new(value), otherwise })?;
        }
        Ok(value)
    }

    pub(super) fn or(&mut self) -> Outcome<Expr> {
        let mut left = self.and()?;
        while self.skip_name("or") {
            left = Expr::new(Node::Or(Box::new((left, self.and()?))))?;
        }
        Ok(left)
    }

    fn and(&mut self) -> Outcome<Expr> {
        let mut left = self.not()?;
        while self.skip_name("and") {
            left = Expr::new(Node::And(Box::new((left, self.not()?))))?;
        }
        Ok(left)
    }

    fn not(&mut self) -> Outcome<Expr> {
        if self.skip_name("not") {
            let value = self.nested(Self::not)?;
            return Expr::new(Node::Not(Box::new(value)));
        }
        self.compare()
    }

    fn compare(&mut self) -> Outcome<Expr> {
        let first = self.sum()?;
        let mut rest = vec![];
        while let Some(operator) = self.skip_comparison() {
            rest.push((operator, self.sum()?));
        }
        if rest.is_empty() { Ok(first) } else { Expr::new(Node::Compare(Box::new(first), rest)) }
    }

    fn skip_comparison(&mut self) -> Option<Compare> {
        let (operator, length) = match self.peek()? {
            Token::Operator("==") => (Compare::Equal, 1),
            Token::Operator("!=") => (Compare::NotEqual, 1),
            Token::Operator("<") => (Compare::Less, 1),
            Token::Operator("<=") => (Compare::LessEqual, 1),
            Token::Operator(">") => (Compare::Greater, 1),
            Token::Operator(">=") => (Compare::GreaterEqual, 1),
            Token::Name(name) if name == "in" => (Compare::In, 1),
            Token::Name(name) if name == "not" && self.name_at(self.at + 1) == Some("in") => {
                (Compare::NotIn, 2)
            }
            _other => return None,
        };
        self.at += length;
        Some(operator)
    }

    fn sum(&mut self) -> Outcome<Expr> {
        let signs = [("+", Binary::Add), ("-", Binary::Subtract)];
        self.binary(&signs, Self::concat)
    }

    fn concat(&mut self) -> Outcome<Expr> {
        let first = self.product()?;
        if !self.is_operator("~") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_operator("~") {
            items.push(self.product()?);
        }
        Expr::new(Node::Concat(items))
    }

    fn product(&mut self) -> Outcome<Expr> {
        let signs = [
            ("*", Binary::Multiply),
            ("/", Binary::Divide),
            ("//", Binary::FloorDivide),
            ("%", Binary::Remainder),
        ];
        self.binary(&signs, Self::power)
    }

    fn power(&mut self) -> Outcome<Expr> {
        self.binary(&[("**", Binary::Power)], |parser| parser.unary(true))
    }

    fn binary(
        &mut self,
        signs: &[(&str, Binary)],
        operand: fn(&mut Self) -> Outcome<Expr>,
    ) -> Outcome<Expr> {
        let mut left = operand(self)?;
        while let Some(&(_, sign)) = signs.iter().find(|(sign, _)| self.is_operator(sign)) {
            self.at += 1;
            left = Expr::new(Node::Binary(sign, Box::new((left, operand(self)?))))?;
        }
        Ok(left)
    }

    fn unary(&mut self, filters: bool) -> Outcome<Expr> {
        let value = if self.skip_operator("-") {
            let value = self.nested(|parser| parser.unary(false))?;
            Expr::new(Node::Minus(Box::new(value)))?
        } else if self.skip_operator("+") {
            let value = self.nested(|parser| parser.unary(false))?;
            Expr::new(Node::Plus(Box::new(value)))?
        } else {
            self.primary()?
        };
        let value = self.postfix(value)?;
        if filters { self.filters(value) } else { Ok(value) }
    }

    fn primary(&mut self) -> Outcome<Expr> {
        let Some(token) = self.peek().cloned() else { return Err(self.unexpected("expression")) };
        let node = match token {
            Token::Name(name) => named(&name),
            Token::Str(first) => return self.strings(first),
            Token::Int(value) => Node::Int(value),
            Token::Float(value) => Node::Float(value),
            Token::Operator("(") => return self.parenthesis(),
            Token::Operator("[") => Node::List(self.list()?),
            Token::Operator("{") => Node::Dict(self.dict()?),
            _other => return Err(self.unexpected("expression")),
        };
        if !matches!(node, Node::List(_) | Node::Dict(_)) {
            self.at += 1;
        }
        Expr::new(node)
    }

    /// Strings one behind the other are one.
    fn strings(&mut self, mut text: String) -> Outcome<Expr> {
        self.at += 1;
        while let Some(Token::Str(more)) = self.peek() {
            text.push_str(more);
            self.at += 1;
        }
        Expr::new(Node::Text(text.into()))
    }

    fn parenthesis(&mut self) -> Outcome<Expr> {
        self.at += 1;
        if self.skip_operator(")") {
            return Expr::new(Node::Tuple(vec![]));
        }
        let value = self.nested(|parser| parser.tuple(true, &[], false))?;
        self.expect_operator(")")?;
        Ok(value)
    }

    fn list(&mut self) -> Outcome<Vec<Expr>> {
        self.expect_operator("[")?;
        let mut items = vec![];
        while !self.skip_operator("]") {
            if !items.is_empty() {
                self.expect_operator(",")?;
                if self.skip_operator("]") {
                    break;
                }
            }
            items.push(self.expression()?);
        }
        Ok(items)
    }

    fn dict(&mut self) -> Outcome<Vec<(Expr, Expr)>> {
        self.expect_operator("{")?;
        let mut pairs = vec![];
        while !self.skip_operator("}") {
            if !pairs.is_empty() {
                self.expect_operator(",")?;
                if self.skip_operator("}") {
                    break;
                }
            }
            let key = self.expression()?;
            self.expect_operator(":")?;
            pairs.push((key, self.expression()?));
        }
        Ok(pairs)
    }

    fn postfix(&mut self, mut value: Expr) -> Outcome<Expr> {
        loop {
            value = match self.peek() {
                Some(Token::Operator(".")) => self.attribute(value)?,
                Some(Token::Operator("[")) => self.subscript(value)?,
                Some(Token::Operator("(")) => self.call(value)?,
                _other => return Ok(value),
            };
        }
    }

    fn filters(&mut self, mut value: Expr) -> Outcome<Expr> {
        loop {
            if self.is_operator("|") {
                let Some(filtered) = self.filter_chain(Some(value), false)? else {
                    return Err(self.unexpected("filter"));
                };
                value = filtered;
            } else if self.skip_name("is") {
                value = self.test(value)?;
            } else if self.is_operator("(") {
                value = self.call(value)?;
            } else {
                return Ok(value);
            }
        }
    }

    fn attribute(&mut self, value: Expr) -> Outcome<Expr> {
        self.at += 1;
        if let Some(&Token::Int(index)) = self.peek() {
            self.at += 1;
            let index = Expr::new(Node::Int(index))?;
            return Expr::new(Node::Item(Box::new(value), Box::new(index)));
        }
        Expr::new(Node::Attribute(Box::new(value), self.name()?))
    }

    fn subscript(&mut self, value: Expr) -> Outcome<Expr> {
        self.at += 1;
        let value = Box::new(value);
        let first = self.bound()?;
        if self.is_operator(":") {
            let bounds = self.bounds(first)?;
            self.expect_operator("]")?;
            return Expr::new(Node::Slice(value, Box::new(bounds)));
        }
        let Some(mut key) = first else { return Err(self.unexpected("expression")) };
        if self.is_operator(",") {
            let mut items = vec![key];
            while self.skip_operator(",") {
                items.push(self.expression()?);
            }
            key = Expr::new(Node::Tuple(items))?;
        }
        self.expect_operator("]")?;
        Expr::new(Node::Item(value, Box::new(key)))
    }

    /// `start:stop:step`, each of which may be left out.
    fn bounds(&mut self, start: Option<Expr>) -> Outcome<[Option<Expr>; 3]> {
        self.expect_operator(":")?;
        let stop = self.bound()?;
        let step = if self.skip_operator(":") { self.bound()? } else { None };
        Ok([start, stop, step])
    }

    fn bound(&mut self) -> Outcome<Option<Expr>> {
        if self.is_operator(":") || self.is_operator("]") {
            return Ok(None);
        }
        self.expression().map(Some)
    }

    fn call(&mut self, function: Expr) -> Outcome<Expr> {
        let arguments = self.arguments()?;
        Expr::new(Node::Call(Box::new(function), arguments))
    }

    fn arguments(&mut self) -> Outcome<Arguments> {
        let mut arguments = Arguments::default();
        self.expect_operator("(")?;
        let mut first = true;
        while !self.skip_operator(")") {
            if !first {
                self.expect_operator(",")?;
                if self.skip_operator(")") {
                    break;
                }
            }
            first = false;
            self.argument(&mut arguments)?;
        }
        Ok(arguments)
    }

    fn argument(&mut self, arguments: &mut Arguments) -> Outcome<()> {
        let Arguments { positional, keywords, list, dict } = arguments;
        if self.skip_operator("*") {
            if list.is_some() || dict.is_some() {
                return Err(self.unexpected("argument"));
            }
            *list = Some(Box::new(self.expression()?));
        } else if self.skip_operator("**") {
            if dict.is_some() {
                return Err(self.unexpected("argument"));
            }
            *dict = Some(Box::new(self.expression()?));
        } else if self.is_keyword() {
            let name = self.name()?;
            self.at += 1;
            keywords.push((name, self.expression()?));
        } else if keywords.is_empty() && list.is_none() && dict.is_none() {
            positional.push(self.expression()?);
        } else {
            return Err(self.unexpected("keyword argument"));
        }
        Ok(())
    }

    fn is_keyword(&self) -> bool {
        let next = self.tokens.get(self.at + 1);
        self.name_at(self.at).is_some() && matches!(next, Some((Token::Operator("="), _)))
    }

    /// `a | b | c`; `inline`: the first has no `|` before it
    pub(super) fn filter_chain(
        &mut self,
        value: Option<Expr>,
        mut inline: bool,
    ) -> Outcome<Option<Expr>> {
        let mut value = value;
        while inline || self.skip_operator("|") {
            inline = false;
            let name = self.dotted_name()?;
            let arguments =
                if self.is_operator("(") { self.arguments()? } else { Arguments::default() };
            value = Some(Expr::new(Node::Filter(value.map(Box::new), name, arguments))?);
        }
        Ok(value)
    }

    fn dotted_name(&mut self) -> Outcome<Name> {
        let mut name = self.name()?.to_string();
        while self.skip_operator(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name.into())
    }

    fn test(&mut self, value: Expr) -> Outcome<Expr> {
        let negated = self.skip_name("not");
        let name = self.dotted_name()?;
        let arguments = if self.is_operator("(") {
            self.arguments()?
        } else if self.begins_argument() {
            let argument = self.nested(|parser| {
                let value = parser.primary()?;
                parser.postfix(value)
            })?;
            Arguments { positional: vec![argument], ..Arguments::default() }
        } else {
            Arguments::default()
        };
        let test = Expr::new(Node::Test(Box::new(value), name, arguments))?;
        if negated { Expr::new(Node::Not(Box::new(test))) } else { Ok(test) }
    }

    /// Whether an argument without parentheses follows, as in `x is divisibleby 3`.
    fn begins_argument(&self) -> bool {
        match self.peek() {
            Some(Token::Name(name)) => !matches!(&name[..], "else" | "or" | "and" | "is"),
            Some(Token::Str(_) | Token::Int(_) | Token::Float(_)) => true,
            _other => self.is_operator("[") || self.is_operator("{"),
        }
    }
}

fn named(name: &str) -> Node {
    match name {
        "true" | "True" => Node::Bool(true),
        "false" | "False" => Node::Bool(false),
        "none" | "None" => Node::None,
        _other => Node::Name(name.into()),
    }
}

fn as_target(value: Expr, fields: bool) -> Outcome<Target> {
    match value.node {
        Node::Name(name) => Ok(Target::Name(name)),
        Node::Attribute(namespace, field) if fields => match namespace.node {
            Node::Name(namespace) => Ok(Target::Field(namespace, field)),
            _other => fail!("only names and fields of namespaces can be set"),
        },
        Node::Tuple(items) => {
            let targets = items.into_iter().map(|item| as_target(item, fields));
            Ok(Target::Tuple(targets.collect::<Outcome<_>>()?))
        }
        _other => fail!("only names and fields of namespaces can be set"),
    }
}
