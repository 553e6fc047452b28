//! Takes channels out of linear layers and of everything between them: the walk follows what a layer puts out, through
//! reshapes, transposes, splits, biases and the products of attention, to the layers that take it in.
//!
//! A dimension is a list of factors, outer to inner (3 · heads · width of a head, for a fused qkv projection). One of
//! them loses some of its places; constants that run along it lose the same ones.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use vedge_runtime::onnx::{Graph, NodeProto, TensorProto, Uses, elements, i64_tensor, shape_of, tensor, value_info};

/// A factor of a dimension: its size, and which of its places stay if not all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Factor {
    /// How many places it has.
    pub size: usize,
    /// The places that stay, ascending; `None` where all do.
    pub keep: Option<Rc<[usize]>>,
}

impl Factor {
    /// One that stays as it is.
    pub fn whole(size: usize) -> Factor {
        Factor { size, keep: None }
    }

    /// One of which only some places stay.
    pub fn some(size: usize, keep: &Rc<[usize]>) -> Factor {
        Factor { size, keep: Some(Rc::clone(keep)) }
    }

    fn kept(&self) -> usize {
        self.keep.as_ref().map_or(self.size, |k| k.len())
    }
}

/// Factors of one dimension.
pub type Dim = Vec<Factor>;

fn selected(dim: &Dim) -> bool {
    dim.iter().any(|f| f.keep.is_some())
}

fn old_size(dim: &Dim) -> usize {
    dim.iter().map(|f| f.size).product()
}

fn new_size(dim: &Dim) -> usize {
    dim.iter().map(Factor::kept).product()
}

/// Which indices of a dimension stay.
pub fn kept(dim: &Dim) -> Vec<usize> {
    dim.iter().fold(vec![0], |outer, f| {
        let places: Vec<usize> = f.keep.as_ref().map_or_else(|| (0..f.size).collect(), |k| k.to_vec());
        outer.iter().flat_map(|o| places.iter().map(move |p| o * f.size + p)).collect()
    })
}

/// What a walk changes; nothing is changed before [`Walk::apply`].
#[derive(Default)]
pub struct Walk {
    values: HashMap<String, Vec<Dim>>,
    /// New constants by node and input index.
    constants: BTreeMap<(usize, usize), TensorProto>,
    /// Linear layers that take the channels in: node, and the rows of the weight that stay.
    pub ends: Vec<(usize, Vec<usize>)>,
}

impl Walk {
    /// Follows the outputs of linear layers (`MatMul` with a constant weight), each given by its node and the factors
    /// of its output's last dimension.
    ///
    /// # Errors
    /// What cannot follow, in words.
    pub fn follow(g: &Graph, uses: &Uses, starts: &[(usize, Dim)]) -> Result<Walk, String> {
        let mut w = Walk::default();
        for (node, dim) in starts {
            let n = &g.nodes[*node];
            let weight = select(&g.initializers[n.input_name(1)], 1, &kept(dim))?;
            w.constants.insert((*node, 1), weight);
            let shape = g.shape(&n.output[0]).ok_or("a shape is not known")?;
            let mut dims: Vec<Dim> = shape.iter().map(|&s| vec![Factor::whole(s)]).collect();
            *dims.last_mut().ok_or("a layer without dimensions")? = dim.clone();
            w.values.insert(n.output[0].clone(), dims);
        }
        let first = starts.iter().map(|s| s.0).min().unwrap_or(0);
        for (i, n) in g.nodes.iter().enumerate().skip(first) {
            if n.input.iter().any(|i| w.values.contains_key(i)) {
                w.step(g, i, n).map_err(|why| format!("{} `{}` {why}", n.op_type(), n.output[0]))?;
            }
        }
        match w.values.keys().find(|v| uses.is_output(v)) {
            Some(v) => Err(format!("`{v}` is an output of the model")),
            None => Ok(w),
        }
    }

    /// Writes the new constants and shapes.
    pub fn apply(self, g: &mut Graph) {
        for ((node, input), mut t) in self.constants {
            let name = g.fresh(&format!("{}_pruned", g.nodes[node].input[input]));
            t.name = Some(name.clone());
            g.initializers.insert(name.clone(), t);
            g.nodes[node].input[input] = name;
        }
        for (name, dims) in self.values {
            let shape: Vec<usize> = dims.iter().map(new_size).collect();
            if let Some((dtype, _)) = g.fact(&name) {
                g.value_info.insert(name.clone(), value_info(&name, dtype, &shape));
            }
        }
    }

