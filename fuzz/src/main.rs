//! libFuzzer's main loop around one target of `tidemark::fuzz`, named by `TIDEMARK_FUZZ_TARGET`.
//!
//! One binary for all targets: linking the whole product once per target would take longer than
//! most runs. `tools/fuzz` builds and runs it.
#![no_main]

use std::sync::OnceLock;

static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();

libfuzzer_sys::fuzz_target!(
    init: {
        let name = std::env::var("TIDEMARK_FUZZ_TARGET").unwrap_or_default();
        let target = tidemark::fuzz::TARGETS.iter().find(|target| target.name == name);
        let Some(target) = target else {
            eprintln!("no target '{name}' in TIDEMARK_FUZZ_TARGET");
            std::process::exit(2);
        };
        let _ = TARGET.set(target.run);
    },
    |data: &[u8]| {
        if let Some(run) = TARGET.get() {
            run(data);
        }
    }
);
