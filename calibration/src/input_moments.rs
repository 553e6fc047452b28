//! What the inputs of a layer have in common: their mean and how they vary together.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayD, Axis};

/// How the elements of a value meet the weights of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub enum View {
    /// Every position of the leading axes is a row, the last axis its inputs: linear layers.
    Rows,
    /// Every position of the output is a row, its inputs are `[channel][kernel y][kernel x]` of a picture
    /// `[1, channels, height, width]`: convolutions.
    Patches {
        /// Kernel height and width.
        kernel: [usize; 2],
        /// Distance between positions, down and right.
        stride: [usize; 2],
        /// Distance between kernel taps, down and right.
        dilation: [usize; 2],
        /// Padding: top, left, bottom, right.
        pads: [usize; 4],
        /// Whether each channel is a layer of its own.
        depthwise: bool,
    },
}

/// Rows taken from one picture: the first, where class tokens are, and others spread over the rest.
const ROWS: usize = 64;
/// Rows of one picture that are kept as they are, and in all.
const KEPT: usize = 4;
const KEPT_IN_ALL: usize = 512;

/// Mean and covariance of a layer's inputs, streamed, and a few rows as they were.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct InputMoments {
    view: View,
    /// Sum of the outer products of rows, for each group.
    products: Vec<Array2<f32>>,
    /// Sum of rows, for each group.
    sums: Vec<Array1<f64>>,
    rows: usize,
    pictures: usize,
    /// Some positions as they were, all channels of each, one after the other.
    kept: Vec<f32>,
    /// Lowest and highest value of each channel, widened to include zero.
    extremes: Vec<(f32, f32)>,
}

/// Bytes that [`InputMoments`] of a value of that shape need; `None` when the view does not fit the shape.
pub fn bytes(shape: &[usize], view: View) -> Option<usize> {
    let (groups, inputs) = sizes(shape, view)?;
    groups.checked_mul(inputs)?.checked_mul(inputs)?.checked_mul(size_of::<f32>())
}

/// Groups and inputs of each.
fn sizes(shape: &[usize], view: View) -> Option<(usize, usize)> {
    match (view, shape) {
        (View::Rows, [.., inputs]) if *inputs > 0 => Some((1, *inputs)),
        (View::Patches { kernel, depthwise: true, .. }, [1, channels, _, _]) => {
            Some((*channels, kernel[0] * kernel[1]))
        }
        (View::Patches { kernel, .. }, [1, channels, _, _]) => Some((1, channels * kernel[0] * kernel[1])),
        _ => None,
    }
}

/// Channels of a value; the view fits the shape.
fn channels(shape: &[usize], view: View) -> usize {
    if view == View::Rows { shape[shape.len() - 1] } else { shape[1] }
}

impl InputMoments {
    /// Nothing seen yet of a value of that shape; `None` when the view does not fit the shape.
    pub fn new(shape: &[usize], view: View) -> Option<InputMoments> {
        let (groups, inputs) = sizes(shape, view)?;
        Some(InputMoments {
            view,
            products: vec![Array2::zeros((inputs, inputs)); groups],
            sums: vec![Array1::zeros(inputs); groups],
            rows: 0,
            pictures: 0,
            kept: vec![],
            extremes: vec![(0.0, 0.0); channels(shape, view)],
        })
    }

    /// Adds the value of one picture.
    pub fn add(&mut self, value: &ArrayD<f32>) {
        let value = value.as_standard_layout();
        let elements = value.as_slice().expect("standard layout");
        let inputs = self.sums[0].len();
        let total = match self.view {
            View::Rows => elements.len() / inputs,
            View::Patches { kernel, stride, dilation, pads, .. } => {
                let [height, width] = positions(value.shape(), kernel, stride, dilation, pads);
                height * width
            }
        };
        let (count, pictures) = (total.min(ROWS), self.pictures);
        let at = |i: usize| match i {
            0 => 0,
            // The others go around with the pictures, so that all positions are seen.
            _ => 1 + ((i - 1) * (total - 1) / (count - 1) + pictures * 31) % (total - 1),
        };
        let mut block = Array2::zeros((count, inputs));
        for group in 0..self.products.len() {
            for (i, row) in block.axis_iter_mut(Axis(0)).enumerate() {
                let row = row.into_slice().expect("rows are contiguous");
                match self.view {
                    View::Rows => row.copy_from_slice(&elements[at(i) * inputs..][..inputs]),
                    View::Patches { .. } => self.patch(elements, value.shape(), group, at(i), row),
                }
            }
            general_mat_mul(1.0, &block.t(), &block, 1.0, &mut self.products[group]);
            for row in block.axis_iter(Axis(0)) {
                self.sums[group].zip_mut_with(&row, |s, v| *s += f64::from(*v));
            }
        }
        self.add_channels(elements, at, count);
        self.rows += count;
        self.pictures += 1;
    }

