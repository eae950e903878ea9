//! The plan of a step: what the fused kernel reads of it.

use super::layout::{GOES_ON, HEADER};

/// Encodes plans: where a step goes on as the last one did, one word says so. A whole plan lies in
/// memory of the processor's, which a card takes some 90 us to fetch; 8 bytes do not.
#[derive(Default)]
pub struct PlanEncoder {
    plan: Vec<u64>,
    /// How many steps ago.
    steps: u64,
    /// Which plan that was.
    number: u64,
}

impl PlanEncoder {
    const MOST_STEPS: u64 = 1 << 15;

    /// The words to send: see the head of `layout.cuh`.
    pub fn encode(&mut self, mut plan: Vec<u64>, sampled: bool) -> Vec<u64> {
        if sampled && self.goes_on(&plan) {
            self.steps += 1;
            return vec![plan[0] | GOES_ON as u64 | self.steps << 32 | self.number << 48];
        }
        self.number = (self.number + 1) % (1 << 16);
        self.steps = 0;
        self.plan = plan.clone();
        plan[0] |= self.number << 48;
        plan
    }

    /// The same rows one position further on, each with the token that was sampled for it.
    fn goes_on(&self, plan: &[u64]) -> bool {
        let same = self.plan.len() == plan.len() && self.plan[..HEADER] == plan[..HEADER];
        if !same || self.steps + 1 == Self::MOST_STEPS {
            return false;
        }
        let words = plan[1] as usize;
        let rows = self.plan[HEADER..].chunks_exact(words).zip(plan[HEADER..].chunks_exact(words));
        rows.enumerate().all(|(row, (before, now))| {
            let position = (before[0] >> 32) + self.steps + 1;
            now[0] == (u64::from(u32::MAX) - row as u64) | position << 32 && before[1..] == now[1..]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_goes_on_is_one_word() {
        let plan = |rows: &[(u32, u64)], page: u64| {
            let mut plan = vec![rows.len() as u64, 3, 0, 4096];
            let row = |(id, position): &(u32, u64)| [u64::from(*id) | position << 32, 7, page];
            plan.extend(rows.iter().flat_map(row));
            plan
        };
        let sampled = |row: u32| u32::MAX - row;
        let mut encoder = PlanEncoder::default();
        let first = plan(&[(5, 9), (6, 70)], 1);
        let numbered = |mut plan: Vec<u64>, number: u64| {
            plan[0] |= number << 48;
            plan
        };
        assert_eq!(encoder.encode(first.clone(), false), numbered(first, 1));
        for steps in 1..4 {
            let next = plan(&[(sampled(0), 9 + steps), (sampled(1), 70 + steps)], 1);
            assert_eq!(
                encoder.encode(next, true),
                [2 | 1 << 31 | steps << 32 | 1 << 48],
                "{steps}"
            );
        }
        // Another token, place, order, page, number of rows, and a step again.
        let others = [
            plan(&[(8, 13), (sampled(1), 74)], 1),
            plan(&[(sampled(0), 15), (sampled(1), 75)], 1),
            plan(&[(sampled(1), 16), (sampled(0), 76)], 1),
            plan(&[(sampled(0), 17), (sampled(1), 77)], 2),
            plan(&[(sampled(0), 18)], 2),
            plan(&[(sampled(0), 18)], 2),
        ];
        for (other, number) in others.into_iter().zip(2..) {
            assert_eq!(encoder.encode(other.clone(), true), numbered(other, number), "{number}");
        }
        let last = plan(&[(sampled(0), 19)], 2);
        assert_eq!(encoder.encode(last.clone(), true), [1 | 1 << 31 | 1 << 32 | 7 << 48]);
        assert_eq!(encoder.encode(last.clone(), true), numbered(last, 8));
    }
}
