//! A fixed list of daemons.
