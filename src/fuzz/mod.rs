//! What must hold of every decoder, whatever bytes it is given: one function a fuzz target.
//!
//! The functions are called by libFuzzer (`fuzz/`, run by `tools/fuzz`) and by the ordinary test
//! that replays the kept inputs (`tests/it/fuzz_corpus.rs`); nothing else calls them, so the linker
//! leaves them out of the program. A property that does not hold is a panic. What is private to a
//! module is reached through that module's own `fuzz.rs`.
//!
//! # Shape
//! An input begins with the few bytes that choose how the rest is given to the decoder (sizes of
//! the pieces, PostgreSQL's major version, flags; `input`), where there is something to choose;
//! the rest is what the decoder sees.
#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a property that does not hold is a panic; nothing but tests calls this, on small inputs"
)]

mod base;
mod config;
mod input;
mod pg;
mod repo;
mod restore;
mod wal;

pub use wal::{mend_wal, wal_of_pages, wal_of_records};

use crate::wire;
use input::Input;

/// A decoder and what must hold of it.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name: that of its folders below `fuzz/corpus` and `fuzz/regressions`.
    pub name: &'static str,
    /// Longest input that libFuzzer makes for it, bytes.
    pub input_bytes_max: usize,
    /// Panics when something does not hold.
    pub run: fn(&[u8]),
}

const fn target(name: &'static str, input_bytes_max: usize, run: fn(&[u8])) -> Target {
    Target { name, input_bytes_max, run }
}

/// Every target.
pub const TARGETS: &[Target] = &[
    // What a server sends.
    target("message_startup", 4096, message_startup),
    target("message_session", 16_384, message_session),
    target("authentication", 4096, authentication),
    target("wal_stream", 4096, wire::fuzz::wal_stream),
    target("base_backup", 16_384, base_backup),
    target("certificate", 8192, wire::fuzz::certificate),
    target("tar", 16_384, base::tar),
    // WAL.
    target("wal_pages", 49_152, wal::pages),
    target("wal_records", 16_384, wal::records),
    target("wal_intake", 32_768, wal::intake),
    // Files of a data directory.
    target("timeline_history", 4096, pg::timeline_history),
    target("backup_label", 4096, pg::backup_label),
    target("tablespace_map", 4096, pg::tablespace_map),
    target("pg_control", 1024, pg::control_file),
    target("file_names", 512, pg::file_names),
    target("backup_manifest", 4096, pg::backup_manifest),
    target("data_page", 8192, pg::data_page),
    target("recovery_settings", 8192, restore::recovery_settings),
    target("server_log", 8192, restore::server_log),
    target("restore_notes", 4096, restore::notes),
    // Objects of a repository.
    target("frame", 65_536, repo::frame),
    target("object_header", 256, repo::object_header),
    target("object_name", 512, repo::object_name),
    target("extent", 32_768, repo::extent),
    target("pack_footer", 16_384, repo::pack_footer),
    target("pack", 32_768, repo::pack),
    target("manifest", 16_384, repo::manifest),
    target("history", 4096, repo::history),
    target("key_object", 4096, repo::key_object),
    target("key_texts", 2048, repo::key_texts),
    target("identity", 1024, repo::identity),
    target("lease", 4096, repo::lease),
    // What people write.
    target("connection_string", 4096, connection_string),
    target("password_file", 4096, password_file),
    target("service_file", 4096, service_file),
    target("config_file", 8192, config::file),
    target("store_url", 1024, config::store_url),
    target("target_time", 256, restore::target_time),
    target("restore_arguments", 512, restore::arguments),
];

fn message_startup(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let sizes = input.sizes();
    wire::fuzz::messages(wire::fuzz::Trust::Stranger, &sizes, input.rest());
}

fn message_session(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let sizes = input.sizes();
    wire::fuzz::messages(wire::fuzz::Trust::Server, &sizes, input.rest());
}

fn authentication(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let setup = input.byte();
    wire::fuzz::authentication(setup, input.rest());
}

fn base_backup(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let form = input.choose(&[wire::fuzz::Form::ManyCopies, wire::fuzz::Form::OneCopy]);
    wire::fuzz::base_backup(form, input.rest());
}

fn connection_string(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        wire::fuzz::connection_string(text);
    }
}

fn password_file(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    wire::fuzz::password_file(&text);
}

fn service_file(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        wire::fuzz::service_file(text);
    }
}
