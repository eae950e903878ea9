//! Names and their values, block in block.

use super::ast::Name;
use super::value::Value;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

#[derive(Default)]
pub struct Scope {
    names: RefCell<HashMap<Name, Value>>,
    outer: Option<Rc<Scope>>,
}

impl Scope {
    pub fn inside(outer: &Rc<Self>) -> Rc<Self> {
        Rc::new(Self { names: RefCell::default(), outer: Some(outer.clone()) })
    }

    pub fn set(&self, name: &Name, value: Value) {
        self.names.borrow_mut().insert(name.clone(), value);
    }

    pub fn get(&self, name: &str) -> Option<Value> {
        let mut scope = self;
        loop {
            if let Some(value) = scope.names.borrow().get(name) {
                return Some(value.clone());
            }
            scope = scope.outer.as_deref()?;
        }
    }

    /// A macro holds the scope that holds it: without this, neither would ever be freed.
    pub fn clear(&self) -> Vec<Value> {
        self.names.borrow_mut().drain().map(|(_, value)| value).collect()
    }
}
