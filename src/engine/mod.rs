//! Pure decisions: sessions, slots, balancing. No clock, no randomness, no I/O.
