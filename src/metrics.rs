//! Counters and latency histograms that the engine keeps and others read.
