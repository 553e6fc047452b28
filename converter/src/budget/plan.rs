//! What a search may change, and a point of that space.

use crate::merge::Schedule;
use serde::{Deserialize, Serialize};

/// How a model is shrunk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Height and width in pixels; `None` keeps the model's.
    pub size: Option<(usize, usize)>,
    /// Tokens merged in each block.
    pub merge: usize,
    /// Percent of the MLPs' work that leaves.
    pub neurons: u32,
    /// Percent of the heads' work that leaves.
    pub heads: u32,
}

impl Plan {
    /// Its key in tables: the same for the same plan.
    pub fn key(&self) -> String {
        let size = self.size.map_or("own size".into(), |(h, w)| format!("{h}x{w}"));
        format!("int8, {size}, merge {}, neurons -{} %, heads -{} %", self.merge, self.neurons, self.heads)
    }

    /// In words.
    pub fn describe(&self) -> String {
        let mut parts = vec![];
        parts.extend(self.size.map(|(h, w)| if h == w { format!("{h} px") } else { format!("{h}x{w} px") }));
        parts.extend((self.merge > 0).then(|| format!("{} tokens merged a block", self.merge)));
        parts.extend((self.neurons > 0).then(|| format!("{} % of the neurons out", self.neurons)));
        parts.extend((self.heads > 0).then(|| format!("{} % of the heads out", self.heads)));
        if parts.is_empty() { "plain INT8".into() } else { format!("INT8, {}", parts.join(", ")) }
    }

    /// The schedule of its merging.
    pub fn schedule(&self) -> Option<Schedule> {
        (self.merge > 0).then_some(Schedule::Every(self.merge))
    }

    /// The plans that change one thing only, of those that make up this one.
    pub fn parts(&self) -> Vec<Plan> {
        let none = Plan::default();
        let each = [
            Plan { size: self.size, ..none.clone() },
            Plan { merge: self.merge, ..none.clone() },
            Plan { neurons: self.neurons, ..none.clone() },
            Plan { heads: self.heads, ..none.clone() },
        ];
        each.into_iter().filter(|p| *p != none).collect()
    }
}

/// The values that are tried, besides leaving a thing as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Space {
    /// Heights and widths.
    pub sizes: Vec<(usize, usize)>,
    /// Tokens merged in each block.
    pub merges: Vec<usize>,
    /// Percent of the MLPs' work.
    pub neurons: Vec<u32>,
    /// Percent of the heads' work.
    pub heads: Vec<u32>,
}

impl Space {
    /// Plans that change one thing.
    pub fn single(&self) -> Vec<Plan> {
        let none = Plan::default();
        let mut all: Vec<Plan> = vec![];
        all.extend(self.sizes.iter().map(|s| Plan { size: Some(*s), ..none.clone() }));
        all.extend(self.merges.iter().map(|m| Plan { merge: *m, ..none.clone() }));
        all.extend(self.neurons.iter().map(|n| Plan { neurons: *n, ..none.clone() }));
        all.extend(self.heads.iter().map(|h| Plan { heads: *h, ..none.clone() }));
        all
    }

    /// All plans, plain INT8 first.
    pub fn all(&self) -> Vec<Plan> {
        let with_none = |v: &[u32]| std::iter::once(0).chain(v.iter().copied()).collect::<Vec<_>>();
        let mut all = vec![];
        for size in std::iter::once(None).chain(self.sizes.iter().copied().map(Some)) {
            for merge in std::iter::once(0).chain(self.merges.iter().copied()) {
                for neurons in with_none(&self.neurons) {
                    for heads in with_none(&self.heads) {
                        all.push(Plan { size, merge, neurons, heads });
                    }
                }
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_made_of_their_parts() {
        let space = Space { sizes: vec![(196, 196), (168, 168)], merges: vec![8], neurons: vec![20], heads: vec![] };
        assert_eq!((space.single().len(), space.all().len()), (4, 3 * 2 * 2));
        let plan = Plan { size: Some((168, 168)), merge: 8, neurons: 0, heads: 0 };
        assert_eq!(plan.parts().len(), 2);
        assert!(Plan::default().parts().is_empty());
        assert_eq!(plan.describe(), "INT8, 168 px, 8 tokens merged a block");
        let keys: std::collections::BTreeSet<String> = space.all().iter().map(Plan::key).collect();
        assert_eq!(keys.len(), space.all().len());
        // In the order in which they are tried, plain INT8 first.
        assert_eq!(space.all()[0], Plan::default());
    }
}
