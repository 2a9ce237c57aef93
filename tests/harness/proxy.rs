//! A TCP proxy that misbehaves on request: between the sidecar and Postgres, or between it and S3.

use std::net::SocketAddr;
use std::sync::Arc;
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
}

/// A running proxy; stops when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    fault: watch::Sender<Fault>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Starts a proxy in front of `upstream`.
    pub async fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (fault, seen) = watch::channel(Fault::None);
        let task = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                tokio::spawn(serve(client, upstream, seen.clone()));
            }
        });
        Self { address, fault, task }
    }

    /// Where to connect instead of the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what happens, from now on, to old and new connections.
    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        // Connections end when they see that nobody can change the fault any more.
    }
}

async fn serve(client: TcpStream, upstream: SocketAddr, fault: watch::Receiver<Fault>) {
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let budget = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let mut up = tokio::spawn(pump(client_read, server_write, fault.clone(), None));
    let mut down = tokio::spawn(pump(server_read, client_write, fault, Some(budget)));
    // Either direction's end ends both, as a reset does.
    tokio::select! { _ = &mut up => down.abort(), _ = &mut down => up.abort() }
}

/// Copies one direction. With a `passed` counter, the direction to which `ResetAfter` applies.
async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut fault: watch::Receiver<Fault>,
    passed: Option<Arc<std::sync::atomic::AtomicU64>>,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let now = *fault.borrow_and_update();
        let limit = match now {
            Fault::Refuse => return reset(&to),
            Fault::Stall => {
                if fault.changed().await.is_err() {
                    return;
                }
                continue;
            }
            Fault::Slow(bytes_per_second) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
                (bytes_per_second as usize / 50).clamp(1, buffer.len())
            }
            Fault::None | Fault::ResetAfter(_) => buffer.len(),
        };
        let count = tokio::select! {
            changed = fault.changed() => if changed.is_err() { return } else { continue },
            count = from.read(&mut buffer[..limit]) => count,
        };
        let Ok(count @ 1..) = count else { return };
        let mut keep = count;
        if let (Fault::ResetAfter(after), Some(passed)) = (now, &passed) {
            let before = passed.fetch_add(count as u64, std::sync::atomic::Ordering::Relaxed);
            keep = count.min(usize::try_from(after.saturating_sub(before)).unwrap());
        }
        if to.write_all(&buffer[..keep]).await.is_err() {
            return;
        }
        if keep < count {
            return reset(&to);
        }
    }
}

/// Makes the coming close a reset instead of an orderly end.
fn reset(half: &tokio::net::tcp::OwnedWriteHalf) {
    let _ = half.as_ref().set_zero_linger();
}
