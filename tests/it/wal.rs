//! WAL of every supported major as pg_waldump read it when the samples were made.

use std::path::Path;

use super::wal_lines::Sample;

#[test]
fn samples_of_every_major_are_read_as_pg_waldump_reads_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/wal");
    for major in 13..=18 {
        Sample::read(&folder, major).check();
    }
}
