//! The control plane: stands between the front-end and the back-end library.
//!
//! The daemon owns the front-end's connection; the library has one of its own, to the relay. Each message
//! passes through here, with its descriptors, so that what the library cannot do is done by [`Part`]s of
//! the relay: each offers feature bits of its own, answers the messages that belong to them, and learns
//! of everything that happens to rings. Kicks, calls, rings and guest memory do not come this way.
//!
//! One message at a time: the library is asked to acknowledge every message, so that the relay knows how
//! it ended before it looks at the next one.

use crate::front::message::{Message, request};
use nix::unistd::write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// Rings that the library can have: SET_VRING_KICK names them in 8 bits.
const RINGS_MAX: usize = 256;
/// In SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR: the bits that name the ring.
const RING_MASK: u64 = 0xff;

const REPLY_ACK: u64 = VhostUserProtocolFeatures::REPLY_ACK.bits();

/// What becomes of a request.
#[derive(Debug)]
pub enum Verdict {
    /// The next part sees it, and in the end the library.
    Forward,
    /// This is the answer; nobody else sees the request.
    Answer(Message),
    /// It is done; nobody else sees the request.
    Done,
}

/// The front-end asked for something that is not granted: why. The connection ends.
pub type Refusal = String;

/// Something that the relay does itself. One per connection.
///
/// Everything is called on the relay's thread, while the front-end waits (if it waits at all) and before
/// the relay takes its next message. A part may block, but nothing that only a later message of this
/// connection can bring about.
pub trait Part: Send {
    /// virtio feature bits that are this part's own: the front-end is offered them, the library never
    /// hears of them.
    fn features(&self) -> u64 {
        0
    }

    /// vhost-user protocol feature bits of this part's own.
    fn protocol_features(&self) -> u64 {
        0
    }

    /// The front-end has set virtio features: all it accepted. Comes again while rings run.
    fn set_features(&mut self, _features: u64) -> Result<(), Refusal> {
        Ok(())
    }

    /// The front-end has set protocol features: all it accepted.
    fn set_protocol_features(&mut self, _features: u64) -> Result<(), Refusal> {
        Ok(())
    }

    /// A message of the front-end, before the library sees it. It may be changed.
    fn request(&mut self, _message: &mut Message) -> Result<Verdict, Refusal> {
        Ok(Verdict::Forward)
    }

    /// The library's answer to a message, before the front-end sees it. It may be changed. Only for those
    /// that always have one (GET_CONFIG and its like).
    fn reply(&mut self, _reply: &mut Message) -> Result<(), Refusal> {
        Ok(())
    }

    /// The front-end has been answered its last message, if it wanted an answer.
    fn answered(&mut self) {}

    /// No ring was running, and one is about to (SET_VRING_KICK): it does not run before this returns.
    fn first_ring_starts(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    /// The first ring has its kick descriptor.
    fn first_ring_started(&mut self) {}

    /// The last running ring has stopped (GET_VRING_BASE): everything it had taken is completed, and the
    /// front-end is told when this returns.
    fn last_ring_stopped(&mut self) -> Result<(), Refusal> {
        Ok(())
    }
}

/// The relay of one connection.
pub struct Relay {
    public: UnixStream,
    library: UnixStream,
    parts: Vec<Box<dyn Part>>,
    /// Rings between SET_VRING_KICK and GET_VRING_BASE.
    running: Vec<bool>,
    /// The front-end and we agreed on acknowledgements.
    reply_ack: bool,
}

impl Relay {
    /// Between a front-end and the library, each at the other end of its socket.
    pub fn new(public: UnixStream, library: UnixStream, parts: Vec<Box<dyn Part>>) -> Relay {
        let running = vec![false; RINGS_MAX];
        Relay { public, library, parts, running, reply_ack: false }
    }

    /// Passes messages on until the front-end leaves, or the library gives up (which says why itself).
    /// An error says what the front-end did wrong.
    pub fn run(mut self) -> Result<(), Refusal> {
        if !self.introduce()? {
            return Ok(());
        }
        loop {
            let message = Message::receive(&self.public).map_err(|error| error.to_string())?;
            let Some(message) = message else { return Ok(()) };
            if message.is_reply() {
                return Err("a reply to nothing".to_owned());
            }
            if !self.relay(message)? {
                return Ok(());
            }
            self.parts.iter_mut().for_each(|part| part.answered());
        }
    }

