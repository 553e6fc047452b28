//! NumPy's `.npy` files with float32 arrays.

use crate::error::{Error, Result};
use crate::files::{map, write_atomic};
use ndarray::ArrayD;
use ndarray_npy::{ReadNpyExt, WriteNpyExt};
use std::path::Path;

/// Reads a float32 array.
///
/// # Errors
/// [`Error::Read`]; [`Error::Usage`] when it is no `.npy` file or not float32.
pub fn read(path: &Path) -> Result<ArrayD<f32>> {
    let bytes = map(path)?;
    ArrayD::<f32>::read_npy(bytes.as_ref()).map_err(|e| Error::Usage {
        what: format!("{}: no .npy file with a float32 array: {e}", path.display()),
        hint: "write it with: numpy.save(PATH, array.astype('float32'))".into(),
    })
}

/// Writes a float32 array, whole or not at all.
///
/// # Errors
/// [`Error::Write`].
pub fn write(path: &Path, array: &ArrayD<f32>) -> Result<()> {
    let mut bytes = vec![];
    let written = array.as_standard_layout().write_npy(&mut bytes);
    written.map_err(|e| Error::Write { path: path.into(), source: std::io::Error::other(e) })?;
    write_atomic(path, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_wrong_types() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.npy");
        let array = ArrayD::from_shape_fn(ndarray::IxDyn(&[2, 3]), |i| (i[0] * 3 + i[1]) as f32);
        write(&path, &array).unwrap();
        assert_eq!(read(&path).unwrap(), array);
        ndarray_npy::write_npy(&path, &array.mapv(f64::from)).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("float32"));
        std::fs::write(&path, "text").unwrap();
        assert!(read(&path).is_err());
        std::fs::write(&path, "").unwrap();
        assert!(read(&path).is_err());
    }
}
