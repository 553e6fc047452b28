//! What is remembered of a value: exact extremes and a histogram of bounded size.

/// How a quantization range is chosen from what was observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Calibrator {
    /// The exact extremes: nothing seen in calibration is clipped.
    MinMax,
    /// The extremes of a picture, averaged over pictures (later ones weigh more): lone outliers of few pictures are clipped.
    MovingAverage,
    /// The range that leaves out one value in ten thousand, half of them on each side.
    Percentile,
    /// The range with the least mean squared error after rounding to 256 steps and clipping.
    Mse,
    /// The range whose 256 steps tell most about the values: least Kullback-Leibler divergence (Migacz, "8-bit inference with
    /// TensorRT").
    Entropy,
}

impl Calibrator {
    /// Every calibrator, the default first.
    pub const ALL: [Calibrator; 5] =
        [Calibrator::MinMax, Calibrator::MovingAverage, Calibrator::Percentile, Calibrator::Mse, Calibrator::Entropy];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Calibrator::MinMax => "min-max",
            Calibrator::Percentile => "percentile 99.99",
            Calibrator::Mse => "least squares",
            Calibrator::MovingAverage => "moving average",
            Calibrator::Entropy => "entropy",
        }
    }

    /// Its name on the command line.
    pub fn key(self) -> &'static str {
        match self {
            Calibrator::MinMax => "min-max",
            Calibrator::MovingAverage => "moving-average",
            Calibrator::Percentile => "percentile",
            Calibrator::Mse => "mse",
            Calibrator::Entropy => "entropy",
        }
    }
}

/// Number of bins: memory per observed value is 32 KiB.
const BINS: usize = 4096;
/// Share of values outside of [`Calibrator::Percentile`]'s range.
const OUTSIDE: f64 = 1e-4;
/// Integer steps in an 8-bit range.
const STEPS: f64 = 255.0;

/// Streaming histogram over a range that is symmetric about zero and doubles when a value does not fit (then pairs
/// of bins merge), with the exact minimum and maximum beside it.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Histogram {
    bins: Vec<u64>,
    /// The bins cover `-limit..limit`; a power of two, so that merging is exact.
    limit: f32,
    min: f32,
    max: f32,
    /// Moving average of the extremes of each portion.
    average: (f32, f32),
    count: u64,
    not_finite: u64,
}

/// Weight of the newest portion in the moving average.
const NEWEST: f32 = 0.1;

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            bins: vec![0; BINS],
            limit: 1.0 / 1024.0,
            min: 0.0,
            max: 0.0,
            average: (0.0, 0.0),
            count: 0,
            not_finite: 0,
        }
    }
}

impl Histogram {
    /// Adds the values of one picture. Those that are not finite are only counted.
    pub fn add(&mut self, values: impl Iterator<Item = f32> + Clone) {
        let (mut min, mut max, mut bad) = (0f32, 0f32, 0u64);
        for v in values.clone() {
            if v.is_finite() {
                min = min.min(v);
                max = max.max(v);
            } else {
                bad += 1;
            }
        }
        let (low, high) = self.average;
        self.average = match self.count {
            0 => (min, max),
            _ => (low + NEWEST * (min - low), high + NEWEST * (max - high)),
        };
        self.min = self.min.min(min);
        self.max = self.max.max(max);
        self.not_finite += bad;
        while self.limit <= self.max.max(-self.min) && self.limit < f32::MAX / 4.0 {
            self.double();
        }
        for v in values.filter(|v| v.is_finite()) {
            let at = self.bin(v);
            self.bins[at] += 1;
            self.count += 1;
        }
    }

    fn double(&mut self) {
        let half = (BINS / 2) as i64;
        let mut merged = vec![0; BINS];
        for (i, n) in self.bins.iter().enumerate() {
            merged[(half + (i as i64 - half).div_euclid(2)) as usize] += n;
        }
        self.bins = merged;
        self.limit *= 2.0;
    }

    /// Number of finite values seen.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Number of infinite or NaN values seen.
    pub fn not_finite(&self) -> u64 {
        self.not_finite
    }

    /// Lowest and highest value seen, exact, widened to include zero.
    pub fn extremes(&self) -> (f32, f32) {
        (self.min, self.max)
    }

    /// The range that a calibrator chooses: includes zero, lies inside of [`Histogram::extremes`].
    pub fn range(&self, calibrator: Calibrator) -> (f32, f32) {
        match calibrator {
            Calibrator::MinMax => self.extremes(),
            Calibrator::Percentile => self.percentile(OUTSIDE / 2.0),
            Calibrator::Mse => self.least_squares(),
            Calibrator::MovingAverage => self.average,
            Calibrator::Entropy => self.most_telling(),
        }
    }

    /// Shares of the values in `parts` equal parts of [`Histogram::extremes`], to the resolution of a bin.
    pub fn shares(&self, parts: usize) -> Vec<f64> {
        let (first, last) = (self.bin(self.min), self.bin(self.max));
        let mut shares = vec![0.0; parts];
        for (i, n) in self.bins[first..=last].iter().enumerate() {
            shares[i * parts / (last - first + 1)] += *n as f64 / self.count.max(1) as f64;
        }
        shares
    }

