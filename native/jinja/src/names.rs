//! Which names a template takes from outside.

use super::ast::{Body, Expr, For, Kind, Macro, Name, Node, Statement, Target, children};
use std::collections::{BTreeSet, HashMap};

/// Names that are read before the template itself has set them.
pub fn undeclared(body: &Body) -> BTreeSet<Name> {
    let mut names = Names { set: vec![], counts: HashMap::new(), found: BTreeSet::new() };
    names.body(body, &[]);
    names.found
}

struct Names {
    /// What the blocks that are open have set.
    set: Vec<Name>,
    /// How often each of them is among them.
    counts: HashMap<Name, usize>,
    found: BTreeSet<Name>,
}

impl Names {
    /// What a block sets counts inside it alone: a branch may not be taken.
    fn body(&mut self, body: &Body, inner: &[&Name]) {
        let outer = self.set.len();
        inner.iter().for_each(|name| self.push(name));
        body.iter().for_each(|statement| self.statement(statement));
        self.forget(outer);
    }

    fn push(&mut self, name: &Name) {
        self.set.push(name.clone());
        *self.counts.entry(name.clone()).or_default() += 1;
    }

    /// Closes a block: back to the names that were set before it.
    fn forget(&mut self, outer: usize) {
        for name in self.set.drain(outer..) {
            if let Some(count) = self.counts.get_mut(&name) {
                *count -= 1;
            }
        }
    }

    fn statement(&mut self, statement: &Statement) {
        match &statement.kind {
            Kind::Text(_) | Kind::Break | Kind::Continue | Kind::Other(_) => {}
            Kind::Print(value) => self.expression(value),
            Kind::For(each) => self.for_loop(each),
            Kind::If { branches, otherwise } => {
                for (test, body) in branches {
                    self.expression(test);
                    self.body(body, &[]);
                }
                self.body(otherwise, &[]);
            }
            Kind::Set(target, value) => {
                self.expression(value);
                self.store(target);
            }
            Kind::Capture { target, filter, body } => {
                self.body(body, &[]);
                filter.iter().for_each(|filter| self.expression(filter));
                self.store(target);
            }
            Kind::With(values, body) => {
                let mut inner = vec![];
                for (target, value) in values {
                    self.expression(value);
                    targets(target, &mut inner);
                }
                self.body(body, &inner);
            }
            Kind::Macro(definition) => {
                self.push(&definition.name);
                self.definition(definition);
            }
            Kind::Call { call, caller } => {
                self.expression(call);
                self.definition(caller);
            }
            Kind::Filter(filter, body) => {
                self.body(body, &[]);
                self.expression(filter);
            }
            Kind::Scope(body) => self.body(body, &[]),
        }
    }

    fn for_loop(&mut self, each: &For) {
        self.expression(&each.items);
        let (mut inner, own_name) = (vec![], Name::from("loop"));
        targets(&each.target, &mut inner);
        let outer = self.set.len();
        inner.iter().for_each(|name| self.push(name));
        each.condition.iter().for_each(|condition| self.expression(condition));
        self.body(&each.body, &[&own_name]);
        self.forget(outer);
        self.body(&each.otherwise, &[]);
    }

    fn definition(&mut self, definition: &Macro) {
        definition.defaults.iter().for_each(|value| self.expression(value));
        self.body(&definition.body, &definition.parameters.iter().collect::<Vec<_>>());
    }

    fn store(&mut self, target: &Target) {
        match target {
            Target::Name(name) => self.push(name),
            Target::Field(namespace, _) => self.load(namespace),
            Target::Tuple(items) => items.iter().for_each(|item| self.store(item)),
        }
    }

    fn load(&mut self, name: &Name) {
        if self.counts.get(name).is_none_or(|&count| count == 0) {
            self.found.insert(name.clone());
        }
    }

    fn expression(&mut self, value: &Expr) {
        if let Node::Name(name) = &value.node {
            self.load(name);
        }
        children(&value.node, &mut |child| self.expression(child));
    }
}

fn targets<'a>(target: &'a Target, names: &mut Vec<&'a Name>) {
    match target {
        Target::Name(name) => names.push(name),
        Target::Field(..) => {}
        Target::Tuple(items) => items.iter().for_each(|item| targets(item, names)),
    }
}
