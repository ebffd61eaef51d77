//! What happens to a pool, in any order.

/// The first byte chooses a simulation, the others what happens in it: with every event the engine's invariants and
/// the simulation's own account of what should be are held against each other. `DINDPOOL_TRACE=1` prints the events.
pub fn engine(data: &[u8]) {
    crate::engine::simulation::run_choices(data, std::env::var_os("DINDPOOL_TRACE").is_some());
}
