//! vhost-user messages as they are on the wire: a header of three words, a body, and descriptors that
//! travel with the first byte. All numbers are in the host's byte order, which is little-endian here.

use crate::front::socket::adopt;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Bytes of a header.
const HEADER: usize = 12;
/// Longest body: what the library takes.
pub const BODY_MAX: usize = 4096;
/// Most descriptors with a message: what the library takes.
pub const FDS_MAX: usize = 32;
/// Most descriptors that a message can bring (the kernel's SCM_MAX_FD). There has to be room for all of
/// them: of a control message that was cut off nobody learns which descriptors are ours to close.
const FDS_SENT_MAX: usize = 253;

/// In the flags: the version of the protocol, of which there is one.
const VERSION_MASK: u32 = 3;
const VERSION: u32 = 1;
/// In the flags: this is a reply.
const REPLY: u32 = 1 << 2;
/// In the flags: the sender wants to know how it ended.
const NEED_REPLY: u32 = 1 << 3;

/// Requests of the front-end that have a meaning here (numbers of the vhost-user document).
pub mod request {
    #![allow(missing_docs, reason = "the document's own names")]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const GET_SHARED_OBJECT: u32 = 41;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
    pub const GET_SHMEM_CONFIG: u32 = 44;
}

/// A message.
#[derive(Debug)]
pub struct Message {
    /// What is asked, or what was asked if this is a reply.
    pub request: u32,
    flags: u32,
    /// Everything behind the header.
    pub body: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// Why no message could be had.
#[derive(Debug)]
pub enum ReceiveError {
    /// The connection failed.
    Io(io::Error),
    /// The connection ended inside a message.
    Truncated,
    /// A body longer than any message's.
    TooLong(u32),
    /// More descriptors than any message has.
    TooManyFds,
    /// Another protocol.
    Version(u32),
}

impl fmt::Display for ReceiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReceiveError::Io(error) => write!(f, "the connection failed: {error}"),
            ReceiveError::Truncated => write!(f, "it left in the middle of a message"),
            ReceiveError::TooLong(size) => write!(f, "a message of {size} bytes"),
            ReceiveError::TooManyFds => write!(f, "more than {FDS_MAX} descriptors in a message"),
            ReceiveError::Version(flags) => {
                write!(f, "not vhost-user version 1 (message flags {flags:#x})")
            }
        }
    }
}

impl From<io::Error> for ReceiveError {
    fn from(error: io::Error) -> ReceiveError {
        ReceiveError::Io(error)
    }
}

impl Message {
    /// A request of our own.
    pub fn request(request: u32, body: Vec<u8>) -> Message {
        Message { request, flags: VERSION, body, fds: Vec::new() }
    }

    /// The answer to a request.
    pub fn reply(request: u32, body: Vec<u8>) -> Message {
        Message { request, flags: VERSION | REPLY, body, fds: Vec::new() }
    }

    /// An answer that is one number: a result (0: success) or what was asked for.
    pub fn reply_number(request: u32, value: u64) -> Message {
        Message::reply(request, value.to_le_bytes().to_vec())
    }

    /// This is a reply.
    pub fn is_reply(&self) -> bool {
        self.flags & REPLY != 0
    }

    /// The sender wants to know how it ended.
    pub fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// Asks for a reply, or not.
    pub fn set_needs_reply(&mut self, wanted: bool) {
        self.flags = if wanted { self.flags | NEED_REPLY } else { self.flags & !NEED_REPLY };
    }

    /// The 16-bit number at byte `at` of the body.
    pub fn u16_at(&self, at: usize) -> Option<u16> {
        self.body.get(at..)?.first_chunk().map(|bytes| u16::from_le_bytes(*bytes))
    }

    /// The 32-bit number at byte `at` of the body.
    pub fn u32_at(&self, at: usize) -> Option<u32> {
        self.body.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
    }

    /// The 64-bit number at byte `at` of the body.
    pub fn u64_at(&self, at: usize) -> Option<u64> {
        self.body.get(at..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
    }

    /// The body, if it is one 64-bit number.
    pub fn number(&self) -> Option<u64> {
        if self.body.len() == 8 { self.u64_at(0) } else { None }
    }

    /// Makes the body one 64-bit number.
    pub fn set_number(&mut self, value: u64) {
        self.body = value.to_le_bytes().to_vec();
    }

    /// Makes its descriptors such that nobody waits in reading or writing them.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        for fd in &self.fds {
            let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
            fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(())
    }

