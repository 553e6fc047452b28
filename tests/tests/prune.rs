//! Heads and neurons leave graphs of every exporter: what is left computes what the whole graph would with their part of
//! the next layer's weights set to zero.

use anyhow::{Context, Result};
use ndarray::ArrayD;
use vedge_converter::passes::{Prepare, prepare};
use vedge_converter::prune::{Kind, unit};
use vedge_converter::{check, shapes};
use vedge_runtime::onnx::{Graph, Uses, f32_tensor, shape_of};
use vedge_runtime::{Options, Session};
use vedge_tests::zoo;

fn run(graph: &Graph) -> Result<ArrayD<f32>> {
    let shape = graph.inputs[0].fixed().context("fixed")?.1;
    let mut session = Session::from_graph(graph.clone(), &Options::default())?;
    Ok(session.run(&[zoo::input(&shape)])?.swap_remove(0))
}

/// Blocks with heads and with neurons that can leave.
const GRAPHS: [(&str, usize, usize); 10] = [
    ("deit_tiny_distilled.ts", 6, 6),
    ("vit_tiny_unfused_d4.dynamo", 4, 4),
    ("hf_vit_tiny.ts", 4, 4),
    ("hf_vit_tiny.dynamo", 4, 4),
    ("swin_tiny_d2222.ts", 8, 8),
    ("hf_swin_small.dynamo", 6, 6),
    ("mobilevit_xxs.ts", 9, 9),
    ("hf_mobilevit_xxs.dynamo", 9, 9),
    ("dinov2_small_d4.ts", 4, 4),
    ("vit_tiny_gap.dynamo", 4, 4),
];

#[test]
fn what_is_left_equals_the_masked_graph() -> Result<()> {
    let mut wrong = vec![];
    for (name, heads, neurons) in GRAPHS {
        let mut graph = zoo::load(name)?;
        prepare(&mut graph, &Prepare::default())?;
        let whole = run(&graph)?;
        let (mut masked, mut pruned) = (graph.clone(), graph.clone());
        for (kind, expected) in [(Kind::Heads, heads), (Kind::Neurons, neurons)] {
            let (units, not) = unit::find(&graph, kind);
            if units.len() != expected {
                wrong.push(format!(
                    "{name}: {} blocks with {}, expected {expected}; not: {not:?}",
                    units.len(),
                    kind.name()
                ));
            }
            for (i, u) in units.iter().enumerate() {
                // Heads of every block, other ones each time; of the neurons a run and some single ones.
                let dropped: Vec<usize> = match kind {
                    Kind::Heads => vec![i % u.groups],
                    Kind::Neurons => (0..u.groups).filter(|j| j % 7 == i % 7 || *j < 16).collect(),
                };
                let uses = Uses::of(&masked);
                let rows: Vec<usize> = dropped.iter().flat_map(|&g| u.rows(g)).collect();
                let end = *uses.consumers(&u.input).last().context("the layer")?;
                let weight = masked.nodes[end].input[1].clone();
                let shape = shape_of(&masked.initializers[&weight]);
                let mut values = masked.const_f32(&weight).context("floats")?;
                rows.iter().for_each(|r| values[r * shape[1]..(r + 1) * shape[1]].fill(0.0));
                let new = masked.fresh("masked");
                masked.initializers.insert(new.clone(), f32_tensor(&new, &shape, &values));
                masked.nodes[end].input[1] = new;
                u.remove(&mut pruned, &dropped, None).map_err(|e| anyhow::anyhow!("{name} {}: {e}", u.name))?;
            }
        }
        shapes::annotate(&mut pruned).with_context(|| name.to_string())?;
        pruned.prune_unused();
        check::check(&pruned)?;
        let (a, b) = (run(&masked)?, run(&pruned)?);
        let largest = a.iter().fold(0f32, |m, v| m.max(v.abs()));
        let difference = (&a - &b).iter().fold(0f32, |m, v| m.max(v.abs()));
        if difference > 1e-4 * largest {
            wrong.push(format!("{name}: {difference} of {largest}"));
        }
        assert!((&a - &whole).iter().any(|d| d.abs() > 1e-3 * largest), "{name}: nothing was left out");
        assert!(pruned.encode().len() < graph.encode().len(), "{name}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}
