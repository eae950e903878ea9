//! What finished sequences leave behind: keys and values that others with the same beginning use.
//!
//! Plain bookkeeping. What is kept belongs to the token ids at its positions, and to the adapter
//! that it was computed with. When the budget is used up, what was used longest ago goes first.

use crate::backend::Page;
use std::collections::HashMap;

pub struct Prefixes<T> {
    /// bytes
    budget: usize,
    entries: Vec<Entry<T>>,
    /// Entries may share pages: how many have each, and its bytes.
    pages: HashMap<usize, (usize, usize)>,
    bytes: usize,
    clock: u64,
}

struct Entry<T> {
    adapter: usize,
    ids: Vec<u32>,
    value: T,
    pages: Vec<Page>,
    used: u64,
}

impl<T> Prefixes<T> {
    pub fn new(budget: usize) -> Self {
        Self { budget, entries: vec![], pages: HashMap::new(), bytes: 0, clock: 0 }
    }

    /// All entries together, each page once.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn holds(&self, page: &Page) -> bool {
        self.pages.contains_key(&page.id)
    }

    /// What has the most of the prompt's beginning, and how many tokens that are. `usable`: with how
    /// many of so many tokens of a value a text can go on
    pub fn find(
        &mut self,
        adapter: usize,
        prompt: &[u32],
        usable: impl Fn(&T, usize) -> usize,
    ) -> Option<(&T, usize)> {
        let same = self.entries.iter_mut().filter(|entry| entry.adapter == adapter);
        let shared = same.map(|entry| (usable(&entry.value, common(&entry.ids, prompt)), entry));
        let (common, entry) = shared.max_by_key(|(common, _)| *common)?;
        self.clock += 1;
        entry.used = self.clock;
        (common > 0).then_some((&entry.value, common))
    }

    /// Keeps `value`, whose memory is `pages`; what it makes superfluous goes.
    pub fn insert(&mut self, adapter: usize, ids: Vec<u32>, value: T, pages: Vec<Page>) {
        self.clock += 1;
        let clock = self.clock;
        let mut same = self.entries.iter_mut().filter(|entry| entry.adapter == adapter);
        if let Some(longer) = same.find(|entry| entry.ids.starts_with(&ids)) {
            longer.used = clock;
            return;
        }
        self.remove_all(|entry| entry.adapter == adapter && ids.starts_with(&entry.ids));
        for page in &pages {
            let (count, _) = self.pages.entry(page.id).or_insert((0, page.bytes));
            *count += 1;
            self.bytes += if *count == 1 { page.bytes } else { 0 };
        }
        self.entries.push(Entry { adapter, ids, value, pages, used: clock });
        while self.bytes > self.budget {
            let oldest = (0..self.entries.len()).min_by_key(|place| self.entries[*place].used);
            let Some(oldest) = oldest else { return };
            self.remove(oldest);
        }
    }

    pub fn forget(&mut self, adapter: usize) {
        self.remove_all(|entry| entry.adapter == adapter);
    }

    pub fn clear(&mut self) {
        self.remove_all(|_| true);
    }

    fn remove_all(&mut self, goes: impl Fn(&Entry<T>) -> bool) {
        for place in (0..self.entries.len()).rev() {
            if goes(&self.entries[place]) {
                self.remove(place);
            }
        }
    }

    fn remove(&mut self, place: usize) {
        for page in self.entries.swap_remove(place).pages {
            let Some((count, bytes)) = self.pages.get_mut(&page.id) else { continue };
            *count -= 1;
            if *count == 0 {
                self.bytes -= *bytes;
                self.pages.remove(&page.id);
            }
        }
    }
}

