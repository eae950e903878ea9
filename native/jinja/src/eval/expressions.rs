//! The values of expressions.

use super::super::ast::{Arguments, Compare, Expr, Node};
use super::super::fault::{Outcome, fail};
use super::super::given::{Given, int};
use super::super::scope::Scope;
use super::super::value::Value;
use super::super::{checks, compare, filters, member, operators, printing};
use super::Renderer;
use std::cmp::Ordering;
use std::rc::Rc;

impl Renderer {
    pub(super) fn value(&mut self, expression: &Expr, scope: &Rc<Scope>) -> Outcome<Value> {
        match &expression.node {
            Node::None => Ok(Value::None),
            Node::Bool(value) => Ok(Value::Bool(*value)),
            Node::Int(value) => Ok(Value::Int(*value)),
            Node::Float(value) => Ok(Value::Float(*value)),
            Node::Text(text) => Ok(Value::Text(text.clone().into())),
            Node::Name(name) => match scope.get(&self.limits, name)? {
                Some(value) => Ok(value),
                None => member::undefined(&self.limits, format!("'{name}' is undefined")),
            },
            _nested => self.deeper(|renderer| renderer.compound(expression, scope)),
        }
    }

    /// An expression made of others.
    fn compound(&mut self, expression: &Expr, scope: &Rc<Scope>) -> Outcome<Value> {
        match &expression.node {
            Node::List(items) => {
                let items = self.values(items, scope)?;
                Value::list(&self.limits, items)
            }
            Node::Tuple(items) => {
                let items = self.values(items, scope)?;
                Value::tuple(&self.limits, items)
            }
            Node::Dict(pairs) => self.dict(pairs, scope),
            Node::Attribute(value, name) => {
                let value = self.value(value, scope)?;
                member::attribute(&self.limits, &value, name)
            }
            Node::Item(value, key) => {
                let value = self.value(value, scope)?;
                let key = self.value(key, scope)?;
                member::item(&self.limits, &value, &key)
            }
            Node::Slice(value, bounds) => self.slice(value, bounds, scope),
            Node::Call(function, arguments) => {
                let function = self.value(function, scope)?;
                let given = self.arguments(arguments, scope)?;
                self.call(&function, given)
            }
            Node::Filter(..) => self.filtered(expression, None, scope),
            Node::Test(value, name, arguments) => {
                let value = self.value(value, scope)?;
                let given = self.arguments(arguments, scope)?;
                checks::check(self, name, &value, given).map(Value::Bool)
            }
            Node::Not(value) => Ok(Value::Bool(!self.value(value, scope)?.is_true())),
            Node::Minus(value) => operators::negated(&self.value(value, scope)?),
            Node::Plus(value) => operators::positive(&self.value(value, scope)?),
            Node::Binary(operator, pair) => {
                let left = self.value(&pair.0, scope)?;
                let right = self.value(&pair.1, scope)?;
                operators::binary(&self.limits, *operator, &left, &right)
            }
            Node::Concat(parts) => self.concat(parts, scope),
            Node::Compare(first, rest) => self.comparison(first, rest, scope),
            Node::And(pair) => {
                let left = self.value(&pair.0, scope)?;
                if left.is_true() { self.value(&pair.1, scope) } else { Ok(left) }
            }
            Node::Or(pair) => {
                let left = self.value(&pair.0, scope)?;
                if left.is_true() { Ok(left) } else { self.value(&pair.1, scope) }
            }
            Node::If { test, then, otherwise } => {
                if self.value(test, scope)?.is_true() {
                    return self.value(then, scope);
                }
                let missing = "the inline if-expression has no else, and is false";
                otherwise.as_ref().map_or_else(
                    || Ok(Value::undefined(missing)),
                    |otherwise| self.value(otherwise, scope),
                )
            }
            _simple => self.value(expression, scope),
        }
    }

    fn values(&mut self, expressions: &[Expr], scope: &Rc<Scope>) -> Outcome<Vec<Value>> {
        expressions.iter().map(|expression| self.value(expression, scope)).collect()
    }

