//! What a search may change, and a point of that space.

use crate::convert::Precision;
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
    /// Element types: INT8, or what is slower and nearer to the whole model.
    pub precision: Precision,
}

impl Plan {
    /// Its key in tables, which is good as a part of a file's name: the same for the same plan.
    pub fn key(&self) -> String {
        let mut parts = vec![self.precision.name().to_string()];
        parts.extend(self.size.map(|(h, w)| format!("{h}x{w}")));
        parts.extend((self.merge > 0).then(|| format!("merge{}", self.merge)));
        parts.extend((self.neurons > 0).then(|| format!("mlp{}", self.neurons)));
        parts.extend((self.heads > 0).then(|| format!("heads{}", self.heads)));
        parts.join("-")
    }

    /// In words.
    pub fn describe(&self) -> String {
        let mut parts = vec![self.precision.name().to_uppercase()];
        parts.extend(self.size.map(|(h, w)| if h == w { format!("{h} px") } else { format!("{h}x{w} px") }));
        parts.extend((self.merge > 0).then(|| format!("{} tokens merged a block", self.merge)));
        parts.extend((self.neurons > 0).then(|| format!("{} % of the neurons out", self.neurons)));
        parts.extend((self.heads > 0).then(|| format!("{} % of the heads out", self.heads)));
        if *self == Plan::default() { "plain INT8".into() } else { parts.join(", ") }
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
            Plan { precision: self.precision, ..none.clone() },
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
    /// Element types besides INT8.
    pub precisions: Vec<Precision>,
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
        all.extend(self.precisions.iter().map(|p| Plan { precision: *p, ..none.clone() }));
        all
    }

    /// All plans, plain INT8 first.
    pub fn all(&self) -> Vec<Plan> {
        fn with<T: Copy>(none: T, values: &[T]) -> impl Iterator<Item = T> + '_ {
            std::iter::once(none).chain(values.iter().copied())
        }
        let sizes: Vec<_> = self.sizes.iter().copied().map(Some).collect();
        let mut all = vec![];
        for precision in with(Precision::Int8, &self.precisions) {
            for size in with(None, &sizes) {
                for merge in with(0, &self.merges) {
                    for neurons in with(0, &self.neurons) {
                        all.extend(with(0, &self.heads).map(|heads| Plan { size, merge, neurons, heads, precision }));
                    }
                }
            }
        }
        all
    }

    /// Without the plans of one change whose keys `keep` refuses, which it returns.
    pub fn keep(&mut self, keep: impl Fn(&Plan) -> bool) -> Vec<Plan> {
        let none = Plan::default();
        let gone: Vec<Plan> = self.single().into_iter().filter(|p| !keep(p)).collect();
        let stays = |p: Plan| !gone.contains(&p);
        self.sizes.retain(|s| stays(Plan { size: Some(*s), ..none.clone() }));
        self.merges.retain(|m| stays(Plan { merge: *m, ..none.clone() }));
        self.neurons.retain(|n| stays(Plan { neurons: *n, ..none.clone() }));
        self.heads.retain(|h| stays(Plan { heads: *h, ..none.clone() }));
        self.precisions.retain(|p| stays(Plan { precision: *p, ..none.clone() }));
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_made_of_their_parts() {
        let sizes = vec![(196, 196), (168, 168)];
        let space =
            Space { sizes, merges: vec![8], neurons: vec![20], precisions: vec![Precision::Fp16], heads: vec![] };
        assert_eq!((space.single().len(), space.all().len()), (5, 3 * 2 * 2 * 2));
        let plan = Plan { size: Some((168, 168)), merge: 8, ..Plan::default() };
        assert_eq!(plan.parts().len(), 2);
        assert!(Plan::default().parts().is_empty());
        assert_eq!(plan.describe(), "INT8, 168 px, 8 tokens merged a block");
        let keys: std::collections::BTreeSet<String> = space.all().iter().map(Plan::key).collect();
        assert_eq!(keys.len(), space.all().len());
        // In the order in which they are tried, plain INT8 first.
        assert_eq!(space.all()[0], Plan::default());
        assert_eq!(plan.key(), "int8-168x168-merge8");
        let mut less = space.clone();
        let gone = less.keep(|p| p.size != Some((168, 168)) && p.precision != Precision::Fp16);
        assert_eq!((gone.len(), less.all().len()), (2, 2 * 2 * 2));
    }
}
