//! The front-end's side: the socket, the messages, the device they set up.

pub mod config_space;
pub mod device;
pub mod server;
pub mod socket;
