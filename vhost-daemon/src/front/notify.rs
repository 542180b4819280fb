//! Tells the front-end that the configuration has changed, which it does not ask for again by itself.

use crate::front::message::{Message, request};
use crate::front::relay::{Part, Refusal, Verdict};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// BACKEND_CONFIG_CHANGE_MSG, on the back-end's own channel.
const CONFIG_CHANGE: u32 = 2;
/// In GET_CONFIG and its answer: offset, size and flags come before the bytes.
const CONFIG_HEADER: usize = 12;

/// Finds the front-end that is connected, if any, and tells it. Lives as long as the disk is served.
#[derive(Clone, Debug, Default)]
pub struct Notifier(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The back-end's channel to the front-end, and whether it answers on it.
    channel: Option<(UnixStream, bool)>,
    /// Rings are running. A front-end ignores notifications while they are not.
    running: bool,
    /// The disk's size in bytes.
    capacity: u64,
    /// The size that the front-end was told, as far as we know.
    told: Option<u64>,
}

impl Notifier {
    /// The disk has a new size in bytes. Returns at once: the front-end asks for the configuration when it
    /// sees fit, if its device runs, or else is told when it does.
    pub fn config_changed(&self, capacity: u64) {
        let mut state = self.state();
        state.capacity = capacity;
        state.tell();
    }

    /// The front-end was told this size in bytes by an earlier process or connection.
    pub fn was_told(&self, capacity: u64) {
        self.state().told.get_or_insert(capacity);
    }

    /// The size in bytes that the front-end was told, if we know.
    pub fn told(&self) -> Option<u64> {
        self.state().told
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Sends the notification if it is needed and can be heard.
    fn tell(&mut self) {
        let State { channel: Some((socket, acknowledged)), running: true, .. } = self else {
            return;
        };
        if self.told == Some(self.capacity) {
            return;
        }
        let mut message = Message::request(CONFIG_CHANGE, Vec::new());
        message.set_needs_reply(*acknowledged);
        match message.send_now(socket) {
            Ok(()) => log::debug!("told the front-end that the configuration has changed"),
            Err(error) => log::warn!("the front-end cannot be told of a new size: {error}"),
        }
    }
}

/// The relay's part of it.
#[derive(Debug)]
pub struct NotifyPart {
    notifier: Notifier,
    protocol_features: u64,
}

impl NotifyPart {
    /// For a connection to a disk of this size in bytes.
    pub fn new(notifier: Notifier, capacity: u64) -> NotifyPart {
        *notifier.state() = State { capacity, ..State::default() };
        NotifyPart { notifier, protocol_features: 0 }
    }

    fn agreed(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features & feature.bits() != 0
    }

