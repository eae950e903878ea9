//! Renders a template, statement by statement.

mod calls;
mod expressions;

use super::ast::{Body, Expr, For, Kind, Macro, Name, Node, Statement, Target};
use super::fault::{Outcome, fail};
use super::functions;
use super::limits::Limits;
use super::printing;
use super::scope::Scope;
use super::value::{Closure, Loop, Namespace, Value};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

pub struct Renderer {
    pub limits: Limits,
    text: String,
    /// Values that can hold themselves, and are emptied at the end.
    namespaces: Vec<Rc<Namespace>>,
    scopes: Vec<Rc<Scope>>,
    loops: Vec<Rc<Loop>>,
}

/// What comes behind a statement.
#[derive(Clone, Copy, PartialEq)]
enum Next {
    Statement,
    Break,
    Continue,
}

/// Renders a template with these names.
pub fn render(body: &Body, limits: Limits, names: Vec<(Name, Value)>) -> Outcome<String> {
    let scope = Rc::new(Scope::default());
    for name in functions::NAMES {
        scope.set(&limits, &name.into(), Value::Function(name))?;
    }
    for (name, value) in names {
        scope.set(&limits, &name, value)?;
    }
    let mut renderer =
        Renderer { limits, text: String::new(), namespaces: vec![], scopes: vec![], loops: vec![] };
    let rendered = renderer.body(body, &Scope::inside(&scope));
    let text = std::mem::take(&mut renderer.text);
    rendered.map(|_next| text)
}

/// A macro holds the names around it, which hold the macro; a namespace may hold itself. All of
/// them are emptied before any of them is dropped, so that no drop goes deep.
impl Drop for Renderer {
    fn drop(&mut self) {
        let mut values: Vec<Value> = vec![];
        self.scopes.iter().for_each(|scope| values.extend(scope.clear()));
        for namespace in &self.namespaces {
            values.extend(namespace.fields.borrow_mut().drain(..).map(|(_, value)| value));
        }
        self.loops.iter().for_each(|each| values.extend(each.last.borrow_mut().take()));
    }
}

impl Renderer {
    pub fn keep_namespace(&mut self, namespace: &Rc<Namespace>) {
        self.namespaces.push(namespace.clone());
    }

    fn keep_scope(&mut self, scope: &Rc<Scope>) -> Outcome<()> {
        scope.keep(&self.limits)?;
        self.scopes.push(scope.clone());
        Ok(())
    }

    fn body(&mut self, body: &Body, scope: &Rc<Scope>) -> Outcome<Next> {
        for statement in body {
            let next = self.statement(statement, scope).map_err(|it| it.at(statement.line))?;
            if next != Next::Statement {
                return Ok(next);
            }
        }
        Ok(Next::Statement)
    }

    fn write(&mut self, text: &str) -> Outcome<()> {
        self.limits.bytes(text.len())?;
        self.text.push_str(text);
        Ok(())
    }

    fn print(&mut self, value: &Value) -> Outcome<()> {
        match value {
            Value::Text(text) => self.write(text),
            other => {
                let text = printing::str(&self.limits, other)?;
                self.text.push_str(&text);
                Ok(())
            }
        }
    }

    /// The text of a body, which is not written.
    fn captured(&mut self, body: &Body, scope: &Rc<Scope>) -> Outcome<Value> {
        let outer = std::mem::take(&mut self.text);
        let rendered = self.body(body, &Scope::inside(scope));
        let text = std::mem::replace(&mut self.text, outer);
        self.limits.bytes(text.len())?;
        rendered.map(|_next| Value::Text(text.into()))
    }

    fn statement(&mut self, statement: &Statement, scope: &Rc<Scope>) -> Outcome<Next> {
        self.limits.steps(1)?;
        match &statement.kind {
            Kind::Text(text) => self.write(text)?,
            Kind::Print(value) => {
                let value = self.value(value, scope)?;
                self.print(&value)?;
            }
            Kind::For(each) => {
                let items = self.value(&each.items, scope)?;
                self.for_loop(each, items, scope, 0)?;
            }
            Kind::If { branches, otherwise } => return self.condition(branches, otherwise, scope),
            Kind::Set(target, value) => {
                let value = self.value(value, scope)?;
                self.assign(target, value, scope)?;
            }
            Kind::Capture { target, filter, body } => {
                let mut value = self.captured(body, scope)?;
                if let Some(filter) = filter {
                    value = self.filtered(filter, Some(value), scope)?;
                }
                self.assign(target, value, scope)?;
            }
            Kind::With(values, body) => {
                let inner = Scope::inside(scope);
                for (target, value) in values {
                    let value = self.value(value, scope)?;
                    self.assign(target, value, &inner)?;
                }
                return self.nested(body, &inner);
            }
            Kind::Macro(definition) => {
                let closure = self.closure(definition, scope)?;
                scope.set(&self.limits, &definition.name, closure)?;
            }
            Kind::Call { call, caller } => self.call_block(call, caller, scope)?,
            Kind::Filter(filter, body) => {
                let value = self.captured(body, scope)?;
                let value = self.filtered(filter, Some(value), scope)?;
                self.print(&value)?;
            }
            Kind::Scope(body) => return self.nested(body, &Scope::inside(scope)),
            Kind::Break => return Ok(Next::Break),
            Kind::Continue => return Ok(Next::Continue),
            Kind::Other(name) => {
                fail!("`{name}` needs another template, and a chat template has none beside it")
            }
        }
        Ok(Next::Statement)
    }

