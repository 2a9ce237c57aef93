//! The commit that is tested, and a seed that each commit has of its own: what a test draws from it changes with
//! the code and not with the clock, so an unchanged commit does not fail now and then.

/// The number of this commit; the same outside of a clone.
pub fn commit_seed() -> u64 {
    let digits = git(&["rev-parse", "HEAD"]).and_then(|text| text.get(..12).map(str::to_owned));
    digits.and_then(|digits| u64::from_str_radix(&digits, 16).ok()).unwrap_or(4711)
}

/// The hash of this commit, with `-dirty` behind it when the files are not those of the commit; `unknown`
/// outside of a clone.
#[allow(dead_code, reason = "each test binary uses its own part")]
pub fn commit_hash() -> String {
    // No tag has this name, so the hash is all there is to name a commit by.
    let args = ["describe", "--always", "--dirty", "--abbrev=40", "--match", "no such tag"];
    git(&args).map_or_else(|| "unknown".to_owned(), |text| text.trim().to_owned())
}

/// What git says, when it is there and does not fail.
fn git(args: &[&str]) -> Option<String> {
    let mut command = std::process::Command::new("git");
    let done = command.args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
    done.status.success().then(|| String::from_utf8_lossy(&done.stdout).into_owned())
}
