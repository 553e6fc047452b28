//! Patches of another size: the convolution that cuts a picture into patches gets another kernel.
//!
//! FlexiViT's PI-resize (Beyer et al. 2023, arXiv 2212.08013): of all kernels of the new size it is the one whose products
//! with resized patches come nearest to those of the old kernel with the patches themselves. With the interpolation R from
//! old to new pixels that is pinv(Rᵀ)·w; R acts on rows and columns apart, and so does its pseudo-inverse.

use super::positions::interpolation;
use super::resize::Size;
use crate::prune::eliminate::spd_inverse;
use crate::shapes::describe;
use ndarray::{Array2, ArrayView2};
use vedge_runtime::onnx::{Graph, NodeProto, attr, f32_tensor, shape_of};
use vedge_runtime::{Error, Result};

/// The convolution that cuts the picture into patches (kernel = stride): its node and its patch size.
pub(crate) fn find(graph: &Graph) -> Option<(usize, Size)> {
    let (i, conv) = graph.nodes.iter().enumerate().find(|(_, n)| n.op_type() == "Conv")?;
    let kernel = shape_of(graph.initializers.get(conv.input_name(1))?);
    let stride: Vec<usize> = conv.ints("strides")?.iter().map(|&s| s.max(1) as usize).collect();
    let [.., kh, kw] = kernel[..] else { return None };
    (stride.ends_with(&[kh, kw]) && kh * kw > 1).then_some((i, (kh, kw)))
}

/// Gives the patch embedding patches of another size; the former size, `None` where it has this one already. Shapes after
/// it are those of before.
///
/// # Errors
/// [`Error::Unsupported`] when there is no patch embedding whose kernel can be resized.
pub(super) fn resize(graph: &mut Graph, new: Size) -> Result<Option<Size>> {
    let refuse = |what: String| Error::Unsupported {
        what,
        hint: "leave --patch out: --size alone makes such a model smaller, too".into(),
    };
    let first = graph.nodes.iter().find(|n| n.op_type() == "Conv");
    let first =
        first.ok_or_else(|| refuse("the model has no convolution that cuts its picture into patches".into()))?;
    let no = |why: &str| refuse(format!("{} is no patch embedding: {why}", describe(first)));
    let (i, old) = find(graph).ok_or_else(|| no("its strides are not the size of its kernel"))?;
    let plain = |name: &str, value: i64| first.ints(name).is_none_or(|v| v.iter().all(|&v| v == value));
    if !plain("pads", 0) || !plain("dilations", 1) || !matches!(first.string("auto_pad", "NOTSET"), "NOTSET" | "VALID")
    {
        return Err(no("it is padded or dilated"));
    }
    let weight = first.input_name(1).to_string();
    let shape = shape_of(&graph.initializers[&weight]);
    let ([out, channels, _, _], 1) = (&shape[..], first.int("group", 1)) else {
        return Err(no(&format!("its kernel {shape:?} is not one of pictures")));
    };
    let values = graph.const_f32(&weight).ok_or_else(|| no("its kernel is not of floats"))?;
    if old == new {
        return Ok(None);
    }
    let (values, shape) = (resample(&values, old, new), [*out, *channels, new.0, new.1]);
    let name = graph.fresh(&format!("{weight}_resized"));
    graph.initializers.insert(name.clone(), f32_tensor(&name, &shape, &values));
    set(&mut graph.nodes[i], &name, new);
    Ok(Some(old))
}

fn set(conv: &mut NodeProto, weight: &str, patch: Size) {
    let sizes = [patch.0 as i64, patch.1 as i64];
    conv.input[1] = weight.to_string();
    conv.attribute.retain(|a| !matches!(a.name(), "kernel_shape" | "strides"));
    conv.attribute.extend([attr::ints("kernel_shape", &sizes), attr::ints("strides", &sizes)]);
}

/// Resizes kernels, each `old.0 * old.1` floats, row-major, to `new`: timm's `resample_patch_embed`.
///
/// # Panics
/// When `values` are not whole kernels, or a size is zero.
pub fn resample(values: &[f32], old: Size, new: Size) -> Vec<f32> {
    assert!(old.0 * old.1 * new.0 * new.1 > 0 && values.len().is_multiple_of(old.0 * old.1), "whole kernels");
    let (down, across) = (pseudo_inverse(old.0, new.0), pseudo_inverse(old.1, new.1));
    let each = values.chunks_exact(old.0 * old.1).flat_map(|kernel| {
        let kernel = ArrayView2::from_shape(old, kernel).expect("its size").mapv(f64::from);
        down.dot(&kernel).dot(&across.t()).mapv(|v| v as f32).into_iter()
    });
    each.collect()
}

/// pinv(Rᵀ), new × old, of the interpolation R from `old` to `new` places. R has full rank, so that one of its two products
/// with itself has an inverse.
fn pseudo_inverse(old: usize, new: usize) -> Array2<f64> {
    if old == new {
        return Array2::eye(old);
    }
    let r = interpolation(old, new);
    let gram = if new > old { r.t().dot(&r) } else { r.dot(&r.t()) };
    let inverse = spd_inverse(&gram).expect("an interpolation has full rank");
    if new > old { r.dot(&inverse) } else { inverse.dot(&r) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(size: Size) -> Vec<f32> {
        (0..size.0 * size.1).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    #[test]
    fn the_same_size_gives_the_same_kernel() {
        let values = [kernel((7, 5)), kernel((7, 5))].concat();
        assert_eq!(resample(&values, (7, 5), (7, 5)), values);
    }

    /// What the resize is for: larger patches, interpolated from smaller ones, give the same embedding.
    #[test]
    fn enlarged_patches_give_the_same_products() {
        for (old, new) in [((4, 4), (6, 6)), ((8, 8), (16, 16)), ((14, 14), (15, 21)), ((3, 5), (3, 9))] {
            let (weights, patch) = (kernel(old), Array2::from_shape_fn(old, |(y, x)| ((y * 5 + x * 3) as f64).cos()));
            let larger = interpolation(old.0, new.0).dot(&patch).dot(&interpolation(old.1, new.1).t());
            let product = |w: &[f32], p: &Array2<f64>| w.iter().zip(p).map(|(w, p)| f64::from(*w) * p).sum::<f64>();
            let (before, after) = (product(&weights, &patch), product(&resample(&weights, old, new), &larger));
            assert!((before - after).abs() < 1e-5, "{old:?} to {new:?}: {before} becomes {after}");
        }
    }

    /// Every size that can be asked for has an inverse.
    #[test]
    fn interpolations_have_full_rank() {
        for old in 1..=40 {
            for new in 1..=40 {
                assert!(pseudo_inverse(old, new).iter().all(|v| v.is_finite()), "{old} to {new}");
            }
        }
    }
}
