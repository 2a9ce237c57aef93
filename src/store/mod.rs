//! Objects: put once, put if absent, multipart, get range, list, delete, replace if unchanged.
