//! Until when requests may take.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

#[derive(Default)]
pub struct Deadlines {
    by_time: BTreeSet<(Instant, u64)>,
    by_id: HashMap<u64, Instant>,
}

impl Deadlines {
    pub fn add(&mut self, id: u64, at: Instant) {
        self.remove(id);
        self.by_time.insert((at, id));
        self.by_id.insert(id, at);
    }

    pub fn remove(&mut self, id: u64) {
        if let Some(at) = self.by_id.remove(&id) {
            self.by_time.remove(&(at, id));
        }
    }

    pub fn next(&self) -> Option<Instant> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes one whose time has come.
    pub fn take_due(&mut self, now: Instant) -> Option<u64> {
        let (_, id) = *self.by_time.first().filter(|(at, _)| *at <= now)?;
        self.remove(id);
        Some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    proptest! {
        #[test]
        fn they_come_due_in_their_order_and_once(
            steps in prop::collection::vec((0u64..9, 0u64..50, any::<bool>()), 1..60),
            now in 0u64..60,
        ) {
            let begin = Instant::now();
            let at = |seconds| begin + Duration::from_secs(seconds);
            let mut deadlines = Deadlines::default();
            let mut expected: HashMap<u64, u64> = HashMap::new();
            for (id, seconds, adds) in steps {
                match adds {
                    true => deadlines.add(id, at(seconds)),
                    false => deadlines.remove(id),
                }
                expected.remove(&id);
                expected.extend(adds.then_some((id, seconds)));
            }
            prop_assert_eq!(deadlines.next(), expected.values().min().map(|first| at(*first)));
            let due: Vec<u64> = std::iter::from_fn(|| deadlines.take_due(at(now))).collect();
            prop_assert!(due.is_sorted_by_key(|id| (expected[id], *id)));
            let mut right: Vec<u64> =
                expected.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
            right.sort_by_key(|id| (expected[id], *id));
            prop_assert_eq!(due, right);
            prop_assert!(deadlines.next().is_none_or(|next| next > at(now)));
            prop_assert_eq!(deadlines.by_id.len(), deadlines.by_time.len());
        }
    }
}