    fn dims(&self, g: &Graph, value: &str) -> Result<Vec<Dim>, String> {
        let shape = || g.shape(value).ok_or(format!("needs the shape of `{value}`"));
        self.values
            .get(value)
            .cloned()
            .map_or_else(|| Ok(shape()?.into_iter().map(|s| vec![Factor::whole(s)]).collect()), Ok)
    }

    fn set(&mut self, value: &str, dims: Vec<Dim>) {
        if dims.iter().any(selected) {
            self.values.insert(value.into(), dims);
        }
    }

    fn step(&mut self, g: &Graph, index: usize, n: &NodeProto) -> Result<(), String> {
        let output = n.output[0].as_str();
        let shape = || g.shape(output).ok_or("has no known shape".to_string());
        let moves = matches!(
            n.op_type(),
            "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Transpose" | "Split" | "Slice" | "Gather"
        );
        if moves && !self.values.contains_key(n.input_name(0)) {
            return Err("takes places from it".into());
        }
        let x = self.dims(g, n.input_name(0))?;
        match n.op_type() {
            "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => {
                let dims = distribute(&x, &shape()?)?;
                if n.op_type() == "Reshape" {
                    let target: Vec<i64> = dims.iter().map(|d| new_size(d) as i64).collect();
                    self.constants.insert((index, 1), i64_tensor("", &[target.len()], &target));
                }
                self.set(output, dims);
            }
            "Transpose" => {
                let reversed: Vec<i64> = (0..x.len() as i64).rev().collect();
                let perm = n.ints("perm").unwrap_or(&reversed);
                self.set(output, perm.iter().map(|&p| x[p as usize].clone()).collect());
            }
            "Split" => self.split(g, index, n, &x)?,
            "Slice" => self.slice(g, index, n, &x)?,
            "Gather" => {
                let axis = axis_of(n.int("axis", 0), x.len())?;
                if selected(&x[axis]) {
                    return Err("picks single channels".into());
                }
                let taken = g.shape(n.input_name(1)).ok_or("has indices of unknown shape")?;
                let places = taken.iter().map(|&s| vec![Factor::whole(s)]);
                self.set(
                    output,
                    x[..axis].iter().cloned().chain(places).chain(x[axis + 1..].iter().cloned()).collect(),
                );
            }
            "Softmax" | "LayerNormalization" => {
                let axis = axis_of(n.int("axis", -1), x.len())?;
                let over = if n.op_type() == "Softmax" { axis..axis + 1 } else { axis..x.len() };
                if x[over].iter().any(selected) {
                    return Err("runs over the channels".into());
                }
                self.set(output, x);
            }
            "MatMul" => self.product(g, index, n, x)?,
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Where" | "Erf" | "Gelu" | "Sigmoid" | "Tanh" | "Relu"
            | "HardSwish" | "HardSigmoid" | "Cast" | "Identity" | "Sqrt" | "IsNaN" | "Neg" | "Exp" | "Clip"
            | "LeakyRelu" => {
                let dims = self.elementwise(g, index, n, &shape()?)?;
                self.set(output, dims);
            }
            _ => return Err("does not let channels be left out".into()),
        }
        Ok(())
    }

    fn split(&mut self, g: &Graph, index: usize, n: &NodeProto, x: &[Dim]) -> Result<(), String> {
        let axis = axis_of(n.int("axis", 0), x.len())?;
        let mut sizes = vec![];
        let mut at = 0;
        for o in &n.output {
            let size = g.shape(o).and_then(|s| s.get(axis).copied()).ok_or("has no known shape")?;
            let dim = part(&x[axis], at, size)?;
            at += size;
            sizes.push(new_size(&dim) as i64);
            let mut dims = x.to_vec();
            dims[axis] = dim;
            self.set(o, dims);
        }
        if g.initializers.contains_key(n.input_name(1)) {
            self.constants.insert((index, 1), i64_tensor("", &[sizes.len()], &sizes));
        }
        Ok(())
    }

    fn slice(&mut self, g: &Graph, index: usize, n: &NodeProto, x: &[Dim]) -> Result<(), String> {
        let list = |i: usize| g.const_i64(n.input_name(i));
        let (Some(mut starts), Some(mut ends)) = (list(1), list(2)) else { return Err("has no fixed ends".into()) };
        let axes = list(3).unwrap_or_else(|| (0..starts.len() as i64).collect());
        let mut dims = x.to_vec();
        for (k, &a) in axes.iter().enumerate() {
            let axis = axis_of(a, x.len())?;
            let size = old_size(&x[axis]) as i64;
            let place = |i: i64| if i < 0 { i + size } else { i }.clamp(0, size) as usize;
            let (start, end) = (place(starts[k]), place(ends[k]));
            if list(4).is_some_and(|s| s[k] != 1) {
                return Err("has steps".into());
            }
            dims[axis] = part(&x[axis], start, end.saturating_sub(start))?;
            if selected(&x[axis]) {
                let before = new_size(&part(&x[axis], 0, start)?);
                let count = new_size(&dims[axis]);
                (starts[k], ends[k]) = (before as i64, (before + count) as i64);
            }
        }
        self.constants.insert((index, 1), i64_tensor("", &[starts.len()], &starts));
        self.constants.insert((index, 2), i64_tensor("", &[ends.len()], &ends));
        self.set(&n.output[0], dims);
        Ok(())
    }

    fn product(&mut self, g: &Graph, index: usize, n: &NodeProto, a: Vec<Dim>) -> Result<(), String> {
        let b = self.dims(g, n.input_name(1))?;
        let (Some((inner, rows)), true) = (a.split_last(), b.len() >= 2) else { return Err("has no matrices".into()) };
        let constant = g.initializers.contains_key(n.input_name(1));
        if constant && selected(inner) {
            if b.len() != 2 || rows.iter().any(selected) {
                return Err("takes the channels in where it should not".into());
            }
            self.ends.push((index, kept(inner)));
            return Ok(());
        }
        if g.initializers.contains_key(n.input_name(0)) || (constant && b.len() != 2) {
            return Err("multiplies with a constant that runs along the channels".into());
        }
        if kept(inner) != kept(&b[b.len() - 2]) {
            return Err("sums over channels that are only in one of its inputs".into());
        }
        let batch = rows.len().saturating_sub(1).max(b.len() - 2);
        let at = |dims: &[Dim], i: usize| i.checked_sub(batch + 2 - dims.len()).map(|i| dims[i].clone());
        let mut out = vec![];
        for i in 0..batch {
            out.push(match (at(&a, i), at(&b, i)) {
                (Some(x), Some(y)) if old_size(&x) == old_size(&y) && kept(&x) == kept(&y) => x,
                (Some(x), Some(y)) if old_size(&y) == 1 => x,
                (Some(x), Some(y)) if old_size(&x) == 1 => y,
                (Some(x), None) | (None, Some(x)) => x,
                _ => return Err("has inputs that lose other channels".into()),
            });
        }
        out.extend(rows.last().cloned());
        out.extend(b.last().cloned());
        self.set(&n.output[0], out);
        Ok(())
    }

    fn elementwise(&mut self, g: &Graph, index: usize, n: &NodeProto, shape: &[usize]) -> Result<Vec<Dim>, String> {
        let mut dims: Vec<Dim> = shape.iter().map(|&s| vec![Factor::whole(s)]).collect();
        let variable = |i: &&String| !i.is_empty() && !g.initializers.contains_key(i.as_str());
        for name in n.input.iter().filter(variable) {
            let x = self.dims(g, name)?;
            let lead = dims.len().checked_sub(x.len()).ok_or("has fewer dimensions than its input")?;
            for (d, x) in dims[lead..].iter_mut().zip(x) {
                if selected(&x) {
                    *d = x;
                }
            }
        }
        for (k, name) in n.input.iter().enumerate().filter(|(_, i)| !i.is_empty()) {
            let x = self.dims(g, name)?;
            let lead = dims.len().checked_sub(x.len()).ok_or("has fewer dimensions than its input")?;
            let mut constant = g.initializers.get(name).cloned();
            for (axis, (x, d)) in x.iter().zip(&dims[lead..]).enumerate() {
                if !selected(d) || old_size(x) == 1 || kept(x) == kept(d) {
                    continue;
                }
                constant = match constant {
                    Some(t) => Some(select(&t, axis, &kept(d))?),
                    None => return Err("has inputs that lose other channels".into()),
                };
            }
            if let Some(t) = constant.filter(|t| shape_of(t) != shape_of(&g.initializers[name])) {
                self.constants.insert((index, k), t);
            }
        }
        Ok(dims)
    }
}

