//! Small arithmetic of the report: confidence intervals, quantiles, data URIs.

use serde::Serialize;

/// A share of pictures with its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    /// Pictures for which it holds.
    pub count: usize,
    /// Pictures in all.
    pub of: usize,
    /// `count / of`, 0…1.
    pub value: f64,
    /// Lower end of the interval, 0…1.
    pub low: f64,
    /// Upper end of the interval, 0…1.
    pub high: f64,
}

impl Share {
    /// The share and Wilson's score interval (Wilson 1927), which stays inside of 0…1 and is right for few pictures and for
    /// shares near the ends too.
    pub fn of(count: usize, of: usize) -> Share {
        const Z: f64 = 1.959_963_984_540_054;
        if of == 0 {
            return Share { count, of, value: 0.0, low: 0.0, high: 1.0 };
        }
        let n = of as f64;
        let p = count as f64 / n;
        let middle = p + Z * Z / (2.0 * n);
        let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
        let scale = 1.0 + Z * Z / n;
        let [low, high] = [middle - half, middle + half].map(|v| (v / scale).clamp(0.0, 1.0));
        Share { count, of, value: p, low, high }
    }
}

/// The value below which a share of the sorted values lies; NaN of none.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((share * last as f64).round() as usize).copied().unwrap_or(f64::NAN)
}

/// RFC 4648, with padding.
pub fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - three.len()));
        for i in 0..4 {
            let letter = LETTERS[(word >> (18 - 6 * i) & 63) as usize];
            text.push(if i <= three.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilsons_interval_is_that_of_the_textbook() {
        // 10 of 100: 5.52 % to 17.44 % (Newcombe 1998, method 3).
        let s = Share::of(10, 100);
        assert!((s.low - 0.0552).abs() < 1e-4 && (s.high - 0.1744).abs() < 1e-4, "{s:?}");
        // All of them right is no proof of perfection.
        let s = Share::of(32, 32);
        assert!((s.low - 0.8928).abs() < 1e-3 && s.high == 1.0, "{s:?}");
        let none = Share::of(0, 0);
        assert_eq!((none.low, none.high), (0.0, 1.0));
    }

    #[test]
    fn base64_of_every_length() {
        // The test vectors of RFC 4648.
        let pairs = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (plain, coded) in pairs {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn quantiles() {
        let v: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!((quantile(&v, 0.0), quantile(&v, 0.95), quantile(&v, 1.0)), (0.0, 95.0, 100.0));
        assert!(quantile(&[], 0.5).is_nan());
    }
}
