//! A seeded simulation with a shadow model. (Written in full beside this file's owner's rules.)