fn axis_of(axis: i64, rank: usize) -> Result<usize, String> {
    let axis = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(axis).ok().filter(|&a| a < rank).ok_or_else(|| "has an axis out of range".into())
}

/// The factors of dimensions whose elements get the (old) shape `to`.
fn distribute(from: &[Dim], to: &[usize]) -> Result<Vec<Dim>, String> {
    let mut left: Vec<Factor> = from.iter().flatten().rev().filter(|f| f.size != 1).cloned().collect();
    let mut dims = vec![];
    for &want in to {
        let (mut dim, mut missing) = (vec![], want);
        while missing > 1 {
            let f = left.pop().ok_or("has another number of elements")?;
            if missing.is_multiple_of(f.size) {
                missing /= f.size;
                dim.push(f);
            } else if f.size.is_multiple_of(missing) && f.keep.is_none() {
                left.push(Factor::whole(f.size / missing));
                dim.push(Factor::whole(missing));
                missing = 1;
            } else {
                return Err("cuts across channels".into());
            }
        }
        dims.push(if dim.is_empty() { vec![Factor::whole(1)] } else { dim });
    }
    Ok(dims)
}

/// Places `start..start + size` of a dimension: all of it, or some of its outermost factor's.
fn part(dim: &Dim, start: usize, size: usize) -> Result<Dim, String> {
    if !selected(dim) {
        return Ok(vec![Factor::whole(size)]);
    }
    if size == 0 {
        return Ok(vec![Factor::whole(0)]);
    }
    if (start, size) == (0, old_size(dim)) {
        return Ok(dim.clone());
    }
    let inner = old_size(&dim[1..].to_vec());
    if dim[0].keep.is_some() || !start.is_multiple_of(inner) || !size.is_multiple_of(inner) {
        return Err("takes a part of the channels".into());
    }
    Ok(std::iter::once(Factor::whole(size / inner)).chain(dim[1..].iter().cloned()).collect())
}