    /// Looks at the channels of a picture's value, apart from how a layer meets them.
    fn add_channels(&mut self, elements: &[f32], at: impl Fn(usize) -> usize, count: usize) {
        let channels = self.extremes.len();
        let widen = |(low, high): &mut (f32, f32), v: &f32| (*low, *high) = (low.min(*v), high.max(*v));
        let positions = elements.len() / channels.max(1);
        // Channels last, or each channel a plane.
        let rows = self.view == View::Rows;
        match rows {
            true => elements
                .chunks(channels)
                .for_each(|row| self.extremes.iter_mut().zip(row).for_each(|(e, v)| widen(e, v))),
            false => {
                for (e, plane) in self.extremes.iter_mut().zip(elements.chunks(positions)) {
                    plane.iter().for_each(|v| widen(e, v));
                }
            }
        }
        for i in (0..count).step_by(count.div_ceil(KEPT).max(1)) {
            if self.kept.len() < KEPT_IN_ALL * channels {
                let at = at(i) % positions;
                match rows {
                    true => self.kept.extend_from_slice(&elements[at * channels..][..channels]),
                    false => self.kept.extend((0..channels).map(|c| elements[c * positions + at])),
                }
            }
        }
    }

    /// Writes the inputs of one output position.
    fn patch(&self, elements: &[f32], shape: &[usize], group: usize, position: usize, row: &mut [f32]) {
        let View::Patches { kernel, stride, dilation, pads, depthwise } = self.view else { return };
        let (height, width) = (shape[2], shape[3]);
        let across = positions(shape, kernel, stride, dilation, pads)[1];
        let (top, left) = (position / across * stride[0], position % across * stride[1]);
        let channels = if depthwise { group..group + 1 } else { 0..shape[1] };
        let mut out = row.iter_mut();
        for c in channels {
            for ky in 0..kernel[0] {
                for kx in 0..kernel[1] {
                    let y = (top + ky * dilation[0]).wrapping_sub(pads[0]);
                    let x = (left + kx * dilation[1]).wrapping_sub(pads[1]);
                    let inside = y < height && x < width;
                    *out.next().expect("a row has that many inputs") =
                        if inside { elements[(c * height + y) * width + x] } else { 0.0 };
                }
            }
        }
    }

    /// How the value meets the layer.
    pub fn view(&self) -> View {
        self.view
    }

    /// Number of rows seen.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of groups: 1, or the channels of a depthwise convolution.
    pub fn groups(&self) -> usize {
        self.products.len()
    }

    /// Mean of each input of a group.
    pub fn mean(&self, group: usize) -> Array1<f64> {
        &self.sums[group] / self.rows.max(1) as f64
    }

    /// Covariance of the inputs of a group, `[inputs][inputs]`.
    pub fn covariance(&self, group: usize) -> Array2<f64> {
        let mean = self.mean(group);
        let rows = self.rows.max(1) as f64;
        let mut c = self.products[group].mapv(|p| f64::from(p) / rows);
        for ((i, j), v) in c.indexed_iter_mut() {
            *v -= mean[i] * mean[j];
        }
        c
    }

    /// Some positions as they were, `[positions][channels]`, the first of every picture among them.
    pub fn kept(&self) -> Array2<f32> {
        let channels = self.extremes.len();
        Array2::from_shape_vec((self.kept.len() / channels, channels), self.kept.clone()).expect("whole rows")
    }
}

impl InputMoments {
    /// Lowest and highest value of each channel, widened to include zero.
    pub fn extremes(&self) -> &[(f32, f32)] {
        &self.extremes
    }

    /// What would have been seen had every channel been divided by its factor.
    ///
    /// # Panics
    /// When there are not as many factors as channels.
    pub fn divided(&self, by: &[f32]) -> InputMoments {
        assert_eq!(by.len(), self.extremes.len());
        let mut m = self.clone();
        let taps = (m.sums[0].len() * m.products.len() / by.len()).max(1);
        let groups = m.products.iter_mut().zip(&mut m.sums).enumerate();
        for (group, (products, sums)) in groups {
            let inputs = sums.len();
            let factor = |input: usize| by[(group * inputs + input) / taps];
            for ((i, j), p) in products.indexed_iter_mut() {
                *p /= factor(i) * factor(j);
            }
            sums.indexed_iter_mut().for_each(|(i, s)| *s /= f64::from(factor(i)));
        }
        m.kept.iter_mut().zip(by.iter().cycle()).for_each(|(v, f)| *v /= f);
        m.extremes.iter_mut().zip(by).for_each(|((low, high), f)| (*low, *high) = (*low / f, *high / f));
        m
    }
}

