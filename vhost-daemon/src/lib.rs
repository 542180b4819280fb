//! A vhost-user-blk back-end for EXD and raw images, in parts that the program, its tests and the fuzz
//! targets put together. It is no library for other programs: nothing here is kept stable.

#![deny(unsafe_code)]

pub mod args;
pub mod clock;
pub mod control;
pub mod ctl;
pub mod disk;
pub mod event;
pub mod events;
pub mod front;
pub mod io;
pub mod logger;
pub mod queue;
pub mod run;
pub mod sandbox;
pub mod scope;
pub mod signals;
pub mod stats;