/// Some places of an axis of a constant.
pub fn select(t: &TensorProto, axis: usize, keep: &[usize]) -> Result<TensorProto, String> {
    let mut shape = shape_of(t);
    let count = elements(&shape);
    let raw = t.raw_data.as_deref().map(<[u8]>::to_vec);
    let raw = raw.filter(|r| count > 0 && r.len() % count == 0);
    let raw = match (raw, vedge_runtime::onnx::to_f32(t)) {
        (Some(raw), _) => raw,
        (None, Ok(values)) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => return Err(format!("has the constant `{}` of type {:?}", t.name(), t.dtype())),
    };
    let size = raw.len() / count.max(1);
    let (outer, places) = (elements(&shape[..axis]), shape[axis]);
    let run = elements(&shape[axis + 1..]) * size;
    if keep.iter().any(|&k| k >= places) {
        return Err(format!("has the constant `{}` of another size", t.name()));
    }
    let at = |o: usize, k: usize| &raw[(o * places + k) * run..][..run];
    let out = (0..outer).flat_map(|o| keep.iter().flat_map(move |&k| at(o, k).iter().copied())).collect();
    shape[axis] = keep.len();
    Ok(tensor("", t.dtype(), &shape, out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep(places: &[usize]) -> Rc<[usize]> {
        places.into()
    }

    #[test]
    fn indices_of_factors() {
        let dim = vec![Factor::whole(2), Factor::some(3, &keep(&[0, 2])), Factor::whole(2)];
        assert_eq!(kept(&dim), [0, 1, 4, 5, 6, 7, 10, 11]);
        assert_eq!((old_size(&dim), new_size(&dim)), (12, 8));
    }

    #[test]
    fn reshapes_keep_the_factors_apart() {
        let heads = Factor::some(4, &keep(&[1]));
        let qkv = vec![vec![Factor::whole(5)], vec![Factor::whole(3), heads.clone(), Factor::whole(8)]];
        let apart = distribute(&qkv, &[5, 3, 4, 8]).unwrap();
        assert_eq!(apart[2], [heads]);
        assert_eq!(distribute(&apart, &[5, 96]).unwrap(), qkv);
        assert_eq!(distribute(&qkv, &[1, 5, 96]).unwrap()[0], [Factor::whole(1)]);
        assert!(distribute(&qkv, &[5, 6, 16]).is_err());
    }

    #[test]
    fn parts_are_whole_factors() {
        let heads = Factor::some(4, &keep(&[1]));
        let dim = vec![Factor::whole(3), heads.clone(), Factor::whole(8)];
        assert_eq!(part(&dim, 32, 32).unwrap(), [Factor::whole(1), heads.clone(), Factor::whole(8)]);
        assert_eq!(part(&dim, 32, 64).unwrap(), [Factor::whole(2), heads, Factor::whole(8)]);
        assert!(part(&dim, 8, 32).is_err());
    }

    #[test]
    fn constants_lose_places_of_one_axis() {
        let t = vedge_runtime::onnx::f32_tensor("t", &[2, 3], &[0., 1., 2., 3., 4., 5.]);
        let s = select(&t, 1, &[2, 0]).unwrap();
        assert_eq!((shape_of(&s), vedge_runtime::onnx::to_f32(&s).unwrap()), (vec![2, 2], vec![2., 0., 5., 3.]));
        assert!(select(&t, 0, &[2]).is_err());
    }
}
