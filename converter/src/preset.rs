//! Ways to turn pictures into input tensors, by name.

use serde::Deserialize;
use std::path::Path;
use vedge_runtime::model::card::{Channels, Filter, Fit, Preprocess};
use vedge_runtime::{Error, Result, files};

/// A named way of preprocessing; the size comes from the model.
pub struct Preset {
    /// What the user types.
    pub name: &'static str,
    /// Which models use it.
    pub about: &'static str,
    fit: Fit,
    filter: Filter,
    mean: [f32; 3],
    std: [f32; 3],
    channels: Channels,
}

const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

const fn preset(name: &'static str, about: &'static str, crop: f32, filter: Filter) -> Preset {
    let fit = Fit::Crop { crop };
    Preset { name, about, fit, filter, mean: IMAGENET_MEAN, std: IMAGENET_STD, channels: Channels::Rgb }
}

/// All presets.
pub const PRESETS: [Preset; 9] = [
    preset("imagenet", "DINOv2 and many others: 224 of 256, bicubic, ImageNet mean and std", 0.875, Filter::Bicubic),
    preset("torchvision", "torchvision: 224 of 256, bilinear, ImageNet mean and std", 0.875, Filter::Bilinear),
    preset("deit", "timm DeiT, Swin: 90 % crop, bicubic, ImageNet mean and std", 0.9, Filter::Bicubic),
    Preset {
        mean: [0.5; 3],
        std: [0.5; 3],
        ..preset("timm-vit", "timm ViT (AugReg): 90 % crop, bicubic, mean and std 0.5", 0.9, Filter::Bicubic)
    },
    Preset {
        fit: Fit::Squash,
        mean: [0.5; 3],
        std: [0.5; 3],
        ..preset("half", "Hugging Face ViT: whole picture squashed, bilinear, mean and std 0.5", 1.0, Filter::Bilinear)
    },
    Preset {
        mean: [0.0; 3],
        std: [1.0; 3],
        ..preset("timm-mobilevit", "timm MobileViT: 90 % crop, bicubic, 0 to 1", 0.9, Filter::Bicubic)
    },
    Preset {
        mean: [0.0; 3],
        std: [1.0; 3],
        channels: Channels::Bgr,
        ..preset("hf-mobilevit", "Hugging Face MobileViT: 256 of 288, bilinear, 0 to 1, BGR", 0.8889, Filter::Bilinear)
    },
    Preset {
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        ..preset("clip", "CLIP: full crop, bicubic, CLIP mean and std", 1.0, Filter::Bicubic)
    },
    Preset {
        fit: Fit::Squash,
        mean: [0.0; 3],
        std: [1.0; 3],
        ..preset("unit", "whole picture squashed, bilinear, 0 to 1", 1.0, Filter::Bilinear)
    },
];

/// A preprocessing file: the card's `preprocess`, height and width optional.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    height: Option<usize>,
    width: Option<usize>,
    fit: Fit,
    filter: Filter,
    mean: [f32; 3],
    std: [f32; 3],
    #[serde(default)]
    channels: Channels,
}

/// What `--preprocess` names: a preset, or a JSON file when it ends in `.json`. `size` is the model's height and width.
///
/// # Errors
/// [`Error::Usage`] for an unknown preset (listing all, the nearest first), a damaged file, one for another size,
/// or values that cannot be.
pub fn resolve(name: &str, size: (usize, usize)) -> Result<Preprocess> {
    let (height, width) = size;
    if name.ends_with(".json") {
        return from_file(Path::new(name), size);
    }
    match PRESETS.iter().find(|p| p.name == name) {
        Some(p) => Ok(Preprocess {
            height,
            width,
            fit: p.fit,
            filter: p.filter,
            mean: p.mean,
            std: p.std,
            channels: p.channels,
        }),
        None => {
            let names = nearest_first(name, PRESETS.iter().map(|p| p.name));
            Err(Error::Usage {
                what: format!("unknown preprocess preset `{name}`"),
                hint: format!("one of {}, or a file ending in .json", names.join(", ")),
            })
        }
    }
}

/// The error for a model whose preprocessing nobody named.
pub fn missing() -> Error {
    let names = PRESETS.map(|p| p.name);
    Error::Usage {
        what: "how pictures become the model's input is not known: the model has no card".into(),
        hint: format!("add --preprocess, one of {}, or a file ending in .json", names.join(", ")),
    }
}

