//! What the board must know, inside the ONNX file: JSON under the metadata key [`KEY`].

use crate::error::{Error, Result};
use crate::onnx::Graph;
use serde::{Deserialize, Serialize};

/// Key in the ONNX file's `metadata_props`.
pub const KEY: &str = "vedge.card";
/// Version of the card's JSON that this build writes; it reads this one and older ones.
pub const VERSION: u32 = 1;

/// Everything about a converted model that is not in its graph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// Version of this JSON, [`VERSION`].
    pub version: u32,
    /// Name of the model, usually the source file's stem.
    pub name: String,
    /// Architecture as recognised: `vit`, `deit`, `swin`, `mobilevit`, … or `unknown`.
    pub architecture: String,
    /// How a picture becomes the input tensor.
    pub preprocess: Preprocess,
    /// What the output means.
    pub output: OutputKind,
    /// Label of each class index; may be empty (then indices are shown).
    #[serde(default)]
    pub labels: Vec<String>,
    /// `fp32`, `fp16` or `int8`.
    pub precision: String,
    /// How activations of integer layers are quantized.
    #[serde(default)]
    pub activations: Activations,
    /// Where the model came from and what was done to it.
    pub provenance: Provenance,
    /// Accuracy as measured at conversion, where pictures were given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Accuracy>,
    /// How far its probabilities can be believed, fitted on pictures at conversion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certainty: Option<Certainty>,
    /// Expected output for a known input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub self_test: Option<SelfTest>,
}

/// Picture to tensor. The result is float32 `[1, 3, height, width]`, `(x / 255 - mean) / std` per channel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preprocess {
    /// Input height in pixels.
    pub height: usize,
    /// Input width in pixels.
    pub width: usize,
    /// How the picture is fitted.
    pub fit: Fit,
    /// Resampling filter, antialiased when shrinking, as Pillow and timm do.
    pub filter: Filter,
    /// Mean per channel (red, green, blue), in units of 0…1.
    pub mean: [f32; 3],
    /// Standard deviation per channel, in units of 0…1; positive.
    pub std: [f32; 3],
    /// Order of the channels the model expects.
    #[serde(default)]
    pub channels: Channels,
}

/// How a picture of any size becomes height × width.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// Shorter edge to `floor(size / crop)`, then the centre; `crop` in (0, 1], as timm's `crop_pct`.
    Crop {
        /// Share of the resized shorter edge that is kept.
        crop: f32,
    },
    /// Both edges to the size, aspect ratio not kept.
    Squash,
    /// Whole picture inside, the rest filled with the mean colour.
    Letterbox,
}

/// Resampling filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Triangle.
    Bilinear,
    /// Catmull-Rom, a = −0.5, as Pillow.
    Bicubic,
}

/// Order of the colour channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channels {
    /// Red, green, blue.
    #[default]
    Rgb,
    /// Blue, green, red.
    Bgr,
}

/// What the classifier's output holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputKind {
    /// Name of the graph output to read.
    pub name: String,
    /// `logits`, `probabilities` or `features`.
    pub kind: String,
}

/// How activations of integer layers are quantized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activations {
    /// Float, or by the QuantizeLinear nodes in the graph.
    #[default]
    Static,
    /// A scale for each row, found while it is packed: layers whose weights come from DequantizeLinear run in
    /// integers although the graph has no QuantizeLinear on their input.
    PerToken,
}

/// Where a model came from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// File name of the source model.
    pub source: String,
    /// SHA-256 of the source model, hexadecimal.
    pub sha256: String,
    /// `vedge` version that converted it.
    pub tool: String,
    /// Passes in order, one line each on what they did.
    pub passes: Vec<String>,
    /// Calibration pictures: how many, and the SHA-256 over their bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationData>,
}

/// Pictures used for calibration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalibrationData {
    /// How many pictures.
    pub pictures: usize,
    /// SHA-256 over the pictures' bytes in the order used.
    pub sha256: String,
}