    /// Sends the message in one piece.
    pub fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let fds: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        self.send_with(socket, &fds)
    }

    /// Sends the message with these descriptors instead of its own.
    pub fn send_with(&self, socket: &UnixStream, fds: &[RawFd]) -> io::Result<()> {
        self.send_flagged(socket, fds, MsgFlags::empty())
    }

    /// Sends the message if there is room for it now.
    pub fn send_now(&self, socket: &UnixStream) -> io::Result<()> {
        self.send_flagged(socket, &[], MsgFlags::MSG_DONTWAIT)
    }

    fn send_flagged(&self, socket: &UnixStream, fds: &[RawFd], flags: MsgFlags) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        for word in [self.request, self.flags, self.body.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&self.body);
        let rights = [ControlMessage::ScmRights(fds)];
        let mut control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let mut left: &[u8] = &bytes;
        while !left.is_empty() {
            let pieces = [IoSlice::new(left)];
            let flags = flags | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(socket.as_raw_fd(), &pieces, control, flags, None) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => {
                    left = left.get(sent..).unwrap_or_default();
                    control = &[];
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Receives a message; `None` if the other side has left between two of them.
    pub fn receive(socket: &UnixStream) -> Result<Option<Message>, ReceiveError> {
        let mut header = [0; HEADER];
        let mut fds = Vec::new();
        if !fill(socket, &mut header, &mut fds)? {
            return Ok(None);
        }
        let [a, b, c, d, e, f, g, h, i, j, k, l] = header;
        let request = u32::from_le_bytes([a, b, c, d]);
        let flags = u32::from_le_bytes([e, f, g, h]);
        let size = u32::from_le_bytes([i, j, k, l]);
        if flags & VERSION_MASK != VERSION {
            return Err(ReceiveError::Version(flags));
        }
        if size as usize > BODY_MAX {
            return Err(ReceiveError::TooLong(size));
        }
        let mut body = vec![0; size as usize];
        if !fill(socket, &mut body, &mut fds)? && size > 0 {
            return Err(ReceiveError::Truncated);
        }
        Ok(Some(Message { request, flags, body, fds }))
    }
}

/// Fills the buffer and keeps descriptors that come along. False if the other side has left before the
/// first byte.
fn fill(
    socket: &UnixStream,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<bool, ReceiveError> {
    let mut done = 0;
    while done < buffer.len() {
        let got = match receive_some(socket, &mut buffer[done..], fds) {
            Ok(got) => got,
            Err(ReceiveError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => continue,
            // It left with unread replies in its socket.
            Err(ReceiveError::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error),
        };
        match got {
            0 if done == 0 => return Ok(false),
            0 => return Err(ReceiveError::Truncated),
            got => done += got,
        }
    }
    Ok(true)
}

fn receive_some(
    socket: &UnixStream,
    buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<usize, ReceiveError> {
    let mut space = cmsg_space!([RawFd; FDS_SENT_MAX]);
    let mut pieces = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut space), flags)
        .map_err(io::Error::from)?;
    let truncated = received.flags.contains(MsgFlags::MSG_CTRUNC);
    if let Ok(control) = received.cmsgs() {
        for message in control {
            if let ControlMessageOwned::ScmRights(rights) = message {
                fds.extend(rights.into_iter().map(adopt));
            }
        }
    }
    if truncated || fds.len() > FDS_MAX {
        return Err(ReceiveError::TooManyFds);
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().expect("sockets")
    }

    #[test]
    fn a_message_arrives_as_it_was_sent() {
        let (left, right) = pair();
        let mut message = Message::request(7, vec![1, 2, 3]);
        message.set_needs_reply(true);
        message.send_with(&left, &[right.as_raw_fd(); 2]).expect("sent");
        Message::request(8, Vec::new()).send(&left).expect("sent");
        let got = Message::receive(&right).expect("received").expect("a message");
        assert_eq!((got.request, got.body.as_slice(), got.fds.len()), (7, &[1u8, 2, 3][..], 2));
        assert!(got.needs_reply() && !got.is_reply());
        let got = Message::receive(&right).expect("received").expect("a message");
        assert_eq!((got.request, got.body.len(), got.fds.len()), (8, 0, 0));
        drop(left);
        assert!(Message::receive(&right).expect("its end").is_none());
    }

    /// Whatever the chunks are in which it comes.
    #[test]
    fn a_message_may_come_in_pieces() {
        let (mut left, right) = pair();
        let sender = std::thread::spawn(move || {
            for byte in [3u8, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 9, 9] {
                left.write_all(&[byte]).expect("sent");
                std::thread::yield_now();
            }
            left
        });
        let got = Message::receive(&right).expect("received").expect("a message");
        assert_eq!((got.request, got.body), (3, vec![9, 9]));
        drop(sender.join());
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let refused = |bytes: &[u8]| {
            let (mut left, right) = pair();
            left.write_all(bytes).expect("sent");
            drop(left);
            Message::receive(&right).expect_err("refused")
        };
        assert!(matches!(refused(&[1, 0, 0]), ReceiveError::Truncated));
        assert!(matches!(
            refused(&[1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1]),
            ReceiveError::Truncated
        ));
        assert!(matches!(refused(&[1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0]), ReceiveError::Truncated));
        assert!(matches!(refused(&[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]), ReceiveError::Version(2)));
        let size = [1, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 255];
        assert!(matches!(refused(&size), ReceiveError::TooLong(u32::MAX)));
    }

    #[test]
    fn too_many_descriptors_are_refused() {
        let (left, right) = pair();
        let fds = vec![left.as_raw_fd(); FDS_MAX + 1];
        Message::request(1, Vec::new()).send_with(&left, &fds).expect("sent");
        assert!(matches!(Message::receive(&right), Err(ReceiveError::TooManyFds)));
    }
}
