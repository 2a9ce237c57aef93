//! Client of PostgreSQL's frontend/backend protocol, made for replication.
