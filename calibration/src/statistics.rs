//! Runs the float model on pictures and observes inner values.

use crate::input_moments::{InputMoments, View};
use crate::observer::Histogram;
use ndarray::ArrayD;
use std::collections::BTreeMap;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Error, Options, Result, Session};

/// A value to observe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// Its name in the graph.
    pub value: String,
    /// As what moments of it are kept; may be empty.
    pub views: Vec<View>,
}

impl Tap {
    /// Observes the range of a value.
    pub fn range(value: &str) -> Tap {
        Tap { value: value.into(), views: vec![] }
    }
}

/// Everything kept from a calibration run.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// What was seen of each value, by name.
    pub observed: BTreeMap<String, Histogram>,
    /// Moments of each value, for each view asked for.
    pub moments: BTreeMap<(String, View), InputMoments>,
    /// How many pictures were run.
    pub pictures: usize,
}

/// Runs `graph` (float, input shapes fixed) on `inputs` and observes the values named `taps`; `done` hears of each picture's
/// outputs. Memory does not depend on the number of inputs.
///
/// # Errors
/// Those of [`Session`] and of `inputs`; [`Error::Shape`] for a tap that the graph does not have; [`Error::BadModel`] when a value is infinite or NaN (naming the first in graph order).
pub fn collect(
    graph: &Graph,
    taps: &[Tap],
    inputs: impl Iterator<Item = Result<ArrayD<f32>>>,
    options: &Options,
    mut done: impl FnMut(usize, &[ArrayD<f32>]),
) -> Result<Statistics> {
    let mut all = Statistics::default();
    let values: Vec<&str> = taps.iter().map(|t| t.value.as_str()).collect();
    let see = |picture: usize, at: usize, value: &ArrayD<f32>| {
        let tap = &taps[at];
        let histogram = all.observed.entry(tap.value.clone()).or_default();
        match value.as_slice() {
            Some(s) => histogram.add(s.iter().copied()),
            None => histogram.add(value.iter().copied()),
        }
        if histogram.not_finite() > 0 {
            return Err(not_finite(&tap.value, picture));
        }
        for &view in &tap.views {
            let key = (tap.value.clone(), view);
            if !all.moments.contains_key(&key) {
                let new = InputMoments::new(value.shape(), view).ok_or_else(|| {
                    Error::Shape(format!("value `{}` of shape {:?} is no {view:?}", tap.value, value.shape()))
                })?;
                all.moments.insert(key.clone(), new);
            }
            all.moments.get_mut(&key).expect("inserted above").add(value);
        }
        Ok(())
    };
    all.pictures = watch(graph, &values, inputs, options, see, &mut done)?;
    Ok(all)
}

/// Runs `graph` on `inputs` and hands the values named `taps` to `see`: number of the picture, index of the tap, value.
/// `done` hears of each picture's own outputs. Returns how many pictures were run.
///
/// # Errors
/// As [`collect`], and those of `see`.
pub(crate) fn watch(
    graph: &Graph,
    taps: &[&str],
    inputs: impl Iterator<Item = Result<ArrayD<f32>>>,
    options: &Options,
    mut see: impl FnMut(usize, usize, &ArrayD<f32>) -> Result<()>,
    done: &mut dyn FnMut(usize, &[ArrayD<f32>]),
) -> Result<usize> {
    let mut tapped = graph.clone();
    let own = graph.outputs.len();
    let input = graph.inputs.first().map(|i| i.name().to_string()).unwrap_or_default();
    let (on_input, inside): (Vec<usize>, Vec<usize>) = (0..taps.len()).partition(|&i| taps[i] == input);
    for &t in &inside {
        let t = taps[t];
        let (dtype, shape) =
            graph.fact(t).ok_or_else(|| Error::Shape(format!("value `{t}` has no fixed shape in the graph")))?;
        tapped.outputs.push(vedge_runtime::onnx::value_info(t, dtype, &shape));
    }
    let mut session = Session::from_graph(tapped, options)?;
    let mut pictures = 0;
    for x in inputs {
        let x = [x?];
        let outputs = session.run(&x)?;
        let seen = on_input.iter().map(|&t| (t, &x[0])).chain(inside.iter().copied().zip(&outputs[own..]));
        for (tap, value) in seen {
            see(pictures, tap, value)?;
        }
        done(pictures, &outputs[..own]);
        pictures += 1;
    }
    Ok(pictures)
}

/// The error for a value that is infinite or NaN on a picture (counted from 0).
pub(crate) fn not_finite(value: &str, picture: usize) -> Error {
    Error::BadModel(format!(
        "value `{value}` is infinite or NaN on calibration picture {} (counted from 1): the float model overflows there, \
         or the preprocessing does not fit it",
        picture + 1
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use vedge_runtime::onnx::{DType, NodeProto, f32_tensor, value_info};

    /// y = relu(x · w), x: [2, 3].
    fn graph() -> Graph {
        let mut g = Graph::decode(
            vedge_runtime::onnx::ModelProto {
                ir_version: Some(8),
                opset_import: vec![vedge_runtime::onnx::proto::OperatorSetIdProto {
                    version: Some(17),
                    ..Default::default()
                }],
                graph: Some(Default::default()),
                ..Default::default()
            }
            .encode_to_vec()
            .into(),
            None,
        )
        .unwrap();
        g.inputs.push(value_info("x", DType::Float, &[2, 3]));
        g.outputs.push(value_info("y", DType::Float, &[2, 2]));
        g.initializers.insert("w".into(), f32_tensor("w", &[3, 2], &[1., 2., 3., 4., 5., 6.]));
        g.nodes.push(NodeProto::of("MatMul", &["x", "w"], &["h"], vec![]));
        g.nodes.push(NodeProto::of("Relu", &["h"], &["y"], vec![]));
        g.value_info.insert("h".into(), value_info("h", DType::Float, &[2, 2]));
        g
    }
    fn tap(value: &str) -> Tap {
        Tap::range(value)
    }

    fn inputs(rows: &[[f32; 6]]) -> impl Iterator<Item = Result<ArrayD<f32>>> {
        rows.iter().map(|r| Ok(ArrayD::from_shape_vec(vec![2, 3], r.to_vec()).unwrap()))
    }

    #[test]
    fn inputs_and_inner_values_are_observed() {
        let data = [[1., 0., 0., 0., 1., 0.], [0., 0., -1., 0., 0., 2.]];
        let mut outputs = vec![];
        let s = collect(&graph(), &[tap("x"), tap("h")], inputs(&data), &Options::default(), |i, y| {
            outputs.push((i, y[0].iter().copied().collect::<Vec<f32>>()));
        })
        .unwrap();
        assert_eq!(s.pictures, 2);
        assert_eq!(s.observed["x"].extremes(), (-1.0, 2.0));
        assert_eq!(s.observed["h"].extremes(), (-6.0, 12.0));
        assert_eq!(outputs, [(0, vec![1., 2., 3., 4.]), (1, vec![0., 0., 10., 12.])]);
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let e = collect(&graph(), &[tap("h")], inputs(&[[f32::INFINITY; 6]]), &Options::default(), |_, _| {});
        assert!(e.unwrap_err().to_string().contains("`h`"));
    }

    #[test]
    fn a_tap_that_is_not_there_is_an_error() {
        let e = collect(&graph(), &[tap("z")], inputs(&[]), &Options::default(), |_, _| {});
        assert!(e.unwrap_err().to_string().contains("`z`"));
    }
}
