//! Labelled pictures: `DIR/<class>/<picture>`.

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use vedge_runtime::error::counted;
use vedge_runtime::{Error, Result};

/// File name extensions that are taken for pictures, lower case.
pub const EXTENSIONS: [&str; 3] = ["jpeg", "jpg", "png"];

/// One labelled picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Where it is.
    pub path: PathBuf,
    /// Its class, an index into [`Dataset::labels`].
    pub class: usize,
}

/// A folder of class folders. The class index is the position of the folder's name in the sorted list of names
/// (plain byte order, so `10_x` comes before `2_x`), or in the labels given.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// Label of each class index.
    pub labels: Vec<String>,
    /// All pictures, by class, then by file name.
    pub items: Vec<Item>,
    /// Files in the class folders that are no pictures by their extension.
    pub ignored: usize,
}

impl Dataset {
    /// Lists a folder. With `labels` (the model's), a folder's class is the label of the same name; where no
    /// folder has the name of a label, the numbers of folders and labels must be equal and their order is the link.
    ///
    /// # Errors
    /// [`Error::Read`] when a folder cannot be read; [`Error::Usage`] when there is no class folder, no picture,
    /// or the folders do not fit the labels.
    pub fn open(dir: &Path, labels: Option<&[String]>) -> Result<Dataset> {
        let mut classes = BTreeMap::new();
        let mut loose = 0;
        for path in list(dir)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match (path.is_dir(), name.starts_with('.')) {
                (true, false) => drop(classes.insert(name, path)),
                (false, false) => loose += usize::from(is_picture(&path)),
                _ => {}
            }
        }
        if classes.is_empty() {
            return Err(Error::Usage {
                what: match loose {
                    0 => format!("{} is empty: no class folders", dir.display()),
                    n => format!("{} holds {} but no class folders", dir.display(), counted(n, "picture")),
                },
                hint: "expected is DIR/<class>/<picture>, one folder for each class".into(),
            });
        }
        let names: Vec<String> = classes.keys().cloned().collect();
        let labels = labels.filter(|l| !l.is_empty());
        let index = match labels {
            None => (0..names.len()).collect(),
            Some(labels) => link(dir, &names, labels)?,
        };
        let mut set = Dataset { labels: labels.map_or(names, <[_]>::to_vec), items: vec![], ignored: 0 };
        for (folder, class) in classes.values().zip(index) {
            for path in list(folder)? {
                match is_picture(&path) {
                    true => set.items.push(Item { path, class }),
                    false => set.ignored += 1,
                }
            }
        }
        set.items.sort_by(|a, b| (a.class, &a.path).cmp(&(b.class, &b.path)));
        if set.items.is_empty() {
            return Err(Error::Usage {
                what: format!("no pictures in the {} class folders of {}", classes.len(), dir.display()),
                hint: format!("pictures are files ending in {}", EXTENSIONS.map(|e| format!(".{e}")).join(", ")),
            });
        }
        Ok(set)
    }

    /// At most `count` pictures, spread evenly over the classes and over each class's files; always the same ones.
    /// Classes take turns in the result, so that any beginning of it is balanced too.
    pub fn pick(&self, count: usize) -> Vec<Item> {
        let mut by_class: BTreeMap<usize, Vec<&Item>> = BTreeMap::new();
        for i in &self.items {
            by_class.entry(i.class).or_default().push(i);
        }
        let mut quota: BTreeMap<usize, usize> = by_class.keys().map(|&c| (c, 0)).collect();
        let mut left = count.min(self.items.len());
        while left > 0 {
            for (class, q) in &mut quota {
                if left > 0 && *q < by_class[class].len() {
                    *q += 1;
                    left -= 1;
                }
            }
        }
        let rounds = quota.values().copied().max().unwrap_or(0);
        let chosen = |round: usize| {
            let (by_class, quota) = (&by_class, &quota);
            by_class.iter().filter(move |(c, _)| round < quota[c]).map(move |(c, items)| {
                let at = round * items.len() / quota[c];
                items[at].clone()
            })
        };
        (0..rounds).flat_map(chosen).collect()
    }
}

