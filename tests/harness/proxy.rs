//! A TCP proxy that misbehaves on request: between the sidecar and Postgres, or between it and S3.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What the proxy does with every connection, old and new.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Nothing: bytes pass.
    None,
    /// Connections are closed with a reset, new ones too.
    Refuse,
    /// Connections stay open and no byte passes, as when a cable is pulled.
    Stall,
    /// So many bytes a second in each direction of each connection.
    Slow(u32),
    /// Each connection is reset after so many more bytes from the server.
    ResetAfter(u64),
    /// Each connection is reset after so many more bytes from the client.
    ResetAfterSent(u64),
}

/// Where connections go, and what becomes of them.
#[derive(Clone, Copy, Debug)]
struct Course {
    upstream: SocketAddr,
    fault: Fault,
    /// Counts the changes of `upstream` and the cuts; a connection made before the last one ends.
    aim: u64,
}

/// A running proxy; stops when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    course: watch::Sender<Course>,
    hits: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Starts a proxy in front of `upstream`.
    pub async fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (course, seen) = watch::channel(Course { upstream, fault: Fault::None, aim: 0 });
        let hits: Arc<AtomicU64> = Arc::default();
        let counted = Arc::clone(&hits);
        let task = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                tokio::spawn(serve(client, seen.clone(), Arc::clone(&counted)));
            }
        });
        Self { address, course, hits, task }
    }

    /// Where to connect instead of the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what happens, from now on, to old and new connections.
    pub fn set(&self, fault: Fault) {
        self.course.send_modify(|course| course.fault = fault);
    }

    /// How often a fault has met a connection: closed it, held it up, or slowed what it carried.
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    /// Resets all connections: what a client that is gone had sent and is still held up never arrives.
    pub fn cut(&self) {
        self.course.send_modify(|course| course.aim += 1);
    }

    /// Sends new connections to another server and resets the old ones, as when an address moves.
    pub fn aim(&self, upstream: SocketAddr) {
        self.course.send_modify(|course| {
            course.upstream = upstream;
            course.aim += 1;
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        // Connections end when they see that nobody can change the course any more.
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Direction {
    FromClient,
    FromServer,
}

async fn serve(client: TcpStream, course: watch::Receiver<Course>, hits: Arc<AtomicU64>) {
    let upstream = course.borrow().upstream;
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let up = pump(client_read, server_write, (course.clone(), Direction::FromClient), &hits);
    let down = pump(server_read, client_write, (course, Direction::FromServer), &hits);
    // Either direction's end ends both, as a reset does.
    tokio::select! { () = up => {}, () = down => {} }
}

/// Copies one direction until it ends or is ended.
async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    (mut course, direction): (watch::Receiver<Course>, Direction),
    hits: &AtomicU64,
) {
    let hit = || hits.fetch_add(1, Ordering::Relaxed);
    let mut buffer = vec![0; 64 * 1024];
    let aim = course.borrow().aim;
    let mut passed = 0;
    loop {
        let now = *course.borrow_and_update();
        if now.aim != aim {
            return reset(&to);
        }
        let limit = match now.fault {
            Fault::Refuse => {
                hit();
                return reset(&to);
            }
            Fault::Stall => {
                hit();
                if course.changed().await.is_err() {
                    return;
                }
                continue;
            }
            Fault::Slow(bytes_per_second) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
                (bytes_per_second as usize / 50).clamp(1, buffer.len())
            }
            Fault::None | Fault::ResetAfter(_) | Fault::ResetAfterSent(_) => buffer.len(),
        };
        let count = tokio::select! {
            changed = course.changed() => if changed.is_err() { return } else { continue },
            count = from.read(&mut buffer[..limit]) => count,
        };
        let Ok(count @ 1..) = count else { return };
        if matches!(now.fault, Fault::Slow(_)) {
            hit();
        }
        let reset_after = match (now.fault, direction) {
            (Fault::ResetAfter(after), Direction::FromServer)
            | (Fault::ResetAfterSent(after), Direction::FromClient) => Some(after),
            _ => None,
        };
        let mut keep = count;
        if let Some(after) = reset_after {
            keep = count.min(usize::try_from(after.saturating_sub(passed)).unwrap());
            passed += count as u64;
        }
        if to.write_all(&buffer[..keep]).await.is_err() {
            return;
        }
        if keep < count {
            hit();
            return reset(&to);
        }
    }
}

/// Makes the coming close a reset instead of an orderly end.
fn reset(half: &tokio::net::tcp::OwnedWriteHalf) {
    let _ = half.as_ref().set_zero_linger();
}
