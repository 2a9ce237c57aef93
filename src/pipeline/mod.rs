//! Plain blocks to sealed frames and back, on worker threads.
//!
//! Blocks flow in as slices of the buffers they arrived in, frames flow out in the buffer they are
//! uploaded from; the other way, fetched bytes are opened in place and decompressed into a buffer the
//! worker keeps. Nothing here is async and nothing blocks an async caller: it awaits [`Permits`].
//!
//! # The copies that remain
//! | copy | bytes | cost |
//! |---|---|---|
//! | socket (kernel) to the read buffer | all plain | one memcpy, part of `recv`; TLS decrypts in place of it |
//! | slices of a block put together for zstd (given them one by one it copies them as well, and matches across the seams more slowly) | all plain but blocks that came in one slice | 14 GB/s, 3 to 10 % of level 1 |
//! | pieces below a block (small files, ends of large ones) out of the read buffers they would keep alive | those pieces | 14 GB/s |
//! | zstd's output to the part buffer | none | written there directly |
//! | sealing | none | in place |
//! | blocks that do not shrink: slices to the part buffer | those blocks | 14 GB/s |
//! | part buffer to the HTTP client | none | one `Bytes`; over TLS rustls encrypts record by record |
//! | joining the leftover parts of a pack with its footer | at most a part for each thread, once a pack | 14 GB/s, < 3 % of the bytes |
//! | fetch: pieces of a response to one buffer | all stored | 14 GB/s, the store's driver |
//! | opening | none | in place, when the driver hands over a buffer nobody else holds |
//! | decompressing to the worker's buffer, then `pwrite` (kernel) | all plain | the work itself |

pub mod budget;
pub mod cipher;
pub mod codec;
pub mod frame;
pub mod permits;
pub mod pool;

pub use budget::Budget;
pub use codec::Level;
pub use permits::{Permit, Permits};
pub use pool::{Pool, PoolOptions, Worker};