    fn edge(&self, bin: usize) -> f32 {
        (bin as f32 - (BINS / 2) as f32) * (self.limit / (BINS / 2) as f32)
    }

    /// Leaves out the share `tail` of the values at each end (to the resolution of a bin, outward).
    fn percentile(&self, tail: f64) -> (f32, f32) {
        let allowed = (tail * self.count as f64) as u64;
        let cut = |bins: &mut dyn Iterator<Item = (usize, u64)>| {
            let mut seen = 0;
            for (i, n) in bins {
                seen += n;
                if seen > allowed {
                    return i;
                }
            }
            BINS / 2
        };
        let low = cut(&mut self.bins.iter().copied().enumerate());
        let high = cut(&mut self.bins.iter().copied().enumerate().rev());
        (self.edge(low).clamp(self.min, 0.0), self.edge(high + 1).clamp(0.0, self.max))
    }

    /// Shrinks the two ends together, then each alone, as long as the squared error falls.
    fn least_squares(&self) -> (f32, f32) {
        let mut best = (self.min, self.max);
        let mut least = self.squared_error(best);
        let mut consider = |range: (f32, f32), best: &mut (f32, f32)| {
            let error = self.squared_error(range);
            if error < least {
                (least, *best) = (error, range);
            }
        };
        let shares: Vec<f32> = (5..100).map(|p| p as f32 / 100.0).collect();
        for s in &shares {
            consider((self.min * s, self.max * s), &mut best);
        }
        let (low, high) = best;
        for s in &shares {
            consider((low * s, high), &mut best);
        }
        let low = best.0;
        for s in &shares {
            consider((low, high * s), &mut best);
        }
        best
    }

    /// Shrinks both ends together as long as less is lost: the values beyond the ends, which move there, and the differences
    /// between values that share a step.
    fn most_telling(&self) -> (f32, f32) {
        if self.count == 0 {
            return (0.0, 0.0);
        }
        let ranges = (5..=100).rev().map(|p| (self.min * p as f32 / 100.0, self.max * p as f32 / 100.0));
        let loss = |range: &(f32, f32)| self.divergence(*range);
        let better = |a: (f64, (f32, f32)), b: (f64, (f32, f32))| if b.0 < a.0 { b } else { a };
        ranges.map(|r| (loss(&r), r)).reduce(better).map_or((self.min, self.max), |best| best.1)
    }

    /// Kullback-Leibler divergence of what the steps of a range tell from the distribution of the values, nats.
    fn divergence(&self, (low, high): (f32, f32)) -> f64 {
        let (first, last) = (self.bin(low), self.bin(high));
        let width = last - first + 1;
        // Beyond the ends, the values count for the last bin inside.
        let mut inside = self.bins[first..=last].to_vec();
        inside[0] += self.bins[..first].iter().sum::<u64>();
        inside[width - 1] += self.bins[last + 1..].iter().sum::<u64>();
        let levels = (STEPS as usize + 1).min(width);
        let (total, clipped) = (self.count as f64, self.bins[first..=last].iter().sum::<u64>() as f64);
        let mut sum = 0.0;
        for level in 0..levels {
            let of = level * width / levels..(level + 1) * width / levels;
            // Of the values inside of the range each step knows the sum alone, spread over the bins where any are.
            let known = self.bins[first + of.start..first + of.end].iter().sum::<u64>() as f64 / clipped;
            let used = inside[of.clone()].iter().filter(|n| **n > 0).count() as f64;
            for &n in inside[of].iter().filter(|n| **n > 0) {
                let p = n as f64 / total;
                sum += p * (p / (known / used).max(1e-12)).ln();
            }
        }
        sum
    }

    fn bin(&self, v: f32) -> usize {
        let per_unit = (BINS / 2) as f32 / self.limit;
        ((v * per_unit).floor() as i64 + (BINS / 2) as i64).clamp(0, BINS as i64 - 1) as usize
    }

