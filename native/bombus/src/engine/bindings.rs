//! The adapters bound to a model. One that is not yet is bound layer by layer between the steps of
//! others, since a large one takes seconds.

use super::active::{InUse, adapter_key};
use crate::backend::Backend;
use crate::backend::{BoundAdapter, Loras};
use crate::error::{Result, catch_in};
use crate::model::adapter::Adapter;
use crate::model::decoder::Decoder;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

pub struct Bindings<B: Backend> {
    /// by their adapters' keys
    bound: HashMap<usize, Rc<BoundAdapter<B>>>,
    under_way: VecDeque<Binding<B>>,
}

struct Binding<B: Backend> {
    adapter: Arc<Adapter>,
    /// as far as they are bound
    layers: Vec<Loras<B>>,
    /// The requests that wait for it.
    waiting: Vec<u64>,
}

/// An adapter that is bound now, or cannot be, and the requests that waited for it.
pub struct Bound {
    pub waiting: Vec<u64>,
    pub result: Result<()>,
}

impl<B: Backend> Bindings<B> {
    pub fn new() -> Self {
        Self { bound: HashMap::new(), under_way: VecDeque::new() }
    }

    pub fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }

    pub fn get(&self, adapter: &Arc<Adapter>) -> Option<InUse<B>> {
        let bound = self.bound.get(&adapter_key(Some(adapter)))?;
        Some((adapter.clone(), bound.clone()))
    }

    /// Binds it by and by; `id` waits for it.
    pub fn add(&mut self, adapter: &Arc<Adapter>, id: u64) {
        let same = |binding: &&mut Binding<B>| Arc::ptr_eq(&binding.adapter, adapter);
        match self.under_way.iter_mut().find(same) {
            Some(binding) => binding.waiting.push(id),
            None => self.under_way.push_back(Binding {
                adapter: adapter.clone(),
                layers: vec![],
                waiting: vec![id],
            }),
        }
    }

    pub fn forget(&mut self, adapter: usize) {
        self.bound.remove(&adapter);
    }

    /// Nobody waits for it any more.
    pub fn leave(&mut self, id: u64) {
        for binding in &mut self.under_way {
            binding.waiting.retain(|waiting| *waiting != id);
        }
        self.under_way.retain(|binding| !binding.waiting.is_empty());
    }

    /// One layer of the first that is under way; -> what is bound with it.
    pub fn advance(&mut self, decoder: &Decoder<B>) -> Option<Bound> {
        let binding = self.under_way.front_mut()?;
        let what = format!("binding `{}`", binding.adapter.path().display());
        let result = match catch_in(&what, || binding.advance(decoder)) {
            Ok(None) => return None,
            Ok(Some(bound)) => {
                self.bound.insert(adapter_key(Some(&binding.adapter)), Rc::new(bound));
                Ok(())
            }
            Err(error) => Err(error),
        };
        let Binding { waiting, .. } = self.under_way.pop_front()?;
        Some(Bound { waiting, result })
    }
}

impl<B: Backend> Binding<B> {
    fn advance(&mut self, decoder: &Decoder<B>) -> Result<Option<BoundAdapter<B>>> {
        if self.layers.is_empty() {
            self.adapter.check(&decoder.spec)?;
        }
        if self.layers.len() < decoder.layers.len() {
            self.layers.push(self.adapter.bind_layer(self.layers.len(), decoder)?);
            return Ok(None);
        }
        let layers = std::mem::take(&mut self.layers);
        Ok(Some(self.adapter.bind_vocabulary(decoder, layers)?))
    }
}
