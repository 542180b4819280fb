//! The bytes of the vhost-user protocol, for messages that no library would send.

use crate::daemon::PATIENCE;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use vhost::vhost_user::Frontend;

/// Requests of the vhost-user document, by their numbers.
pub mod request {
    #![allow(missing_docs)]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
}

/// Version 1, a request.
pub const PLAIN: u32 = 1;
/// Version 1, a request that wants an acknowledgement.
pub const NEED_REPLY: u32 = 1 | 8;
const HEADER: usize = 12;

/// A connection's socket.
pub struct Wire(UnixStream);

/// What a connection comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The daemon still answers.
    Answers,
    /// The daemon has closed it.
    Closed,
    /// The daemon neither answers nor closes the connection.
    Silent,
}

impl Wire {
    /// A second handle of this connection.
    pub fn of(control: &Frontend) -> Wire {
        let fd = crate::frontend::borrow(control).try_clone_to_owned().expect("duplicated");
        let stream = UnixStream::from(fd);
        stream.set_read_timeout(Some(PATIENCE / 4)).expect("a timeout");
        Wire(stream)
    }

    /// Sends bytes as they are. What the daemon does not take any more is dropped.
    pub fn bytes(&self, bytes: &[u8]) {
        let _ = (&self.0).write_all(bytes);
    }

    /// Sends a message.
    pub fn send(&self, request: u32, payload: &[u8]) {
        self.send_with(request, PLAIN, payload, &[]);
    }

    /// Sends a message with flags and descriptors. The header comes with the descriptors, as QEMU does it.
    pub fn send_with(&self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        self.bytes_with(&message(request, flags, payload), fds);
    }

    /// Sends bytes with descriptors.
    pub fn bytes_with(&self, bytes: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let fd = self.0.as_raw_fd();
        let sent = sendmsg::<()>(fd, &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None);
        if let Ok(sent) = sent
            && sent < bytes.len()
        {
            self.bytes(&bytes[sent..]);
        }
    }

    /// The next message: its request and its payload; or why there is none.
    pub fn receive(&self) -> Result<(u32, Vec<u8>), Verdict> {
        let mut header = [0; HEADER];
        self.read(&mut header)?;
        let number = |at: usize| header[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let mut payload = vec![0; number(8) as usize];
        self.read(&mut payload)?;
        Ok((number(0), payload))
    }

    fn read(&self, bytes: &mut [u8]) -> Result<(), Verdict> {
        (&self.0).read_exact(bytes).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => Verdict::Silent,
            _ => Verdict::Closed,
        })
    }

    /// Asks for the features and waits for the answer or the end.
    pub fn verdict(&self) -> Verdict {
        self.send(request::GET_FEATURES, &[]);
        loop {
            match self.receive() {
                Ok((request::GET_FEATURES, _)) => return Verdict::Answers,
                // Acknowledgements of what was sent before.
                Ok(_) => {}
                Err(verdict) => return verdict,
            }
        }
    }
}

/// A message.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = numbers32(&[request, flags, payload.len() as u32]);
    bytes.extend_from_slice(payload);
    bytes
}

/// 32-bit numbers as on the wire.
pub fn numbers32(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// 64-bit numbers as on the wire.
pub fn numbers64(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

impl AsFd for Wire {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
