//! Runs the float model on pictures and observes inner values.

use crate::input_moments::{InputMoments, View};
use crate::observer::Histogram;
use ndarray::ArrayD;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
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

/// Runs `graph` (float, input shapes fixed) on `inputs` and observes the values named `taps`, continuing `from` what the
/// pictures before told; `done` hears what is known after each picture, and of its outputs. Memory does not depend on the number of inputs.
///
/// # Errors
/// Those of [`Session`] and of `inputs`; [`Error::Shape`] for a tap that the graph does not have; [`Error::BadModel`] when a value is infinite or NaN (naming the first in graph order).
pub fn collect(
    graph: &Graph,
    taps: &[Tap],
    from: Partial,
    inputs: impl Iterator<Item = Result<ArrayD<f32>>>,
    options: &Options,
    mut done: impl FnMut(&Partial, &[ArrayD<f32>]),
) -> Result<Statistics> {
    let mut partial = if from.pictures == 0 { Partial::new(taps.len()) } else { from };
    if partial.seen.len() != taps.len() {
        let (have, want) = (partial.seen.len(), taps.len());
        return Err(Error::Shape(format!("statistics of {have} values to be continued with {want}")));
    }
    let values: Vec<&str> = taps.iter().map(|t| t.value.as_str()).collect();
    // Each value of a picture for itself, on all threads; the pictures one after the other, so that sums have one order.
    let workers = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build();
    let workers = workers.map_err(|e| Error::Engine(format!("no worker threads: {e}")))?;
    let see = |values: &[(usize, &ArrayD<f32>)], outputs: &[ArrayD<f32>]| {
        let picture = partial.pictures;
        let mut of: Vec<Option<&ArrayD<f32>>> = vec![None; taps.len()];
        values.iter().for_each(|(at, value)| of[*at] = Some(value));
        let each = partial.seen.par_iter_mut().zip(taps).zip(of);
        let results: Vec<Result<()>> = workers
            .install(|| each.map(|((seen, tap), value)| value.map_or(Ok(()), |v| seen.add(tap, v, picture))).collect());
        results.into_iter().collect::<Result<()>>()?;
        partial.pictures += 1;
        done(&partial, outputs);
        Ok(())
    };
    watch(graph, &values, inputs, options, see)?;
    let mut all = Statistics { pictures: partial.pictures, ..Statistics::default() };
    for (tap, seen) in taps.iter().zip(partial.seen) {
        all.observed.insert(tap.value.clone(), seen.range);
        all.moments.extend(seen.moments.into_iter().map(|(view, m)| ((tap.value.clone(), view), m)));
    }
    Ok(all)
}

/// What is known after some of the pictures.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Partial {
    /// How many pictures those were.
    pub pictures: usize,
    /// Of each tap.
    seen: Vec<Seen>,
}

impl Partial {
    fn new(taps: usize) -> Partial {
        Partial { pictures: 0, seen: (0..taps).map(|_| Seen::default()).collect() }
    }
}

/// What is kept of one value.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
struct Seen {
    range: Histogram,
    moments: BTreeMap<View, InputMoments>,
}

impl Seen {
    fn add(&mut self, tap: &Tap, value: &ArrayD<f32>, picture: usize) -> Result<()> {
        match value.as_slice() {
            Some(s) => self.range.add(s.iter().copied()),
            None => self.range.add(value.iter().copied()),
        }
        if self.range.not_finite() > 0 {
            return Err(not_finite(&tap.value, picture));
        }
        for &view in &tap.views {
            if let Entry::Vacant(e) = self.moments.entry(view) {
                e.insert(InputMoments::new(value.shape(), view).ok_or_else(|| {
                    Error::Shape(format!("value `{}` of shape {:?} is no {view:?}", tap.value, value.shape()))
                })?);
            }
            self.moments.get_mut(&view).expect("inserted above").add(value);
        }
        Ok(())
    }
}

/// Runs `graph` on `inputs` and hands the values named `taps` to `see`, those of one picture at a time: index of the tap and
/// value of each, and the picture's own outputs.
///
/// # Errors
/// As [`collect`], and those of `see`.
pub(crate) fn watch(
    graph: &Graph,
    taps: &[&str],
    inputs: impl Iterator<Item = Result<ArrayD<f32>>>,
    options: &Options,
    mut see: impl FnMut(&[(usize, &ArrayD<f32>)], &[ArrayD<f32>]) -> Result<()>,
) -> Result<()> {
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
    for x in inputs {
        let x = [x?];
        let outputs = session.run(&x)?;
        let seen = on_input.iter().map(|&t| (t, &x[0])).chain(inside.iter().copied().zip(&outputs[own..]));
        see(&seen.collect::<Vec<_>>(), &outputs[..own])?;
    }
    Ok(())
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
        let s =
            collect(&graph(), &[tap("x"), tap("h")], Partial::default(), inputs(&data), &Options::default(), |p, y| {
                outputs.push((p.pictures, y[0].iter().copied().collect::<Vec<f32>>()));
            })
            .unwrap();
        assert_eq!(s.pictures, 2);
        assert_eq!(s.observed["x"].extremes(), (-1.0, 2.0));
        assert_eq!(s.observed["h"].extremes(), (-6.0, 12.0));
        assert_eq!(outputs, [(1, vec![1., 2., 3., 4.]), (2, vec![0., 0., 10., 12.])]);
    }

    #[test]
    fn continuing_is_as_not_having_stopped() {
        let data = [[1., 0.5, 0., 0., 1., 0.3], [0., 0.1, -1., 0., 0., 2.], [0.7, 0., 3., -2., 0., 1.]];
        let taps = [Tap { views: vec![View::Rows], ..tap("x") }, tap("h")];
        let run = |from: Partial, data: &[[f32; 6]]| {
            let mut last = Partial::default();
            let s = collect(&graph(), &taps, from, inputs(data), &Options::default(), |p, _| last = p.clone()).unwrap();
            (s, last)
        };
        let (whole, _) = run(Partial::default(), &data);
        let (_, stopped) = run(Partial::default(), &data[..2]);
        let (continued, _) = run(stopped, &data[2..]);
        assert_eq!(format!("{whole:?}"), format!("{continued:?}"));
        assert_eq!(continued.pictures, 3);
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let e = collect(
            &graph(),
            &[tap("h")],
            Partial::default(),
            inputs(&[[f32::INFINITY; 6]]),
            &Options::default(),
            |_, _| {},
        );
        assert!(e.unwrap_err().to_string().contains("`h`"));
    }

    #[test]
    fn a_tap_that_is_not_there_is_an_error() {
        let e = collect(&graph(), &[tap("z")], Partial::default(), inputs(&[]), &Options::default(), |_, _| {});
        assert!(e.unwrap_err().to_string().contains("`z`"));
    }
}
