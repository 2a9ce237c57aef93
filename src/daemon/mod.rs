//! The sidecar: everything supervised and scheduled.