    /// Makes the library acknowledge everything. False if it is gone.
    fn introduce(&self) -> Result<bool, Refusal> {
        let mut set = Message::request(request::SET_PROTOCOL_FEATURES, Vec::new());
        set.set_number(REPLY_ACK);
        let messages = [
            Message::request(request::GET_FEATURES, Vec::new()),
            Message::request(request::GET_PROTOCOL_FEATURES, Vec::new()),
            set,
        ];
        for message in messages {
            if self.ask_library(message)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Has the library carry out a message: its answer, or its acknowledgement. `None` if it is gone.
    fn ask_library(&self, mut message: Message) -> Result<Option<Message>, Refusal> {
        message.set_needs_reply(true);
        if message.send(&self.library).is_err() {
            return Ok(None);
        }
        match Message::receive(&self.library) {
            Ok(Some(reply)) if reply.is_reply() && reply.request == message.request => {
                Ok(Some(reply))
            }
            Ok(Some(reply)) => Err(format!(
                "message {} was answered as if it were {}",
                message.request, reply.request
            )),
            // Whatever the reason: the thread that runs the library knows it.
            Ok(None) | Err(_) => Ok(None),
        }
    }

    /// Deals with one message of the front-end. False if the library is gone.
    fn relay(&mut self, mut message: Message) -> Result<bool, Refusal> {
        let number = message.request;
        let wants_reply = is_answered(number) || (message.needs_reply() && self.reply_ack);
        for part in &mut self.parts {
            match part.request(&mut message) {
                Ok(Verdict::Forward) => {}
                Ok(Verdict::Answer(answer)) => return self.answer(&answer),
                Ok(Verdict::Done) => {
                    return if wants_reply {
                        self.answer(&Message::reply_number(number, 0))
                    } else {
                        Ok(true)
                    };
                }
                Err(refusal) => {
                    if wants_reply && !is_answered(number) {
                        self.answer(&Message::reply_number(number, 1))?;
                    }
                    return Err(refusal);
                }
            }
        }
        self.before(&mut message)?;
        let ring = ring_of(&message);
        let call = call_of(&message);
        let Some(mut reply) = self.ask_library(message)? else { return Ok(false) };
        self.after(number, ring, &mut reply)?;
        if let Some(call) = call {
            // What was completed meanwhile was told by the descriptor that this one replaces, which may not
            // be looked at any more: a guest that waits for it would wait for ever. A full counter has been
            // signalled already, and for other failures there is nobody to tell.
            let _ = write(call, &1u64.to_le_bytes());
        }
        if wants_reply { self.answer(&reply) } else { Ok(true) }
    }

    /// What the relay does on its own before the library sees a message.
    fn before(&mut self, message: &mut Message) -> Result<(), Refusal> {
        if matches!(
            message.request,
            request::SET_VRING_KICK | request::SET_VRING_CALL | request::SET_VRING_ERR
        ) {
            // A queue thread must never wait for whoever holds the other end: not for somebody to read a
            // full event, nor for a kick that somebody else has read meanwhile.
            message.set_nonblocking().map_err(|error| format!("not a descriptor: {error}"))?;
        }
        match (message.request, message.number()) {
            (request::SET_FEATURES, Some(features)) => {
                for part in &mut self.parts {
                    part.set_features(features)?;
                }
                message.set_number(features & !self.features());
            }
            (request::SET_PROTOCOL_FEATURES, Some(features)) => {
                for part in &mut self.parts {
                    part.set_protocol_features(features)?;
                }
                self.reply_ack = features & REPLY_ACK != 0;
                message.set_number(features & !self.protocol_features() | REPLY_ACK);
            }
            (request::SET_VRING_KICK, Some(_)) if !self.is_running() => {
                for part in &mut self.parts {
                    part.first_ring_starts()?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What the relay does on its own before the front-end sees how a message ended.
    fn after(
        &mut self,
        number: u32,
        ring: Option<usize>,
        reply: &mut Message,
    ) -> Result<(), Refusal> {
        let features = match number {
            request::GET_FEATURES => self.features(),
            request::GET_PROTOCOL_FEATURES => self.protocol_features(),
            _ => 0,
        };
        if let (true, Some(offered)) = (features != 0, reply.number()) {
            reply.set_number(offered | features);
        }
        let succeeded = is_answered(number) || reply.number() == Some(0);
        if let (Some(ring), true) = (ring, succeeded) {
            self.ring_changed(number, ring)?;
        }
        if is_answered(number) {
            for part in &mut self.parts {
                part.reply(reply)?;
            }
        }
        Ok(())
    }

    fn ring_changed(&mut self, number: u32, ring: usize) -> Result<(), Refusal> {
        let was_running = self.is_running();
        if let Some(running) = self.running.get_mut(ring) {
            *running = number == request::SET_VRING_KICK;
        }
        match (was_running, self.is_running()) {
            (false, true) => self.parts.iter_mut().for_each(|part| part.first_ring_started()),
            (true, false) => {
                for part in &mut self.parts {
                    part.last_ring_stopped()?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn is_running(&self) -> bool {
        self.running.iter().any(|running| *running)
    }

    fn features(&self) -> u64 {
        self.parts.iter().fold(0, |all, part| all | part.features())
    }

    fn protocol_features(&self) -> u64 {
        self.parts.iter().fold(0, |all, part| all | part.protocol_features())
    }

    fn answer(&self, reply: &Message) -> Result<bool, Refusal> {
        match reply.send(&self.public) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                Err("it does not take its answers".to_owned())
            }
            // It has left; the next message that is not there tells.
            Err(_) => Ok(true),
        }
    }
}

/// The message always has an answer of its own; others are acknowledged on request.
fn is_answered(number: u32) -> bool {
    matches!(
        number,
        request::GET_FEATURES
            | request::GET_VRING_BASE
            | request::GET_PROTOCOL_FEATURES
            | request::GET_QUEUE_NUM
            | request::GET_CONFIG
            | request::GET_INFLIGHT_FD
            | request::GET_MAX_MEM_SLOTS
            | request::GET_SHARED_OBJECT
            | request::SET_DEVICE_STATE_FD
            | request::CHECK_DEVICE_STATE
            | request::GET_SHMEM_CONFIG
            | request::SET_LOG_BASE
    )
}

/// The descriptor by which the guest is to be interrupted from now on, if the message brings one.
fn call_of(message: &Message) -> Option<OwnedFd> {
    let brings = message.request == request::SET_VRING_CALL;
    message.fds.first().filter(|_| brings).and_then(|fd| fd.try_clone().ok())
}

/// The ring that a message starts or stops.
fn ring_of(message: &Message) -> Option<usize> {
    match message.request {
        request::SET_VRING_KICK => message.number().map(|value| (value & RING_MASK) as usize),
        request::GET_VRING_BASE => message.u32_at(0).map(|ring| ring as usize),
        _ => None,
    }
}