    /// Expected squared error of a value, times the count: a step's variance inside of the range, the distance to
    /// the range outside.
    fn squared_error(&self, (low, high): (f32, f32)) -> f64 {
        let step = f64::from(high - low) / STEPS;
        let inside = step * step / 12.0;
        let half = f64::from(self.limit) / BINS as f64;
        let mut sum = 0.0;
        for (i, &n) in self.bins.iter().enumerate().filter(|(_, n)| **n > 0) {
            let x = f64::from(self.edge(i)) + half;
            let beyond = (f64::from(low) - x).max(x - f64::from(high)).max(0.0);
            sum += n as f64 * (if beyond > 0.0 { beyond * beyond } else { inside });
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A repeatable spread of values, denser at zero.
    fn values(n: u32, reach: f32) -> Vec<f32> {
        (0..n)
            .map(|i| {
                let u = i.wrapping_mul(2_654_435_761) as f32 / u32::MAX as f32 * 2.0 - 1.0;
                u * u * u * reach
            })
            .collect()
    }

    fn of(v: &[f32]) -> Histogram {
        let mut h = Histogram::default();
        h.add(v.iter().copied());
        h
    }

    #[test]
    fn extremes_are_exact_and_include_zero() {
        let v = values(10_000, 3.7);
        let lowest = v.iter().copied().fold(f32::MAX, f32::min);
        let highest = v.iter().copied().fold(f32::MIN, f32::max);
        assert_eq!(of(&v).range(Calibrator::MinMax), (lowest, highest));
        assert_eq!(of(&[2.0, 5.0]).extremes(), (0.0, 5.0));
        assert_eq!(of(&[-2.0, -5.0]).extremes(), (-5.0, 0.0));
    }

    #[test]
    fn shares_are_of_equal_parts_between_the_extremes() {
        let h = of(&(0..1000).map(|i| if i < 900 { -0.9 } else { 0.9 }).collect::<Vec<f32>>());
        let shares = h.shares(10);
        assert!((shares[0] - 0.9).abs() < 1e-9 && (shares[9] - 0.1).abs() < 1e-9, "{shares:?}");
        assert!((values_sum(&of(&values(5_000, 3.0)).shares(7)) - 1.0).abs() < 1e-9);
        assert_eq!(Histogram::default().shares(3), [0.0; 3]);
    }

    fn values_sum(v: &[f64]) -> f64 {
        v.iter().sum()
    }

    #[test]
    fn order_and_portions_do_not_matter() {
        let mut v = values(5_000, 1.0);
        v.extend(values(5_000, 900.0));
        let whole = of(&v);
        let mut pieces = Histogram::default();
        v.chunks(37).for_each(|c| pieces.add(c.iter().copied()));
        let mut reversed = v.clone();
        reversed.reverse();
        assert_eq!(whole.bins, pieces.bins);
        assert_eq!(whole.bins, of(&reversed).bins);
        assert_eq!(whole.count(), 10_000);
        assert_eq!(whole.bins.iter().sum::<u64>(), 10_000);
    }

    #[test]
    fn percentile_is_that_of_the_sorted_values_within_a_bin() {
        let mut v = values(100_000, 8.0);
        v[17] = 500.0;
        let h = of(&v);
        let (low, high) = h.range(Calibrator::Percentile);
        v.sort_by(f32::total_cmp);
        let bin = h.limit / (BINS / 2) as f32;
        assert!((low - v[5]).abs() <= bin, "{low} {} bin {bin}", v[5]);
        assert!((high - v[v.len() - 6]).abs() <= bin, "{high} {} bin {bin}", v[v.len() - 6]);
    }

    #[test]
    fn least_squares_clips_a_lone_outlier_and_keeps_a_flat_spread() {
        let mut v: Vec<f32> = (0..100_000).map(|i| (i % 1000) as f32 / 1000.0).collect();
        let (_, high) = of(&v).range(Calibrator::Mse);
        assert!(high > 0.98, "{high}");
        v[5] = 4.0;
        let (_, high) = of(&v).range(Calibrator::Mse);
        assert!(high < 3.9, "{high}");
        assert!(high >= 0.99, "{high}");
    }

    #[test]
    fn the_moving_average_forgets_an_outlier_of_one_picture() {
        let mut h = Histogram::default();
        h.add([100.0, -1.0].into_iter());
        (0..60).for_each(|_| h.add([2.0, -1.0].into_iter()));
        let (low, high) = h.range(Calibrator::MovingAverage);
        assert!((low + 1.0).abs() < 1e-5 && (2.0..3.0).contains(&high), "{low} {high}");
        // Pictures alike: as min-max.
        let mut h = Histogram::default();
        (0..9).for_each(|_| h.add([2.0, -1.0].into_iter()));
        assert_eq!(h.range(Calibrator::MovingAverage), h.range(Calibrator::MinMax));
    }

    #[test]
    fn entropy_clips_a_lone_outlier_and_keeps_a_flat_spread() {
        let flat: Vec<f32> = (0..100_000).map(|i| (i % 1000) as f32 / 1000.0).collect();
        let (_, high) = of(&flat).range(Calibrator::Entropy);
        assert!(high > 0.9, "{high}");
        let mut v = flat;
        v[5] = 9.0;
        let (_, high) = of(&v).range(Calibrator::Entropy);
        assert!((0.9..2.0).contains(&high), "{high}");
    }

    #[test]
    fn what_is_not_finite_is_counted_only() {
        let h = of(&[1.0, f32::NAN, f32::INFINITY, -1.0]);
        assert_eq!((h.count(), h.not_finite(), h.extremes()), (2, 2, (-1.0, 1.0)));
    }

    #[test]
    fn nothing_seen_is_an_empty_range() {
        for c in Calibrator::ALL {
            assert_eq!(Histogram::default().range(c), (0.0, 0.0));
        }
    }
}
