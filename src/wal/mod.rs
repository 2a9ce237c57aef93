//! WAL pages, records, block references and landmarks; sans-I/O.
