//! Repository to Postgres: target, plan, files, replay.
