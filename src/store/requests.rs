//! Counts of the requests a store made, by kind: what they cost and what tests hold us to; and how
//! long those took that somebody waits for.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::metrics::Latency;

macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident),+ $(,)?) => {
        /// Requests made since the store was opened.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct RequestCounts { $($(#[$doc])* pub $field: u64),+ }

        /// The counters behind [`RequestCounts`].
        #[derive(Debug, Default)]
        pub struct Requests { $($(#[$doc])* pub $field: Counter),+ }

        impl Requests {
            /// The counts now.
            #[must_use]
            pub fn counts(&self) -> RequestCounts {
                RequestCounts { $($field: self.$field.0.load(Ordering::Relaxed)),+ }
            }
        }

        impl RequestCounts {
            /// What came on top since `earlier`.
            #[must_use]
            pub fn since(&self, earlier: &Self) -> Self {
                Self { $($field: self.$field.saturating_sub(earlier.$field)),+ }
            }
        }
    };
}

counters! {
    /// Objects put in one request, the lease included.
    puts,
    /// Multipart uploads begun.
    multipart_begins,
    /// Parts put.
    parts,
    /// Multipart uploads completed.
    multipart_completes,
    /// Multipart uploads aborted.
    multipart_aborts,
    /// Gets, whole or by range.
    gets,
    /// Heads.
    heads,
    /// Pages of listings.
    lists,
    /// Requests to delete, each for up to a thousand objects.
    deletes,
    /// Tries beyond the first, also counted above.
    retries,
    /// Answers that asked us to slow down.
    throttled,
    /// Bytes of bodies sent, tries that failed included.
    sent_bytes,
    /// Bytes of bodies received.
    received_bytes,
}

impl RequestCounts {
    /// Requests that S3 bills as "PUT, COPY, POST, LIST".
    #[must_use]
    pub fn class_a(&self) -> u64 {
        self.puts + self.multipart_begins + self.parts + self.multipart_completes + self.lists
    }

    /// Requests that change what is stored, deletes and aborts not counted.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.puts + self.multipart_begins + self.parts + self.multipart_completes
    }
}

/// How long what a commit waits for took, since the store was opened.
#[derive(Debug, Default)]
pub struct Latencies {
    /// Putting a body, of an object or of a part of one: from having it in memory to the store's word
    /// that it is there, with all tries and pauses between. What failed in the end is not counted.
    pub upload: Latency,
    /// An fsync of a file or a folder; only a store in a directory has any.
    pub fsync: Latency,
}

/// One counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn one(&self) {
        self.add(1);
    }

    /// Adds `count`.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }
}
