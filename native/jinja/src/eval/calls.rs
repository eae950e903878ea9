//! Calls: of functions, methods, macros and loops.

use super::super::ast::{Macro, Name};
use super::super::fault::{Outcome, fail};
use super::super::given::Given;
use super::super::scope::Scope;
use super::super::value::{Closure, Loop, Value};
use super::super::{compare, functions, methods};
use super::Renderer;
use std::rc::Rc;

impl Renderer {
    pub(super) fn call(&mut self, function: &Value, given: Given) -> Outcome<Value> {
        match function {
            Value::Function(name) => functions::call(self, name, given),
            Value::Method(method) => match &method.value {
                Value::Loop(each) if &*method.name == "changed" => self.changed(each, given),
                _other => methods::call(&self.limits, method, given),
            },
            Value::Macro(closure) => {
                let closure = closure.clone();
                self.deeper(|renderer| renderer.call_macro(&closure, given))
            }
            Value::Loop(each) => self.recurse(each, given),
            Value::Joiner(joiner) => {
                given.none()?;
                let first = !joiner.used.replace(true);
                Ok(Value::Text(if first { "".into() } else { joiner.separator.clone().into() }))
            }
            Value::Undefined(message) => fail!("{message}"),
            other => fail!("'{}' object is not callable", other.type_name()),
        }
    }

    /// `loop(items)`: the loop again, inside itself.
    fn recurse(&mut self, each: &Rc<Loop>, given: Given) -> Outcome<Value> {
        let Some((definition, scope)) = &each.again else {
            fail!("only a loop marked as recursive can call itself");
        };
        let items = given.one()?;
        let outer = std::mem::take(&mut self.text);
        let rendered =
            self.deeper(|renderer| renderer.for_loop(definition, items, scope, each.level + 1));
        let text = std::mem::replace(&mut self.text, outer);
        self.limits.bytes(text.len())?;
        rendered.map(|()| Value::Text(text.into()))
    }

    fn changed(&mut self, each: &Rc<Loop>, given: Given) -> Outcome<Value> {
        let asked = Value::tuple(&self.limits, given.positional)?;
        let last = each.last.borrow().clone();
        let same = match &last {
            Some(last) => compare::equal(&self.limits, last, &asked)?,
            None => false,
        };
        if !same {
            self.loops.push(each.clone());
            *each.last.borrow_mut() = Some(asked);
        }
        Ok(Value::Bool(!same))
    }

    fn call_macro(&mut self, closure: &Closure, mut given: Given) -> Outcome<Value> {
        let definition = &*closure.definition;
        let scope = Scope::inside(&closure.scope);
        let count = definition.parameters.len();
        let rest = given.positional.split_off(given.positional.len().min(count));
        // Each parameter may look at each keyword.
        self.limits.steps((count + 1).saturating_mul(given.keywords.len() + 1))?;
        let mut keyword = |name: &str| {
            let at = given.keywords.iter().position(|(known, _)| &**known == name)?;
            Some(given.keywords.remove(at).1)
        };
        let mut positional = given.positional.into_iter();
        let without_default = count - definition.defaults.len().min(count);
        for (index, name) in definition.parameters.iter().enumerate() {
            let value = match positional.next().or_else(|| keyword(name)) {
                Some(value) => value,
                None => match index.checked_sub(without_default) {
                    Some(default) => self.value(&definition.defaults[default], &scope)?,
                    None => Value::Undefined(format!("parameter '{name}' was not provided").into()),
                },
            };
            scope.set(&self.limits, name, value)?;
        }
        if definition.caller {
            let caller = keyword("caller").unwrap_or_else(|| Value::undefined("No caller defined"));
            scope.set(&self.limits, &"caller".into(), caller)?;
        }
        let keywords = std::mem::take(&mut given.keywords);
        self.extra_arguments(definition, rest, keywords, &scope)?;
        self.captured(&definition.body, &scope)
    }

    /// Arguments beyond the parameters: `varargs` and `kwargs`, where the macro names them.
    fn extra_arguments(
        &mut self,
        definition: &Macro,
        rest: Vec<Value>,
        keywords: Vec<(Name, Value)>,
        scope: &Rc<Scope>,
    ) -> Outcome<()> {
        let name = &definition.name;
        if let (false, Some((keyword, _))) = (definition.kwargs, keywords.first()) {
            fail!("macro '{name}' takes no keyword argument '{keyword}'");
        }
        if !definition.varargs && !rest.is_empty() {
            let most = definition.parameters.len();
            fail!("macro '{name}' takes not more than {most} argument(s)");
        }
        if definition.kwargs {
            let pairs = keywords.into_iter().map(|(name, value)| (Value::Text(name.into()), value));
            let kwargs = Value::dict(&self.limits, pairs.collect())?;
            scope.set(&self.limits, &"kwargs".into(), kwargs)?;
        }
        if definition.varargs {
            let varargs = Value::tuple(&self.limits, rest)?;
            scope.set(&self.limits, &"varargs".into(), varargs)?;
        }
        Ok(())
    }
}
