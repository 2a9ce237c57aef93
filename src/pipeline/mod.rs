//! Plain blocks to sealed frames and back, on worker threads.
