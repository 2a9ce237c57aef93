//! What must hold of the places a repository may be at; see `crate::fuzz`. Whatever does not hold is
//! a panic.
#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a property that does not hold is a panic, and nothing but tests calls this"
)]

use super::Place;
use super::name::ObjectName;
use super::options::{Addressing, Checksum, ServerSideEncryption};

/// A place that is understood names what the text says; an option's value is written as it was read.
pub(crate) fn place(text: &str) {
    match Place::parse(text) {
        Ok(Place::S3 { bucket, prefix }) => {
            assert!(!bucket.is_empty() && text.starts_with(&format!("s3://{bucket}")));
            assert!(prefix.is_empty() || ObjectName::new(prefix).is_ok());
        }
        Ok(Place::Directory(root)) => {
            let root = root.to_str().expect("it came from text");
            assert!(!root.is_empty() && text.ends_with(root));
        }
        Ok(Place::Memory) => assert_eq!(text, "memory:"),
        Err(error) => assert!(error.hint_text().is_some()),
    }
    if let Ok(value) = text.parse::<Addressing>() {
        assert_eq!(value.to_string(), text);
    }
    if let Ok(value) = text.parse::<Checksum>() {
        assert_eq!(value.to_string(), text);
    }
    if let Ok(value) = text.parse::<ServerSideEncryption>() {
        assert_eq!(value.to_string().parse::<ServerSideEncryption>().ok(), Some(value));
    }
}
