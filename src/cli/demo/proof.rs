//! What the demo's tables hold, row for row, before the accident and after the restore.

use std::collections::BTreeMap;

use super::server::Server;
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};

/// A table's content: its rows, and a digest of all of them in order.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Content {
    rows: u64,
    digest: String,
}

/// What the database held at one moment.
#[derive(Clone, Debug)]
pub(super) struct Proof {
    /// The server's clock at that moment, after everything counted was committed.
    pub(super) time: String,
    tables: BTreeMap<String, Content>,
}

/// Reads every row of every table.
pub(super) async fn take(server: &Server, clock: &Clock) -> Result<Proof> {
    let mut connection = server.connect(clock).await?;
    let names = connection
        .query(
            "SELECT quote_ident(tablename) FROM pg_tables WHERE schemaname = 'public' ORDER BY 1",
        )
        .await?;
    let mut tables = BTreeMap::new();
    for name in &names {
        let name = name.text(0)?;
        let row = connection
            .query_one(&format!(
                "SELECT count(*), coalesce(md5(string_agg(md5(t::text), '' ORDER BY t::text)), '') \
                 FROM {name} t"
            ))
            .await?;
        let content = Content { rows: row.parse(0)?, digest: row.text(1)?.to_owned() };
        tables.insert(name.to_owned(), content);
    }
    let row = connection.query_one("SELECT clock_timestamp()").await?;
    Ok(Proof { time: row.text(0)?.to_owned(), tables })
}

impl Proof {
    /// All rows.
    pub(super) fn rows(&self) -> u64 {
        self.tables.values().map(|content| content.rows).sum()
    }

    /// How many rows are missing in `found`: none, or this is an error.
    pub(super) fn compare(&self, found: &Self) -> Result<u64> {
        if self.tables == found.tables {
            return Ok(0);
        }
        let different: Vec<String> = self
            .tables
            .iter()
            .filter(|(name, content)| found.tables.get(*name) != Some(content))
            .map(|(name, content)| {
                let now = found
                    .tables
                    .get(name)
                    .map_or("no table".to_owned(), |now| format!("{} rows", now.rows));
                format!("{name} had {} rows, now {now}", content.rows)
            })
            .collect();
        let message = format!("the restored tables differ: {}", different.join("; "));
        Err(Error::new(Kind::Corrupt, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proof(rows: u64, digest: &str) -> Proof {
        let content = Content { rows, digest: digest.to_owned() };
        Proof { time: String::new(), tables: BTreeMap::from([("t".to_owned(), content)]) }
    }

    #[test]
    fn the_same_number_of_other_rows_is_a_difference() {
        assert_eq!(proof(2, "a").compare(&proof(2, "a")).unwrap(), 0);
        let error = proof(2, "a").compare(&proof(2, "b")).unwrap_err();
        assert!(error.to_string().contains("t had 2 rows"), "{error}");
    }
}
