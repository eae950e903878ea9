//! A template as a tree.

use super::fault::{Outcome, fail};
use std::sync::Arc;

pub type Name = Arc<str>;
pub type Body = Vec<Statement>;

/// How tall an expression may be: `a + b + c` has the height 3. Jinja2 itself ends in Python's
/// recursion limit at about this.
const HEIGHT: u32 = 250;

#[derive(Debug)]
pub struct Statement {
    pub line: u32,
    pub kind: Kind,
}

#[derive(Debug)]
pub enum Kind {
    Text(Name),
    Print(Expr),
    For(Arc<For>),
    If {
        branches: Vec<(Expr, Body)>,
        otherwise: Body,
    },
    Set(Target, Expr),
    /// `{% set x | filter %}...{% endset %}`
    Capture {
        target: Target,
        filter: Option<Expr>,
        body: Body,
    },
    With(Vec<(Target, Expr)>, Body),
    Macro(Arc<Macro>),
    /// `{% call(x) f() %}...{% endcall %}`
    Call {
        call: Expr,
        caller: Arc<Macro>,
    },
    Filter(Expr, Body),
    /// Names set inside are not seen outside: `block`, `generation`.
    Scope(Body),
    Break,
    Continue,
    /// What needs other templates, of which there are none.
    Other(&'static str),
}

#[derive(Debug)]
pub struct For {
    pub target: Target,
    pub items: Expr,
    pub condition: Option<Expr>,
    pub recursive: bool,
    pub body: Body,
    pub otherwise: Body,
}

#[derive(Debug)]
pub struct Macro {
    pub name: Name,
    pub parameters: Vec<Name>,
    /// Those of the last parameters.
    pub defaults: Vec<Expr>,
    pub body: Body,
    /// Which of `caller`, `varargs` and `kwargs` the body names.
    pub caller: bool,
    pub varargs: bool,
    pub kwargs: bool,
}

#[derive(Debug)]
pub enum Target {
    Name(Name),
    /// `{% set namespace.field = ... %}`
    Field(Name, Name),
    Tuple(Vec<Target>),
}

#[derive(Debug)]
pub struct Expr {
    pub node: Node,
    height: u32,
}

#[derive(Debug)]
pub enum Node {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Name),
    Name(Name),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attribute(Box<Expr>, Name),
    Item(Box<Expr>, Box<Expr>),
    /// start, stop, step
    Slice(Box<Expr>, Box<[Option<Expr>; 3]>),
    Call(Box<Expr>, Arguments),
    /// Without a value in a filter block, which fills it in.
    Filter(Option<Box<Expr>>, Name, Arguments),
    Test(Box<Expr>, Name, Arguments),
    Not(Box<Expr>),
    Minus(Box<Expr>),
    Plus(Box<Expr>),
    Binary(Binary, Box<(Expr, Expr)>),
    Concat(Vec<Expr>),
    Compare(Box<Expr>, Vec<(Compare, Expr)>),
    And(Box<(Expr, Expr)>),
    Or(Box<(Expr, Expr)>),
    /// `then if test else otherwise`
    If {
        test: Box<Expr>,
        then: Box<Expr>,
        otherwise: Option<Box<Expr>>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Binary {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Remainder,
    Power,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Compare {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    In,
    NotIn,
}

#[derive(Debug, Default)]
pub struct Arguments {
    pub positional: Vec<Expr>,
    pub keywords: Vec<(Name, Expr)>,
    /// `*list` and `**dict`
    pub list: Option<Box<Expr>>,
    pub dict: Option<Box<Expr>>,
}

impl Expr {
    /// A tree that is too tall would overflow the stack of who walks or drops it.
    pub fn new(node: Node) -> Outcome<Self> {
        let mut height = 0;
        children(&node, &mut |child| height = height.max(child.height));
        if height >= HEIGHT {
            fail!("an expression nests more than {HEIGHT} deep");
        }
        Ok(Self { node, height: height + 1 })
    }
}

/// Calls `each` with the expressions right below a node.
pub fn children<'a>(node: &'a Node, each: &mut dyn FnMut(&'a Expr)) {
    match node {
        Node::List(items) | Node::Tuple(items) | Node::Concat(items) => {
            items.iter().for_each(each);
        }
        Node::Dict(pairs) => pairs.iter().for_each(|(key, value)| {
            each(key);
            each(value);
        }),
        Node::Attribute(value, _) | Node::Not(value) | Node::Minus(value) | Node::Plus(value) => {
            each(value);
        }
        Node::Item(value, key) => {
            each(value);
            each(key);
        }
        Node::Slice(value, bounds) => {
            each(value);
            bounds.iter().flatten().for_each(each);
        }
        Node::Call(value, arguments) | Node::Test(value, _, arguments) => {
            each(value);
            arguments.each(each);
        }
        Node::Filter(value, _, arguments) => {
            value.iter().for_each(|value| each(value));
            arguments.each(each);
        }
        Node::Binary(_, pair) | Node::And(pair) | Node::Or(pair) => {
            each(&pair.0);
            each(&pair.1);
        }
        Node::Compare(first, rest) => {
            each(first);
            rest.iter().for_each(|(_, value)| each(value));
        }
        Node::If { test, then, otherwise } => {
            each(test);
            each(then);
            otherwise.iter().for_each(|value| each(value));
        }
        Node::None
        | Node::Bool(_)
        | Node::Int(_)
        | Node::Float(_)
        | Node::Text(_)
        | Node::Name(_) => {}
    }
}

impl Arguments {
    fn each<'a>(&'a self, each: &mut dyn FnMut(&'a Expr)) {
        self.positional.iter().for_each(&mut *each);
        self.keywords.iter().for_each(|(_, value)| each(value));
        self.list.iter().chain(&self.dict).for_each(|value| each(value));
    }
}
