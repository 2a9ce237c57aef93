//! What our own metrics page says while a peer of ours runs: how long uploads and fsyncs take.

use crate::harness::sidecar::metrics;

/// The histograms that are asked for, and what they are called in the report.
const HISTOGRAMS: [(&str, &str); 2] =
    [("tidemark_store_upload_seconds", "upload"), ("tidemark_store_fsync_seconds", "fsync")];

/// Quantiles of what was counted so far at `port`, in milliseconds: upper bounds of the buckets they lie in.
/// Empty for a peer that has no such page.
pub fn latencies(port: u16) -> Vec<(String, f64)> {
    let page = metrics(port);
    let mut figures = Vec::new();
    for (histogram, what) in HISTOGRAMS {
        let buckets = buckets(&page, histogram);
        for (name, of) in [("p50", 0.5), ("p99", 0.99), ("max", 1.0)] {
            if let Some(bound) = quantile(&buckets, of) {
                figures.push((format!("{what} {name} ms"), bound * 1000.0));
            }
        }
    }
    figures
}

/// Upper bounds, and how many lie below each.
fn buckets(page: &str, histogram: &str) -> Vec<(f64, f64)> {
    let lines =
        page.lines().filter_map(|line| line.strip_prefix(histogram)?.strip_prefix("_bucket"));
    let parsed = lines.filter_map(|line| {
        let (labels, count) = line.rsplit_once(' ')?;
        let bound = labels.split("le=\"").nth(1)?.split('"').next()?;
        Some((bound.parse().ok()?, count.parse().ok()?))
    });
    parsed.collect()
}

fn quantile(buckets: &[(f64, f64)], of: f64) -> Option<f64> {
    let total = buckets.last().map(|(_, count)| *count).filter(|total| *total > 0.0)?;
    buckets.iter().find(|(_, count)| *count >= of * total).map(|(bound, _)| *bound)
}
