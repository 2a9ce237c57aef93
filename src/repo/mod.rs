//! What the objects of a store mean.