    fn dict(&mut self, pairs: &[(Expr, Expr)], scope: &Rc<Scope>) -> Outcome<Value> {
        let mut values = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            values.push((self.value(key, scope)?, self.value(value, scope)?));
        }
        Value::dict(&self.limits, values)
    }

    fn slice(
        &mut self,
        value: &Expr,
        bounds: &[Option<Expr>; 3],
        scope: &Rc<Scope>,
    ) -> Outcome<Value> {
        let value = self.value(value, scope)?;
        let mut numbers = [None; 3];
        for (number, bound) in numbers.iter_mut().zip(bounds) {
            let Some(bound) = bound else { continue };
            *number = match self.value(bound, scope)? {
                Value::None => None,
                bound => Some(int(Some(&bound), 0)?),
            };
        }
        operators::slice(&self.limits, &value, numbers)
    }

    fn concat(&mut self, parts: &[Expr], scope: &Rc<Scope>) -> Outcome<Value> {
        let mut text = String::new();
        for part in parts {
            match self.value(part, scope)? {
                Value::Text(part) => {
                    self.limits.bytes(part.len())?;
                    text.push_str(&part);
                }
                other => text.push_str(&printing::str(&self.limits, &other)?),
            }
        }
        Ok(Value::Text(text.into()))
    }

    /// `a < b < c`: each operand once, up to the first that does not hold.
    fn comparison(
        &mut self,
        first: &Expr,
        rest: &[(Compare, Expr)],
        scope: &Rc<Scope>,
    ) -> Outcome<Value> {
        let mut left = self.value(first, scope)?;
        for (operator, right) in rest {
            let right = self.value(right, scope)?;
            if !self.holds(*operator, &left, &right)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    fn holds(&self, operator: Compare, left: &Value, right: &Value) -> Outcome<bool> {
        let limits = &self.limits;
        let is =
            |is: fn(Ordering) -> bool| Ok(compare::order(limits, left, right)?.is_some_and(is));
        match operator {
            Compare::Equal => compare::equal(limits, left, right),
            Compare::NotEqual => Ok(!compare::equal(limits, left, right)?),
            Compare::Less => is(Ordering::is_lt),
            Compare::LessEqual => is(Ordering::is_le),
            Compare::Greater => is(Ordering::is_gt),
            Compare::GreaterEqual => is(Ordering::is_ge),
            Compare::In => compare::contains(limits, right, left),
            Compare::NotIn => Ok(!compare::contains(limits, right, left)?),
        }
    }

    /// A chain of filters. `input` is the value of a filter block
    pub(super) fn filtered(
        &mut self,
        expression: &Expr,
        input: Option<Value>,
        scope: &Rc<Scope>,
    ) -> Outcome<Value> {
        let Node::Filter(value, name, arguments) = &expression.node else {
            return self.value(expression, scope);
        };
        let value = match (value, input) {
            (Some(value), None) => self.value(value, scope)?,
            (Some(value), input) => {
                self.deeper(|renderer| renderer.filtered(value, input, scope))?
            }
            (None, input) => input.unwrap_or(Value::None),
        };
        let given = self.arguments(arguments, scope)?;
        self.filter(name, &value, given)
    }

    pub fn filter(&mut self, name: &str, value: &Value, given: Given) -> Outcome<Value> {
        filters::apply(self, name, value, given)
    }

    pub(super) fn arguments(&mut self, arguments: &Arguments, scope: &Rc<Scope>) -> Outcome<Given> {
        let mut positional = self.values(&arguments.positional, scope)?;
        let mut keywords = Vec::with_capacity(arguments.keywords.len());
        for (name, value) in &arguments.keywords {
            keywords.push((name.clone(), self.value(value, scope)?));
        }
        if let Some(list) = &arguments.list {
            let list = self.value(list, scope)?.items(&self.limits)?;
            self.limits.bytes(list.items.len() * size_of::<Value>())?;
            positional.extend(list.items.iter().cloned());
        }
        if let Some(dict) = &arguments.dict {
            let Value::Dict(dict) = self.value(dict, scope)? else {
                fail!("`**` takes a dict");
            };
            self.limits.bytes(dict.entries.len() * 2 * size_of::<Value>())?;
            for (name, value) in dict.entries.values() {
                let Value::Text(name) = name else { fail!("keywords are strings") };
                keywords.push((name.text.clone(), value.clone()));
            }
        }
        Ok(Given { positional, keywords })
    }
}
