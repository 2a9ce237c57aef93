//! What happens in the demo's shop.

use std::time::Duration;

use jiff::Timestamp;

use super::server::Server;
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};

/// Accounts and orders, some tens of megabytes: enough to see something move.
const PREPARE: &str = "
    CREATE TABLE account (id int PRIMARY KEY, owner text NOT NULL, balance numeric NOT NULL);
    INSERT INTO account SELECT n, 'customer ' || n, (n * 7919) % 10007 / 10.0
        FROM generate_series(1, 200000) n;
    CREATE TABLE orders (id bigserial PRIMARY KEY, account int NOT NULL REFERENCES account,
        amount numeric NOT NULL, note text, at timestamptz NOT NULL DEFAULT clock_timestamp());
    CREATE INDEX ON orders (account);
    CHECKPOINT";

/// One order: two statements in one transaction.
fn order(number: u64) -> String {
    let account = number * 7919 % 200_000 + 1;
    let amount = number * 31 % 500 + 1;
    format!(
        "BEGIN; INSERT INTO orders (account, amount, note) VALUES ({account}, {amount}, \
         'order ' || {number}); UPDATE account SET balance = balance - {amount} WHERE id = \
         {account}; COMMIT"
    )
}

/// Fills the shop.
pub(super) async fn prepare(server: &Server, clock: &Clock) -> Result<()> {
    let mut connection = server.connect(clock).await?;
    for statement in PREPARE.split(';') {
        connection.query(statement).await?;
    }
    Ok(())
}

/// Orders for some time; how many were committed.
pub(super) async fn run(server: &Server, clock: &Clock, length: Duration) -> Result<u64> {
    let mut connection = server.connect(clock).await?;
    let end = clock.instant() + length;
    let mut number = 0;
    while clock.instant() < end {
        number += 1;
        connection.query(&order(number)).await?;
    }
    Ok(number)
}

/// What went wrong.
#[derive(Debug)]
pub(super) struct Accident {
    /// The statements, as they were typed.
    pub(super) statements: Vec<String>,
    /// When the last of them was committed, by the server's clock, at the latest.
    pub(super) time: Timestamp,
}

/// Destroys a column and a table, and goes on selling for a moment.
pub(super) async fn accident(server: &Server, clock: &Clock) -> Result<Accident> {
    // The target must lie before the accident by the server's clock.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut connection = server.connect(clock).await?;
    let statements = ["UPDATE account SET balance = 0", "DROP TABLE orders"];
    for statement in statements {
        connection.query(statement).await?;
    }
    let row = connection.query_one("SELECT extract(epoch FROM clock_timestamp())").await?;
    let time = seconds(row.text(0)?)?;
    // A later commit: its arrival in the repository shows that all before it has arrived.
    connection.query("UPDATE account SET balance = 1 WHERE id = 1").await?;
    Ok(Accident { statements: statements.map(str::to_owned).to_vec(), time })
}

/// An instant from PostgreSQL's seconds since 1970.
fn seconds(text: &str) -> Result<Timestamp> {
    let unreadable = || Error::new(Kind::Corrupt, format!("the server's clock shows '{text}'"));
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let micros: i64 =
        format!("{part:0<6}").get(..6).and_then(|s| s.parse().ok()).ok_or_else(unreadable)?;
    let whole: i64 = whole.parse().map_err(|_number| unreadable())?;
    let micros = whole.checked_mul(1_000_000).and_then(|n| n.checked_add(micros));
    micros.and_then(|n| Timestamp::from_microsecond(n).ok()).ok_or_else(unreadable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_clock_is_read_to_the_microsecond() {
        assert_eq!(seconds("0.5").unwrap().as_microsecond(), 500_000);
        assert_eq!(seconds("1763800000.123456").unwrap().as_microsecond(), 1_763_800_000_123_456);
        assert!(seconds("soon").is_err());
    }
}