    fn nested(&mut self, body: &Body, scope: &Rc<Scope>) -> Outcome<Next> {
        self.deeper(|renderer| renderer.body(body, scope))
    }

    /// Counts a level of nesting while it works.
    fn deeper<T>(&mut self, work: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        self.limits.descend()?;
        let result = work(self);
        self.limits.ascend();
        result
    }

    fn condition(
        &mut self,
        branches: &[(Expr, Body)],
        otherwise: &Body,
        scope: &Rc<Scope>,
    ) -> Outcome<Next> {
        for (test, body) in branches {
            if self.value(test, scope)?.is_true() {
                return self.nested(body, scope);
            }
        }
        self.nested(otherwise, scope)
    }

    fn for_loop(
        &mut self,
        each: &Arc<For>,
        items: Value,
        scope: &Rc<Scope>,
        level: usize,
    ) -> Outcome<()> {
        let mut items = items.items(&self.limits)?;
        if let Some(condition) = &each.condition {
            let mut selected = vec![];
            for item in &items.items {
                let inner = Scope::inside(scope);
                self.assign(&each.target, item.clone(), &inner)?;
                if self.value(condition, &inner)?.is_true() {
                    selected.push(item.clone());
                }
            }
            items = super::value::List::new(&self.limits, selected)?;
        }
        if items.items.is_empty() {
            return self.nested(&each.otherwise, &Scope::inside(scope)).map(drop);
        }
        let again = if each.recursive {
            self.keep_scope(scope)?;
            Some((each.clone(), scope.clone()))
        } else {
            None
        };
        let state = Loop { items, index: Cell::new(0), level, again, last: RefCell::default() };
        self.deeper(|renderer| renderer.iterate(each, &Rc::new(state), scope))
    }

    fn iterate(&mut self, each: &Arc<For>, state: &Rc<Loop>, scope: &Rc<Scope>) -> Outcome<()> {
        let name = Name::from("loop");
        for (index, item) in state.items.items.iter().enumerate() {
            self.limits.steps(1)?;
            state.index.set(index);
            let inner = Scope::inside(scope);
            inner.set(&self.limits, &name, Value::Loop(state.clone()))?;
            self.assign(&each.target, item.clone(), &inner)?;
            if self.body(&each.body, &inner)? == Next::Break {
                break;
            }
        }
        Ok(())
    }

    fn assign(&mut self, target: &Target, value: Value, scope: &Rc<Scope>) -> Outcome<()> {
        match target {
            Target::Name(name) => scope.set(&self.limits, name, value)?,
            Target::Field(name, field) => {
                let Some(Value::Namespace(namespace)) = scope.get(&self.limits, name)? else {
                    fail!("cannot set `{name}.{field}`: `{name}` is no namespace");
                };
                functions::check_field(field)?;
                self.limits.bytes(64)?;
                namespace.fields.borrow_mut().insert(field.clone(), value);
            }
            Target::Tuple(targets) => {
                let items = value.items(&self.limits)?;
                if items.items.len() != targets.len() {
                    fail!("expected {} values to unpack, got {}", targets.len(), items.items.len());
                }
                for (target, item) in targets.iter().zip(&items.items) {
                    self.assign(target, item.clone(), scope)?;
                }
            }
        }
        Ok(())
    }

    fn closure(&mut self, definition: &Arc<Macro>, scope: &Rc<Scope>) -> Outcome<Value> {
        self.limits.bytes(128)?;
        self.keep_scope(scope)?;
        let closure = Closure { definition: definition.clone(), scope: scope.clone() };
        Ok(Value::Macro(Rc::new(closure)))
    }

    fn call_block(&mut self, call: &Expr, caller: &Arc<Macro>, scope: &Rc<Scope>) -> Outcome<()> {
        let Node::Call(function, arguments) = &call.node else { fail!("expected a call") };
        let function = self.value(function, scope)?;
        let mut given = self.arguments(arguments, scope)?;
        given.keywords.push(("caller".into(), self.closure(caller, scope)?));
        let value = self.call(&function, given)?;
        self.print(&value)
    }
}
