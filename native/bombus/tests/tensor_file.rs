//! Safetensors files from outside: whatever the bytes, an error or the tensors, never a panic.

#![allow(clippy::unwrap_used)]

use bombus::error::Error;
use bombus::files::safetensors::TensorFile;
use proptest::prelude::*;
use std::io::{Seek, Write};

fn write(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

const HEADER: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U32","shape":[1,1],"data_offsets":[8,12]}}"#;

/// Opens the bytes as a file and reads every tensor.
fn read_all(bytes: &[u8]) -> Result<usize, Error> {
    let written = write(bytes);
    let file = TensorFile::open(written.path())?;
    let mut total = 0;
    for name in file.names() {
        total += file.tensor(&name).map_or(Ok(0), |tensor| tensor.read().map(|read| read.len()))?;
    }
    Ok(total)
}

#[test]
fn tensors_are_found_with_their_shapes() {
    let written = write(&file(HEADER, &[7; 12]));
    let file = TensorFile::open(written.path()).unwrap();
    let b = file.tensor("b").unwrap();
    assert_eq!((&*b.shape, b.read().unwrap()), (&[1, 1][..], vec![7; 4]));
    assert!(file.tensor("c").is_none());
}

#[test]
fn a_file_that_changes_after_it_was_opened_is_an_error() {
    for change in [
        |file: &std::fs::File| file.set_len(0),
        |file: &std::fs::File| file.set_len(1 << 20),
        |mut file: &std::fs::File| {
            // Files are stamped to a tick of the clock.
            std::thread::sleep(std::time::Duration::from_millis(20));
            file.rewind()?;
            file.write_all(&[1; 8])
        },
    ] {
        let written = write(&file(HEADER, &[7; 12]));
        let file = TensorFile::open(written.path()).unwrap();
        let tensor = file.tensor("a").unwrap();
        assert_eq!(tensor.read().unwrap(), [7; 8]);
        change(written.as_file()).unwrap();
        let error = tensor.read().unwrap_err().to_string();
        assert!(error.contains("changed while"), "{error}");
    }
}

proptest! {
    #[test]
    fn random_bytes_are_no_file(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        // Only an empty header makes a file of so few random bytes.
        if let Ok(total) = read_all(&bytes) {
            prop_assert_eq!(total, 0);
        }
    }

    #[test]
    fn a_changed_byte_never_panics(place in 0usize..200, value in any::<u8>()) {
        let mut bytes = file(HEADER, &[7; 12]);
        let place = place % bytes.len();
        bytes[place] = value;
        if let Ok(total) = read_all(&bytes) {
            prop_assert!(total <= 12);
        }
    }

    #[test]
    fn offsets_never_reach_outside(start in any::<u64>(), end in any::<u64>(), size in any::<u64>()) {
        let header = format!(
            r#"{{"a":{{"dtype":"F32","shape":[{size}],"data_offsets":[{start},{end}]}}}}"#
        );
        let fits = start == 0 && end == 8 && size == 2;
        prop_assert_eq!(read_all(&file(&header, &[7; 8])).is_ok(), fits);
    }
}