fn common(one: &[u32], other: &[u32]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn page(id: usize) -> Page {
        Page { id, bytes: 10 }
    }

    fn all<T>(_: &T, common: usize) -> usize {
        common
    }

    #[test]
    fn a_beginning_that_cannot_be_used_gives_way_to_a_shorter_one() {
        let mut prefixes = Prefixes::new(1000);
        prefixes.insert(0, vec![1, 2, 3, 4, 9], "cut", vec![page(1)]);
        prefixes.insert(0, vec![1, 2, 8], "whole", vec![page(2)]);
        let usable = |value: &&str, common| if *value == "cut" { 0 } else { common };
        assert_eq!(prefixes.find(0, &[1, 2, 3, 4, 5], usable), Some((&"whole", 2)));
        prefixes.forget(0);
        prefixes.insert(0, vec![1, 2], "cut", vec![page(1)]);
        assert_eq!(prefixes.find(0, &[1, 2], usable), None);
    }

    #[test]
    fn the_longest_beginning_is_found_of_the_same_adapter() {
        let mut prefixes = Prefixes::new(1000);
        prefixes.insert(0, vec![1, 2, 3], "short", vec![page(1)]);
        prefixes.insert(0, vec![1, 2, 9, 9], "other", vec![page(2)]);
        prefixes.insert(7, vec![1, 2, 3, 4, 5], "adapted", vec![page(3)]);
        assert_eq!(prefixes.find(0, &[1, 2, 3, 4, 5], all), Some((&"short", 3)));
        assert_eq!(prefixes.find(0, &[1, 2, 9], all), Some((&"other", 3)));
        assert_eq!(prefixes.find(7, &[1, 2, 3, 4], all), Some((&"adapted", 4)));
        assert_eq!(prefixes.find(0, &[5], all), None);
        assert_eq!(prefixes.find(8, &[1, 2], all), None);
        prefixes.forget(7);
        assert_eq!(prefixes.find(7, &[1, 2, 3, 4], all), None);
        assert_eq!(prefixes.bytes(), 20);
    }

    #[test]
    fn what_is_longer_takes_the_place_of_its_beginning() {
        let mut prefixes = Prefixes::new(1000);
        prefixes.insert(0, vec![1, 2], "first turn", vec![page(1)]);
        prefixes.insert(0, vec![1, 2, 3, 4], "second turn", vec![page(1), page(2)]);
        prefixes.insert(0, vec![1, 2, 3], "stopped early", vec![page(3)]);
        assert_eq!(prefixes.find(0, &[1, 2, 3], all), Some((&"second turn", 3)));
        assert_eq!(prefixes.bytes(), 20);
    }

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let mut prefixes = Prefixes::new(20);
        prefixes.insert(0, vec![1], 1, vec![page(1)]);
        prefixes.insert(0, vec![2], 2, vec![page(2)]);
        assert!(prefixes.find(0, &[1], all).is_some());
        prefixes.insert(0, vec![3], 3, vec![page(3)]);
        assert_eq!(prefixes.find(0, &[2], all), None);
        assert!(prefixes.find(0, &[1], all).is_some() && prefixes.find(0, &[3], all).is_some());
        // More than fits alone is not kept, and takes all others along.
        prefixes.insert(0, vec![4], 4, vec![page(4), page(5), page(6)]);
        assert_eq!((prefixes.bytes(), prefixes.find(0, &[1], all)), (0, None));
    }

    proptest! {
        #[test]
        fn bytes_are_those_of_the_pages_held(
            steps in prop::collection::vec(
                (0usize..3, prop::collection::vec(0u32..3, 1..5), prop::collection::vec(0usize..9, 0..4), any::<u8>()),
                1..40,
            ),
        ) {
            let mut prefixes = Prefixes::new(60);
            for (adapter, ids, pages, action) in steps {
                match action {
                    0..8 => prefixes.forget(adapter),
                    8..80 => _ = prefixes.find(adapter, &ids, all),
                    _ => {
                        let pages: HashSet<usize> = pages.into_iter().collect();
                        prefixes.insert(adapter, ids, (), pages.into_iter().map(page).collect());
                    }
                }
                let held: HashSet<usize> =
                    prefixes.entries.iter().flat_map(|entry| &entry.pages).map(|page| page.id).collect();
                prop_assert_eq!(prefixes.bytes(), 10 * held.len());
                prop_assert!(prefixes.bytes() <= 60);
                prop_assert!((0..9).all(|id| prefixes.holds(&page(id)) == held.contains(&id)));
            }
            prefixes.clear();
            prop_assert_eq!((prefixes.bytes(), prefixes.pages.len()), (0, 0));
        }
    }
}