    fn keep(&mut self, message: &mut Message) -> Result<(), Refusal> {
        let (Some(fd), true) = (message.fds.pop(), message.fds.is_empty()) else {
            return Err("SET_BACKEND_REQ_FD without its one descriptor".to_owned());
        };
        let socket = UnixStream::from(fd);
        let acknowledged = self.agreed(VhostUserProtocolFeatures::REPLY_ACK);
        // Also tells that it is a socket at all.
        let answers = socket
            .local_addr()
            .and_then(|_| socket.try_clone())
            .map_err(|error| format!("the descriptor of SET_BACKEND_REQ_FD: {error}"))?;
        if acknowledged {
            read_answers(answers).map_err(|error| format!("no thread: {error}"))?;
        }
        self.notifier.state().channel = Some((socket, acknowledged));
        Ok(())
    }
}

impl Part for NotifyPart {
    fn protocol_features(&self) -> u64 {
        VhostUserProtocolFeatures::BACKEND_REQ.bits()
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<(), Refusal> {
        self.protocol_features = features;
        Ok(())
    }

    fn request(&mut self, message: &mut Message) -> Result<Verdict, Refusal> {
        if message.request != request::SET_BACKEND_REQ_FD {
            return Ok(Verdict::Forward);
        }
        if !self.agreed(VhostUserProtocolFeatures::BACKEND_REQ) {
            return Err("SET_BACKEND_REQ_FD without its protocol feature".to_owned());
        }
        self.keep(message)?;
        Ok(Verdict::Done)
    }

    fn reply(&mut self, reply: &mut Message) -> Result<(), Refusal> {
        let covers = reply.request == request::GET_CONFIG && reply.u32_at(0) == Some(0);
        if let (true, Some(sectors)) = (covers, reply.u64_at(CONFIG_HEADER)) {
            self.notifier.state().told = sectors.checked_mul(512);
        }
        Ok(())
    }

    fn first_ring_started(&mut self) {
        let mut state = self.notifier.state();
        state.running = true;
        state.tell();
    }

    fn last_ring_stopped(&mut self) -> Result<(), Refusal> {
        self.notifier.state().running = false;
        Ok(())
    }
}

impl Drop for NotifyPart {
    fn drop(&mut self) {
        let mut state = self.notifier.state();
        if let Some((socket, _)) = state.channel.take() {
            // Ends the thread that reads the answers. Nothing to do if the other side has left.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        state.running = false;
    }
}

/// Reads what the front-end answers on the back-end's channel, until that is closed. On a thread of its
/// own: to answer, the front-end may first need an answer from us.
fn read_answers(socket: UnixStream) -> io::Result<()> {
    let reader = move || {
        while let Ok(Some(answer)) = Message::receive(&socket) {
            if answer.number().is_some_and(|result| result != 0) {
                log::warn!("the front-end could not take the new configuration");
            }
        }
    };
    thread::Builder::new().name("answers".to_owned()).spawn(reader)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn connected(notifier: &Notifier, acknowledged: bool) -> (NotifyPart, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        theirs.set_nonblocking(true).expect("set");
        let mut part = NotifyPart::new(notifier.clone(), SIZE);
        let ack = if acknowledged { VhostUserProtocolFeatures::REPLY_ACK.bits() } else { 0 };
        part.set_protocol_features(part.protocol_features() | ack).expect("set");
        let mut message = Message::request(request::SET_BACKEND_REQ_FD, Vec::new());
        message.fds.push(ours.into());
        assert!(matches!(part.request(&mut message), Ok(Verdict::Done)));
        (part, theirs)
    }

    fn is_told(front_end: &UnixStream) -> bool {
        match Message::receive(front_end) {
            Ok(Some(message)) => {
                assert_eq!((message.request, message.body.len()), (CONFIG_CHANGE, 0));
                true
            }
            _ => false,
        }
    }

    fn asks(part: &mut NotifyPart, sectors: u64) {
        let mut body = vec![0; CONFIG_HEADER];
        body.extend(sectors.to_le_bytes());
        part.reply(&mut Message::reply(request::GET_CONFIG, body)).expect("seen");
    }

    #[test]
    fn told_while_it_runs_or_when_it_does() {
        let notifier = Notifier::default();
        for acknowledged in [false, true] {
            let (mut part, front_end) = connected(&notifier, acknowledged);
            asks(&mut part, SIZE / 512);
            part.first_ring_started();
            assert!(!is_told(&front_end), "it knows");
            notifier.config_changed(2 * SIZE);
            assert!(is_told(&front_end));
            asks(&mut part, 2 * SIZE / 512);
            part.last_ring_stopped().expect("stopped");
            notifier.config_changed(3 * SIZE);
            assert!(!is_told(&front_end), "it would not listen");
            part.first_ring_started();
            assert!(is_told(&front_end));
        }
    }

    /// After a reconnect the front-end does not ask again.
    #[test]
    fn a_front_end_that_may_know_another_size_is_told() {
        let notifier = Notifier::default();
        let (mut part, front_end) = connected(&notifier, false);
        part.first_ring_started();
        assert!(is_told(&front_end));
        drop(part);
        for (before, told) in [(SIZE, false), (2 * SIZE, true)] {
            let (mut part, front_end) = connected(&notifier, false);
            notifier.was_told(before);
            part.first_ring_started();
            assert_eq!(is_told(&front_end), told);
        }
    }

    #[test]
    fn wrong_descriptors_are_refused() {
        let mut part = NotifyPart::new(Notifier::default(), SIZE);
        let mut message = Message::request(request::SET_BACKEND_REQ_FD, Vec::new());
        assert!(part.request(&mut message).is_err(), "without the feature");
        part.set_protocol_features(part.protocol_features()).expect("set");
        assert!(part.request(&mut message).is_err(), "without a descriptor");
        message.fds.push(std::fs::File::open("/dev/null").expect("open").into());
        assert!(part.request(&mut message).is_err(), "not a socket");
        assert!(part.notifier.state().channel.is_none());
    }

    /// Nobody reads: the daemon does not wait.
    #[test]
    fn a_front_end_that_does_not_listen_holds_nobody_up() {
        let notifier = Notifier::default();
        let (mut part, _front_end) = connected(&notifier, false);
        part.first_ring_started();
        for size in 2..10_000 {
            notifier.config_changed(size * SIZE);
        }
    }
}