/// SHA-256 over the bytes of pictures in the order given, hexadecimal.
///
/// # Errors
/// [`Error::Read`].
pub fn fingerprint(items: &[Item]) -> Result<String> {
    let mut hash = Sha256::new();
    for i in items {
        hash.update(fs::read(&i.path).map_err(|source| Error::Read { path: i.path.clone(), source })?);
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// Class index of each folder name.
fn link(dir: &Path, names: &[String], labels: &[String]) -> Result<Vec<usize>> {
    let at: Vec<Option<usize>> = names.iter().map(|n| labels.iter().position(|l| l == n)).collect();
    if at.iter().all(Option::is_none) {
        if names.len() == labels.len() {
            return Ok((0..names.len()).collect());
        }
        return Err(Error::Usage {
            what: format!(
                "{} has {} class folders (`{}`, …), the model has {} labels (`{}`, …)",
                dir.display(),
                names.len(),
                names[0],
                labels.len(),
                labels[0]
            ),
            hint: "name the folders as the model's labels: vedge inspect MODEL shows them".into(),
        });
    }
    let strangers: Vec<&str> = names.iter().zip(&at).filter(|(_, a)| a.is_none()).map(|(n, _)| n.as_str()).collect();
    match strangers.first() {
        None => Ok(at.into_iter().flatten().collect()),
        Some(first) => Err(Error::Usage {
            what: format!(
                "{} of the {} class folders of {} are no labels of the model: `{first}`, …",
                strangers.len(),
                names.len(),
                dir.display()
            ),
            hint: "name the folders as the model's labels: vedge inspect MODEL shows them".into(),
        }),
    }
}

fn is_picture(path: &Path) -> bool {
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    EXTENSIONS.contains(&extension.as_str())
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let read = |source| Error::Read { path: dir.into(), source };
    let mut paths =
        fs::read_dir(dir).and_then(|d| d.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>()).map_err(read)?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(classes: &[(&str, usize)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (class, n) in classes {
            fs::create_dir(dir.path().join(class)).unwrap();
            for i in 0..*n {
                fs::write(dir.path().join(class).join(format!("{i:03}.png")), [i as u8]).unwrap();
            }
        }
        dir
    }

    #[test]
    fn classes_are_sorted_names() {
        let dir = folder(&[("b", 2), ("10_x", 1), ("2_x", 1)]);
        fs::write(dir.path().join("b/notes.txt"), "x").unwrap();
        let set = Dataset::open(dir.path(), None).unwrap();
        assert_eq!(set.labels, ["10_x", "2_x", "b"]);
        assert_eq!(set.items.iter().map(|i| i.class).collect::<Vec<_>>(), [0, 1, 2, 2]);
        assert_eq!(set.ignored, 1);
    }

    #[test]
    fn labels_decide_the_index_by_name_then_by_order() {
        let dir = folder(&[("cat", 1), ("dog", 1)]);
        let labels = |l: &[&str]| l.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let classes = |l: &[&str]| {
            let set = Dataset::open(dir.path(), Some(&labels(l)))?;
            Ok::<_, Error>(set.items.iter().map(|i| (i.path.parent().unwrap().ends_with("cat"), i.class)).collect())
        };
        let by_name: Vec<(bool, usize)> = classes(&["dog", "bird", "cat"]).unwrap();
        assert_eq!(by_name, [(false, 0), (true, 2)]);
        let by_order: Vec<(bool, usize)> = classes(&["Felis", "Canis"]).unwrap();
        assert_eq!(by_order, [(true, 0), (false, 1)]);
        assert!(classes(&["cat", "bird"]).unwrap_err().to_string().contains("`dog`"));
        assert!(classes(&["a", "b", "c"]).unwrap_err().to_string().contains("2 class folders"));
    }

    #[test]
    fn picks_are_even_and_repeatable() {
        let dir = folder(&[("a", 100), ("b", 3), ("c", 100)]);
        let set = Dataset::open(dir.path(), None).unwrap();
        let picked = set.pick(21);
        assert_eq!(picked, set.pick(21));
        let count = |c| picked.iter().filter(|i| i.class == c).count();
        assert_eq!([count(0), count(1), count(2)], [9, 3, 9]);
        assert_eq!(picked[..6].iter().map(|i| i.class).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2]);
        let last = picked.iter().rfind(|i| i.class == 0).unwrap();
        assert!(last.path.ends_with("a/088.png"), "{last:?}");
        assert_eq!(set.pick(1000).len(), 203);
        let unique: std::collections::BTreeSet<_> = picked.iter().map(|i| &i.path).collect();
        assert_eq!(unique.len(), 21);
    }

    #[test]
    fn empty_folders_are_errors() {
        let none = folder(&[]);
        assert!(Dataset::open(none.path(), None).unwrap_err().to_string().contains("no class folders"));
        let empty = folder(&[("a", 0), ("b", 0)]);
        assert!(Dataset::open(empty.path(), None).unwrap_err().to_string().contains("no pictures in the 2"));
        let flat = folder(&[]);
        fs::write(flat.path().join("x.JPG"), "x").unwrap();
        assert!(Dataset::open(flat.path(), None).unwrap_err().to_string().contains("1 picture but no class"));
        assert!(Dataset::open(&flat.path().join("missing"), None).unwrap_err().to_string().contains("missing"));
    }
}
