//! The graph zoo: models of the field's architectures whose weights are regenerated (`tests/zoo/FORMAT.md`).

use anyhow::{Context, Result, ensure};
use ndarray::ArrayD;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use vedge_runtime::onnx::proto::GraphProto;
use vedge_runtime::onnx::{Graph, TensorProto};

/// Where the zoo is.
pub fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("zoo")
}

/// Names of the zoo's graphs (`<name>.<exporter>`), sorted.
///
/// # Errors
/// The folder cannot be read.
pub fn names() -> Result<Vec<String>> {
    let mut names = vec![];
    for entry in std::fs::read_dir(dir())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".onnx").map(str::to_string));
    }
    names.sort();
    Ok(names)
}

/// What a model answers.
#[derive(Deserialize)]
pub struct Expected {
    /// The input to give.
    pub input: ExpectedInput,
    /// What comes out, in order.
    pub outputs: Vec<ExpectedOutput>,
}

/// The shape of the input; its values are `generate(7, 0.0, 1.0)`.
#[derive(Deserialize)]
pub struct ExpectedInput {
    /// Fixed shape.
    pub shape: Vec<usize>,
}

/// One output of ONNX Runtime.
#[derive(Deserialize)]
pub struct ExpectedOutput {
    /// Name in the graph.
    pub name: String,
    /// Fixed shape.
    pub shape: Vec<usize>,
    /// The first values, row-major.
    pub first: Vec<f64>,
    /// Sum of all values.
    pub sum: f64,
    /// Largest absolute value.
    pub absmax: f64,
    /// Standard deviation of the values.
    pub std: f64,
}

#[derive(Deserialize)]
struct Recipe {
    tensors: Vec<Stripped>,
}

#[derive(Deserialize)]
struct Stripped {
    name: String,
    shape: Vec<usize>,
    mean: f64,
    std: f64,
    seed: u64,
}

/// `count` values of the zoo's generator: uniform around `mean` with standard deviation `std`.
pub fn generate(seed: u64, mean: f64, std: f64, count: usize) -> Vec<f32> {
    let value = |i: usize| {
        let mut x = seed.wrapping_add(i as u64).wrapping_add(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^= x >> 31;
        let u = (x >> 40) as f64 / 16_777_216.0;
        (mean + (std * 1.732_050_807_568_877_2) * (2.0 * u - 1.0)) as f32
    };
    (0..count).map(value).collect()
}

/// The input that the expected outputs belong to.
pub fn input(shape: &[usize]) -> ArrayD<f32> {
    let count = shape.iter().product();
    ArrayD::from_shape_vec(shape, generate(7, 0.0, 1.0, count)).expect("as many values as the shape has")
}

/// What the model must answer.
///
/// # Errors
/// The file is missing or damaged.
pub fn expected(name: &str) -> Result<Expected> {
    let path = dir().join(format!("{name}.expect.json"));
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_str(&text)?)
}

/// A model of the zoo with its weights. `name` may lead into a folder (`speed/deit_tiny_patch16_224`).
///
/// # Errors
/// The files are missing, or the recipe does not fit the graph.
pub fn load(name: &str) -> Result<Graph> {
    let mut graph = Graph::read(&dir().join(format!("{name}.onnx")))?;
    let path = dir().join(format!("{name}.recipe.json"));
    let recipe: Recipe = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    for s in &recipe.tensors {
        let slot = match graph.initializers.get_mut(&s.name) {
            Some(t) => Some(t),
            None => {
                let inner = graph.nodes.iter_mut().flat_map(|n| &mut n.attribute);
                inner.flat_map(|a| a.g.iter_mut().chain(&mut a.graphs)).find_map(|g| nested(g, &s.name))
            }
        };
        let t = slot.with_context(|| format!("{name}: the recipe names `{}`, which is not in the graph", s.name))?;
        let shape: Vec<usize> = t.dims.iter().map(|&d| d as usize).collect();
        ensure!(shape == s.shape, "{name}: `{}` has shape {shape:?}, the recipe {:?}", s.name, s.shape);
        let values = generate(s.seed, s.mean, s.std, shape.iter().product());
        t.raw_data = Some(values.iter().flat_map(|v| v.to_le_bytes()).collect());
    }
    Ok(graph)
}

/// A tensor of a subgraph: an initializer, or the value of a Constant node.
fn nested<'a>(graph: &'a mut GraphProto, name: &str) -> Option<&'a mut TensorProto> {
    if let Some(i) = graph.initializer.iter().position(|t| t.name() == name) {
        return graph.initializer.get_mut(i);
    }
    graph.node.iter_mut().find_map(|n| {
        if n.op_type() == "Constant" && n.output.first().is_some_and(|o| o == name) {
            return n.attribute.iter_mut().find(|a| a.name() == "value").and_then(|a| a.t.as_mut());
        }
        n.attribute.iter_mut().flat_map(|a| a.g.iter_mut().chain(&mut a.graphs)).find_map(|g| nested(g, name))
    })
}
