//! The `dindpool` command.

fn main() {}
