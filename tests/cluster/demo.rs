//! `tidemark demo`, the first command of the README.

use crate::harness::sidecar::Output;
use crate::harness::{Account, Binaries};

#[test]
fn the_demo_brings_everything_back_and_leaves_nothing_behind() {
    let (account, binaries) = (Account::current(), Binaries::of_this_run());
    let temporary = account.temp_dir("demo");
    let mut demo = account.command(account.tidemark_binary());
    demo.args(["demo", "--json", "--postgres-bin"]).arg(binaries.dir());
    demo.env("TMPDIR", temporary.path()).env("HOME", temporary.path()).env("NO_COLOR", "1");
    let done = Output::of(&mut demo).ok();
    let told = done.json();
    assert_eq!(told["rows_lost_before_target"], 0, "{told:#}");
    for counted in ["rows", "transactions"] {
        assert!(told[counted].as_u64().is_some_and(|count| count > 0), "{counted}: {told:#}");
    }
    let major = told["postgres_version"].as_str().unwrap().split('.').next().unwrap();
    assert_eq!(major, binaries.major().to_string(), "{told:#}");
    for said in ["ERROR", "WARN", "panicked"] {
        assert!(!done.stderr.contains(said), "{}", done.stderr);
    }
    let left: Vec<_> = std::fs::read_dir(temporary.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    let inside = temporary.path().to_str().unwrap().as_bytes();
    let processes = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let titles = processes.filter_map(|path| std::fs::read(path.join("cmdline")).ok());
    let stays = |title: &Vec<u8>| title.windows(inside.len()).any(|part| part == inside);
    let staying: Vec<Vec<u8>> = titles.filter(stays).collect();
    assert!(staying.is_empty(), "{staying:?}");
}
