//! Local `dockerd` processes.
