//! Resource managers: which part of PostgreSQL a record belongs to.
//!
//! # Source
//! `src/include/access/rmgrlist.h`: the same 22 in 13 to 18; custom ones (128 to 255) since 15.

use std::fmt;

/// A record's resource manager (`RmgrId`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RmgrId(pub u8);

const NAMES: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];

/// The first major version with custom resource managers.
const CUSTOM_SINCE_MAJOR: u32 = 15;

impl RmgrId {
    /// `RM_XLOG_ID`
    pub const XLOG: RmgrId = RmgrId(0);
    /// `RM_XACT_ID`
    pub const XACT: RmgrId = RmgrId(1);
    /// `RM_TBLSPC_ID`
    pub const TABLESPACE: RmgrId = RmgrId(5);

    /// Whether a server of this major version may have written it (`RmgrIdIsValid`; `RM_MAX_ID`
    /// before 15).
    #[must_use]
    pub fn is_valid(self, major: u32) -> bool {
        usize::from(self.0) < NAMES.len() || self.0 >= 128 && major >= CUSTOM_SINCE_MAJOR
    }
}

impl fmt::Display for RmgrId {
    /// As `pg_waldump` names it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.get(usize::from(self.0)) {
            Some(name) => f.pad(name),
            None => write!(f, "custom{:03}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_pg_waldump() {
        assert_eq!(RmgrId::XACT.to_string(), "Transaction");
        assert_eq!(RmgrId(21).to_string(), "LogicalMessage");
        assert_eq!(RmgrId(128).to_string(), "custom128");
        assert!(RmgrId(21).is_valid(13) && !RmgrId(22).is_valid(18));
        assert!(!RmgrId(128).is_valid(14) && RmgrId(128).is_valid(15) && RmgrId(255).is_valid(18));
    }
}
