//! Names and their values, block in block.

use super::ast::Name;
use super::fault::Outcome;
use super::limits::Limits;
use super::value::Value;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

/// About how many bytes a name takes.
const NAME: usize = 64;

#[derive(Default)]
pub struct Scope {
    names: RefCell<HashMap<Name, Value>>,
    outer: Option<Rc<Scope>>,
    /// Whether it lives as long as the rendering.
    kept: Cell<bool>,
}

impl Scope {
    pub fn inside(outer: &Rc<Self>) -> Rc<Self> {
        Rc::new(Self { outer: Some(outer.clone()), ..Self::default() })
    }

    pub fn set(&self, limits: &Limits, name: &Name, value: Value) -> Outcome<()> {
        if self.kept.get() {
            limits.bytes(NAME)?;
        }
        self.names.borrow_mut().insert(name.clone(), value);
        Ok(())
    }

    pub fn get(&self, limits: &Limits, name: &str) -> Outcome<Option<Value>> {
        let mut scope = self;
        loop {
            limits.steps(1)?;
            if let Some(value) = scope.names.borrow().get(name) {
                return Ok(Some(value.clone()));
            }
            match &scope.outer {
                Some(outer) => scope = outer,
                None => return Ok(None),
            }
        }
    }

    /// Counts what is not freed before the end: this scope, and those around it.
    pub fn keep(&self, limits: &Limits) -> Outcome<()> {
        let mut scope = Some(self);
        while let Some(inner) = scope.filter(|scope| !scope.kept.replace(true)) {
            limits.bytes(NAME * (4 + inner.names.borrow().len()))?;
            scope = inner.outer.as_deref();
        }
        Ok(())
    }

    /// A macro holds the scope that holds it: without this, neither would ever be freed.
    pub fn clear(&self) -> Vec<Value> {
        self.names.borrow_mut().drain().map(|(_, value)| value).collect()
    }
}