/// Accuracy measured at conversion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// On which pictures, in words.
    #[serde(default)]
    pub measured_on: String,
    /// How many pictures.
    pub pictures: usize,
    /// Share of right first answers of the float model, 0…1.
    pub float_top1: f32,
    /// Share of right first answers of this model, 0…1.
    pub top1: f32,
    /// Share of pictures on which both say the same, 0…1.
    pub agreement: f32,
    /// Signal-to-noise ratio of the logits against the float model's, dB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sqnr_db: Option<f32>,
}

/// From scores to probabilities that come true, and the edge of what the model knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certainty {
    /// What logits are divided by before they become probabilities (Guo et al. 2017, arXiv:1706.04599); positive.
    pub temperature: f32,
    /// What it was fitted to.
    pub fitted_to: FittedTo,
    /// On how many pictures.
    pub pictures: usize,
    /// Expected calibration error on these pictures, 0…1, without the temperature and with it; absent without labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration_error: Option<[f32; 2]>,
    /// Beyond these a picture is unlike those pictures.
    pub limits: Limits,
}

/// What probabilities were made to agree with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FittedTo {
    /// How often answers were right.
    Labels,
    /// The float model's probabilities: which answers are right was not known.
    FloatModel,
}

/// Edges of what calibration pictures showed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Share of these pictures beyond each of energy and confidence, 0…1.
    pub share: f32,
    /// Highest energy, see [`crate::classify::Scores::energy`]; absent where the model gives probabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<f32>,
    /// Lowest probability of the best class, 0…1.
    pub confidence: f32,
    /// How the pictures looked; absent with too few of them, and in files of versions before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub looks: Option<Looks>,
}

/// How calibration pictures looked, by the numbers of [`crate::appearance::of`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Looks {
    /// Mean of each number.
    pub mean: Vec<f32>,
    /// Inverse of their covariance, row by row.
    pub inverse: Vec<Vec<f32>>,
    /// Farthest Mahalanobis distance from the mean.
    pub distance: f32,
    /// Share of these pictures that are farther, where others tell mean and covariance, 0…1.
    pub share: f32,
}

/// Output of the model for the input that [`SelfTest::input`] generates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SelfTest {
    /// Seed of the input: element i is a hash of seed + i, uniform in −1…1.
    pub seed: u64,
    /// The whole output.
    pub logits: Vec<f32>,
    /// Lowest cosine similarity that passes on another CPU.
    pub min_cosine: f32,
}

impl SelfTest {
    /// The self-test's input for a shape: SplitMix64 of seed + i, top 24 bits, to −1…1.
    pub fn input(seed: u64, elements: usize) -> Vec<f32> {
        (0..elements as u64)
            .map(|i| {
                let mut x = seed.wrapping_add(i).wrapping_add(0x9E37_79B9_7F4A_7C15);
                x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                x ^= x >> 31;
                (x >> 40) as f32 / 8_388_608.0 - 1.0
            })
            .collect()
    }
}

impl Card {
    /// The card of a model file; `None` when it has none (it was not written by `vedge convert`).
    ///
    /// # Errors
    /// [`Error::BadModel`] when the card is damaged or of a newer version.
    pub fn of(graph: &Graph) -> Result<Option<Card>> {
        let Some(json) = graph.metadata(KEY) else { return Ok(None) };
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let bad = |e: serde_json::Error| Error::BadModel(format!("the model's card ({KEY}) is damaged: {e}"));
        let v: Version = serde_json::from_str(json).map_err(bad)?;
        if v.version > VERSION {
            return Err(Error::Unsupported {
                what: format!("the model's card has version {}, this build reads up to {VERSION}", v.version),
                hint: "update vedge-run on the board, or convert the model again with this version".into(),
            });
        }
        serde_json::from_str(json).map(Some).map_err(bad)
    }

    /// Puts the card into the model.
    pub fn embed(&self, graph: &mut Graph) {
        graph.set_metadata(KEY, serde_json::to_string(self).expect("a card has only plain data"));
    }

    /// Label of a class, or its index where the model has no label for it.
    pub fn label(&self, index: usize) -> String {
        self.labels.get(index).cloned().unwrap_or_else(|| index.to_string())
    }
}
