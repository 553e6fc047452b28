//! Layers that the user leaves in float, by name or by operator.

use super::layers::Layer;
use glob::Pattern;
use std::collections::BTreeSet;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Error, Result};

/// Why they stay in float.
pub const REASON: &str = "float32, as asked for";
/// So many names are offered instead of one that is not there.
const OFFERED: usize = 3;

/// Names of the layers that patterns mean: an operator such as `Conv`, or a name in which `*` and `?` stand for anything.
///
/// # Errors
/// [`Error::Usage`] for a pattern that means no layer, and when no layer is left.
pub fn named(g: &Graph, layers: &[Layer], patterns: &[String]) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for text in patterns {
        let pattern = Pattern::new(text).map_err(|e| Error::Usage {
            what: format!("--keep-float {text}: {e}"),
            hint: "write [[] for a bracket that is part of a name".into(),
        })?;
        let means = |l: &&Layer| g.nodes[l.node].op_type() == text || pattern.matches(&l.name);
        let meant: Vec<&Layer> = layers.iter().filter(means).collect();
        if meant.is_empty() {
            let what = format!("--keep-float {text}: no layer is called so");
            return Err(Error::Usage { what, hint: near(g, layers, text) });
        }
        names.extend(meant.into_iter().map(|l| l.name.clone()));
    }
    if !names.is_empty() && layers.iter().all(|l| names.contains(&l.name)) {
        return Err(Error::Usage {
            what: "--keep-float leaves no layer to quantize".into(),
            hint: "--precision fp32 or fp16 keeps them all".into(),
        });
    }
    Ok(names)
}

/// What may have been meant.
fn near(g: &Graph, layers: &[Layer], text: &str) -> String {
    let operators: BTreeSet<&str> = layers.iter().map(|l| g.nodes[l.node].op_type()).collect();
    let like = |name: &str| strsim::normalized_levenshtein(name, text.trim_matches('*'));
    let mut names: Vec<&str> = layers.iter().map(|l| l.name.as_str()).collect();
    names.sort_by(|a, b| like(b).total_cmp(&like(a)).then(a.cmp(b)));
    names.truncate(OFFERED);
    let operators = operators.into_iter().collect::<Vec<_>>().join(", ");
    format!("the nearest are {}; or an operator: {operators}; `vedge convert --json` lists all", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::layers;
    use super::super::tests::{empty, noise};
    use super::*;
    use vedge_runtime::onnx::{DType, NodeProto, attr, f32_tensor, value_info};

    /// A convolution and two linear layers.
    fn hybrid() -> Graph {
        let mut g = empty(17);
        g.inputs.push(value_info("x", DType::Float, &[1, 4, 8, 8]));
        g.initializers.insert("c".into(), f32_tensor("c", &[4, 4, 1, 1], &noise(1, 16)));
        g.initializers.insert("w".into(), f32_tensor("w", &[8, 8], &noise(2, 64)));
        g.value_info.insert("h".into(), value_info("h", DType::Float, &[1, 4, 8, 8]));
        g.value_info.insert("i".into(), value_info("i", DType::Float, &[1, 4, 8, 8]));
        g.outputs.push(value_info("y", DType::Float, &[1, 4, 8, 8]));
        let mut add = |op, i: [&str; 2], o: &str, name: &str, how| {
            let mut n = NodeProto::of(op, &i, &[o], how);
            n.name = Some(name.into());
            g.nodes.push(n);
        };
        add("Conv", ["x", "c"], "h", "/stem/conv", vec![attr::ints("kernel_shape", &[1, 1])]);
        add("MatMul", ["h", "w"], "i", "/blocks.0/fc1", vec![]);
        add("MatMul", ["i", "w"], "y", "/blocks.0/fc2", vec![]);
        g
    }

    fn of(patterns: &[&str]) -> Result<Vec<String>> {
        let g = hybrid();
        let patterns: Vec<String> = patterns.iter().map(|p| p.to_string()).collect();
        Ok(named(&g, &layers::find(&g).0, &patterns)?.into_iter().collect())
    }

    #[test]
    fn layers_are_named_by_operator_and_by_pattern() {
        assert_eq!(of(&["Conv"]).unwrap(), ["/stem/conv"]);
        assert_eq!(of(&["*fc2", "Conv"]).unwrap(), ["/blocks.0/fc2", "/stem/conv"]);
        assert_eq!(of(&["/stem/*", "Conv"]).unwrap(), ["/stem/conv"]);
        assert!(of(&[]).unwrap().is_empty());
    }

    #[test]
    fn what_means_nothing_is_an_error_that_names_the_nearest() {
        let Error::Usage { what, hint } = of(&["/blocks.0/fc3"]).unwrap_err() else { panic!() };
        assert!(what.contains("--keep-float /blocks.0/fc3"), "{what}");
        assert!(hint.contains("/blocks.0/fc1, /blocks.0/fc2") && hint.contains("Conv, MatMul"), "{hint}");
        assert!(of(&["Conv", "MatMul"]).unwrap_err().to_string().contains("no layer to quantize"));
        assert!(of(&["[a"]).is_err());
    }
}
