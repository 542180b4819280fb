//! The front-end's side: the socket, the messages, the device they set up.

pub mod cache_mode;
pub mod config_space;
pub mod device;
pub mod handover;
pub mod logging;
pub mod message;
pub mod notify;
pub mod private;
pub mod relay;
pub mod server;
pub mod socket;
pub mod tracking;
