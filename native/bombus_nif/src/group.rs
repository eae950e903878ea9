//! Requests that share limits, and are counted: those of one serving.

use crate::model::LimitOptions;
use bombus::engine::Group;
use rustler::{Resource, ResourceArc};
use std::sync::Arc;

pub struct GroupHandle {
    pub group: Arc<Group>,
    members: Arc<()>,
}

#[rustler::resource_impl]
impl Resource for GroupHandle {}

impl GroupHandle {
    /// Counts as a request of the group as long as it lives.
    pub fn member(&self) -> Arc<()> {
        self.members.clone()
    }
}

#[rustler::nif]
fn new_group(limits: LimitOptions) -> ResourceArc<GroupHandle> {
    let group = Arc::new(Group::new(limits.of_group()));
    ResourceArc::new(GroupHandle { group, members: Arc::default() })
}

/// The group takes no more requests.
#[rustler::nif]
fn close_group(handle: ResourceArc<GroupHandle>) -> rustler::Atom {
    handle.group.close();
    rustler::types::atom::ok()
}

/// How many requests of the group have not ended.
#[rustler::nif]
fn group_size(handle: ResourceArc<GroupHandle>) -> usize {
    Arc::strong_count(&handle.members) - 1
}
