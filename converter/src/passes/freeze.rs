//! Batch 1 and a fixed resolution.

use super::{Context, Pass, PassReport, report};
use crate::shapes;
use vedge_runtime::onnx::{DType, Graph, value_info};
use vedge_runtime::{Error, Result};

pub struct Freeze;

impl Pass for Freeze {
    fn name(&self) -> &'static str {
        "freeze"
    }

    fn run(&self, graph: &mut Graph, cx: &Context) -> Result<PassReport> {
        graph.value_info.clear();
        let input = picture_input(graph)?;
        let name = graph.inputs[input].name().to_string();
        let (_, dims) = declared(graph, input)?;
        let rank = dims.len();
        let (height, width) = cx.options.size.or(dims[rank - 2].zip(dims[rank - 1])).ok_or_else(|| Error::Usage {
            what: format!("input `{name}` has no fixed height and width"),
            hint: "give the resolution: --size N, or --size HEIGHTxWIDTH".into(),
        })?;
        let mut shape: Vec<usize> = dims.iter().map(|d| d.unwrap_or(1)).collect();
        shape[0] = 1;
        shape[rank - 2..].copy_from_slice(&[height, width]);
        let dtype = graph.inputs[input].dtype().unwrap_or(DType::Float);
        graph.inputs[input] = value_info(&name, dtype, &shape);
        shapes::infer(graph)?;
        Ok(report(self.name(), 1, format!("input `{name}` fixed to {shape:?}")))
    }
}

/// Index of the one input that is a picture (or a clip): rank 4 or 5.
fn picture_input(graph: &Graph) -> Result<usize> {
    if graph.inputs.len() == 1 {
        return Ok(0);
    }
    let names: Vec<&str> = graph.inputs.iter().map(|i| i.name()).collect();
    Err(Error::Unsupported {
        what: format!("the model has {} inputs ({}), vedge feeds one picture", names.len(), names.join(", ")),
        hint: "export the vision part alone".into(),
    })
}

fn declared(graph: &Graph, input: usize) -> Result<(usize, Vec<Option<usize>>)> {
    let info = &graph.inputs[input];
    let dims = info.dims().unwrap_or_default();
    if !(4..=5).contains(&dims.len()) {
        return Err(Error::Unsupported {
            what: format!(
                "input `{}` has rank {}, a picture has 4: batch, channels, height, width",
                info.name(),
                dims.len()
            ),
            hint: "vedge converts models that take pictures".into(),
        });
    }
    Ok((input, dims))
}