fn from_file(path: &Path, (height, width): (usize, usize)) -> Result<Preprocess> {
    let usage =
        |what: String, hint: &str| Error::Usage { what: format!("{}: {what}", path.display()), hint: hint.into() };
    let f: File = serde_json::from_slice(&files::map(path)?).map_err(|e| {
        usage(
            e.to_string(),
            r#"expected is {"fit": {"crop": {"crop": 0.9}} or "squash" or "letterbox", "filter": "bilinear" or "bicubic", "mean": [r, g, b], "std": [r, g, b]}"#,
        )
    })?;
    if (f.height.unwrap_or(height), f.width.unwrap_or(width)) != (height, width) {
        let of = format!("is for {}x{} pixels", f.height.unwrap_or(height), f.width.unwrap_or(width));
        return Err(usage(format!("{of}, the model takes {height}x{width}"), "leave height and width out of the file"));
    }
    let p = Preprocess { height, width, fit: f.fit, filter: f.filter, mean: f.mean, std: f.std, channels: f.channels };
    check(&p).map_err(|what| usage(what, ""))?;
    Ok(p)
}

/// Whether the values can be: a positive std, a crop in (0, 1].
///
/// # Errors
/// What is wrong.
pub fn check(p: &Preprocess) -> Result<(), String> {
    if p.std.iter().any(|s| !s.is_finite() || *s <= 0.0) {
        return Err(format!("std {:?} must be positive", p.std));
    }
    if p.mean.iter().any(|m| !m.is_finite()) {
        return Err(format!("mean {:?} must be finite", p.mean));
    }
    match p.fit {
        Fit::Crop { crop } if !(crop > 0.0 && crop <= 1.0) => Err(format!("crop {crop} must be above 0, at most 1")),
        _ => Ok(()),
    }
}

/// Names by their distance to what was typed.
pub fn nearest_first<'a>(typed: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut names: Vec<&str> = names.collect();
    names.sort_by_key(|n| distance(typed, n));
    names
}

/// Number of letters to insert, drop or change to get from one word to the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = (corner + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            corner = std::mem::replace(&mut row[j + 1], cost);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_preset_names_the_nearest_first() {
        let e = resolve("imagnet", (224, 224)).unwrap_err();
        assert!(e.to_string().contains("`imagnet`"));
        assert!(e.hint().unwrap().starts_with("one of imagenet, "), "{:?}", e.hint());
        assert!(PRESETS.iter().all(|p| e.hint().unwrap().contains(p.name)));
    }

    #[test]
    fn presets_are_valid_and_unique() {
        for (i, p) in PRESETS.iter().enumerate() {
            check(&resolve(p.name, (224, 224)).unwrap()).unwrap();
            assert!(PRESETS[..i].iter().all(|q| q.name != p.name));
        }
    }

    #[test]
    fn a_file_takes_the_models_size_and_refuses_another() {
        let dir = tempfile::tempdir().unwrap();
        let write = |json: &str| {
            let path = dir.path().join("p.json");
            std::fs::write(&path, json).unwrap();
            resolve(path.to_str().unwrap(), (64, 64))
        };
        let base = r#""fit":{"crop":{"crop":0.5}},"filter":"bicubic","mean":[0,0,0],"std":[1,1,1]"#;
        let p = write(&format!("{{{base}}}")).unwrap();
        assert_eq!((p.height, p.width, p.fit), (64, 64, Fit::Crop { crop: 0.5 }));
        let e = write(&format!(r#"{{"height":32,{base}}}"#)).unwrap_err();
        assert!(e.to_string().contains("is for 32x64 pixels, the model takes 64x64"), "{e}");
        assert!(write(&format!(r#"{{"colour":1,{base}}}"#)).unwrap_err().to_string().contains("colour"));
        assert!(write(&format!("{{{}}}", base.replace("0.5", "1.5"))).unwrap_err().to_string().contains("crop 1.5"));
        assert!(write("{").is_err());
    }

    #[test]
    fn distances() {
        assert_eq!(distance("half", "half"), 0);
        assert_eq!(distance("hlaf", "half"), 2);
        assert_eq!(distance("", "unit"), 4);
    }
}
