//! Configuration: file, environment and flags become each module's own options, once.