/// Output positions of a convolution, down and right.
fn positions(
    shape: &[usize],
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    pads: [usize; 4],
) -> [usize; 2] {
    std::array::from_fn(|i| {
        let padded = shape[2 + i] + pads[i] + pads[i + 2];
        (padded + stride[i]).saturating_sub(dilation[i] * (kernel[i] - 1) + 1) / stride[i]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        vedge_runtime::model::card::SelfTest::input(seed, n)
    }

    #[test]
    fn mean_and_covariance_are_those_of_the_rows() {
        let mut m = InputMoments::new(&[1, 7, 5], View::Rows).unwrap();
        let pictures: Vec<Vec<f32>> = (0..9).map(|p| values(35, 40 * p)).collect();
        for p in &pictures {
            m.add(&ArrayD::from_shape_vec(vec![1, 7, 5], p.clone()).unwrap());
        }
        let rows: Vec<&[f32]> = pictures.iter().flat_map(|p| p.chunks(5)).collect();
        assert_eq!(m.rows(), 63);
        // Of seven rows each is taken once, so the moments are exact.
        let mean = |i: usize| rows.iter().map(|r| f64::from(r[i])).sum::<f64>() / 63.0;
        let c = m.covariance(0);
        for i in 0..5 {
            assert!((m.mean(0)[i] - mean(i)).abs() < 1e-5, "{i}");
            for j in 0..5 {
                let want: f64 =
                    rows.iter().map(|r| (f64::from(r[i]) - mean(i)) * (f64::from(r[j]) - mean(j))).sum::<f64>() / 63.0;
                assert!((c[(i, j)] - want).abs() < 1e-5, "{i} {j}: {} {want}", c[(i, j)]);
            }
        }
        assert_eq!(m.kept().row(0).to_vec(), pictures[0][..5]);
    }

    #[test]
    fn patches_are_what_a_convolution_sees() {
        let view =
            View::Patches { kernel: [3, 3], stride: [2, 2], dilation: [1, 1], pads: [1, 1, 1, 1], depthwise: false };
        let x = ArrayD::from_shape_vec(vec![1, 2, 4, 4], values(32, 3)).unwrap();
        let m = InputMoments::new(&[1, 2, 4, 4], view).unwrap();
        let mut row = vec![9.0; 18];
        m.patch(x.as_slice().unwrap(), x.shape(), 0, 0, &mut row);
        // The upper left position: the first row and column of the kernel lie in the padding.
        assert_eq!(row[..5], [0.0, 0.0, 0.0, 0.0, x[[0, 0, 0, 0]]]);
        m.patch(x.as_slice().unwrap(), x.shape(), 0, 3, &mut row);
        assert_eq!((row[0], row[17]), (x[[0, 0, 1, 1]], x[[0, 1, 3, 3]]));
        let mut one = InputMoments::new(&[1, 2, 4, 4], view).unwrap();
        one.add(&x);
        assert_eq!((one.rows(), one.mean(0).len()), (4, 18));
        let View::Patches { kernel, stride, dilation, pads, .. } = view else { unreachable!() };
        let mut each =
            InputMoments::new(&[1, 2, 4, 4], View::Patches { kernel, stride, dilation, pads, depthwise: true })
                .unwrap();
        each.add(&x);
        assert_eq!((each.groups(), each.mean(1).len()), (2, 9));
        // The same inputs, channel by channel.
        for i in 0..9 {
            assert!((each.mean(1)[i] - one.mean(0)[9 + i]).abs() < 1e-9);
        }
    }

    #[test]
    fn dividing_afterwards_is_as_dividing_before() {
        let by = [0.5, 2.0, 4.0];
        let mut m = InputMoments::new(&[1, 6, 3], View::Rows).unwrap();
        let mut want = m.clone();
        let x = ArrayD::from_shape_vec(vec![1, 6, 3], values(18, 5)).unwrap();
        m.add(&x);
        let mut divided = x.clone();
        divided.iter_mut().zip(by.iter().cycle()).for_each(|(v, f)| *v /= f);
        want.add(&divided);
        let got = m.divided(&by);
        // Powers of two: exact.
        assert_eq!((got.kept(), got.extremes(), got.covariance(0)), (want.kept(), want.extremes(), want.covariance(0)));
        assert_ne!(got.kept(), m.kept());
        for depthwise in [false, true] {
            let view = View::Patches { kernel: [3, 3], stride: [1, 1], dilation: [1, 1], pads: [1; 4], depthwise };
            let x = ArrayD::from_shape_vec(vec![1, 3, 4, 4], values(48, 5)).unwrap();
            let mut divided = x.clone();
            divided.iter_mut().enumerate().for_each(|(i, v)| *v /= by[i / 16]);
            let [got, want] = [&x, &divided].map(|x| {
                let mut m = InputMoments::new(x.shape(), view).unwrap();
                m.add(x);
                m
            });
            let got = got.divided(&by);
            assert_eq!((got.kept(), got.extremes()), (want.kept(), want.extremes()));
            for group in 0..got.groups() {
                assert_eq!((got.mean(group), got.covariance(group)), (want.mean(group), want.covariance(group)));
            }
        }
    }

    #[test]
    fn memory_is_known_before() {
        assert_eq!(bytes(&[1, 257, 384], View::Rows), Some(384 * 384 * 4));
        let view =
            |depthwise| View::Patches { kernel: [3, 3], stride: [1, 1], dilation: [1, 1], pads: [1; 4], depthwise };
        assert_eq!(bytes(&[1, 64, 8, 8], view(true)), Some(64 * 81 * 4));
        assert_eq!(bytes(&[2, 64, 8, 8], view(false)), None);
    }
}
