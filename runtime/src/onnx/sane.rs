//! Attributes that only a damaged file has: tract counts up to them, or allocates for them without end.

use super::proto::NodeProto;

/// What is wrong with a node's attributes; `None` where nothing is.
pub fn absurd(n: &NodeProto) -> Option<String> {
    for a in &n.attribute {
        let limit = match a.name() {
            "axis" | "axes" | "perm" | "batch_dims" => 64,
            "num_outputs" | "group" | "blocksize" | "kernel_shape" | "pads" | "strides" | "dilations" => 1 << 16,
            _ => continue,
        };
        if let Some(v) = a.i.iter().chain(&a.ints).find(|v| v.unsigned_abs() > limit) {
            return Some(format!("has {} {v}: the file is damaged", a.name()));
        }
    }
    let perm = n.ints("perm").filter(|_| n.op_type() == "Transpose")?;
    let mut sorted = perm.to_vec();
    sorted.sort_unstable();
    let permutes = sorted.iter().enumerate().all(|(i, &p)| p == i as i64);
    (!permutes).then(|| format!("has perm {perm:?}, which is no permutation: the file is damaged"))
}

#[cfg(test)]
mod tests {
    use super::super::attr;
    use super::*;

    #[test]
    fn permutations() {
        let told = |perm: &[i64]| absurd(&NodeProto::of("Transpose", &["x"], &["y"], vec![attr::ints("perm", perm)]));
        assert_eq!(told(&[0, 2, 1]), None);
        for bad in [&[0, 1, 1][..], &[1, 2], &[0, -1], &[0, 2]] {
            assert!(told(bad).unwrap().contains("no permutation"), "{bad:?}");
        }
        assert!(told(&[0, 1 << 40]).unwrap().contains("has perm 1099511627776"));
    }
}
