//! The messages about requests in flight and about rings that fail: what the library refuses or keeps to
//! itself.

use crate::front::message::{Message, request};
use crate::front::notify::Notifier;
use crate::front::relay::{Part, Refusal, Verdict};
use crate::queue::errors::RingErrors;
use crate::queue::inflight::{Inflight, Layout, Region};
use crate::queue::worker::QUEUE_SIZE_MAX;
use std::sync::Arc;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// Length of the payload: size, offset, number of queues, entries, padding. (QEMU sends the padding; the
/// document does not name it.)
const PAYLOAD: usize = 24;
const PAYLOAD_WITHOUT_PADDING: usize = 20;
/// In SET_VRING_ERR: there is no descriptor.
const NO_FD: u64 = 0x100;
/// In SET_VRING_ERR: the number of the ring.
const RING_MASK: u64 = 0xff;

/// The relay's part that hands out and takes back the inflight region.
pub struct TrackingPart {
    inflight: Arc<Inflight>,
    notifier: Notifier,
    /// The region in use, for the note in it.
    region: Option<Arc<Region>>,
    queues: u16,
    agreed: bool,
}

impl TrackingPart {
    /// For a device with so many queues.
    pub fn new(inflight: Arc<Inflight>, notifier: Notifier, queues: u16) -> TrackingPart {
        TrackingPart { inflight, notifier, region: None, queues, agreed: false }
    }

    /// The layout that a message asks for.
    fn layout(&self, message: &Message) -> Result<Layout, Refusal> {
        let known = [PAYLOAD, PAYLOAD_WITHOUT_PADDING].contains(&message.body.len());
        let (true, Some(queues), Some(entries)) = (known, message.u16_at(16), message.u16_at(18))
        else {
            return Err(format!("an inflight message of {} bytes", message.body.len()));
        };
        let layout = Layout { queues, entries };
        if !(1..=self.queues).contains(&queues) {
            return Err(format!("an inflight region for {queues} queues of {}", self.queues));
        }
        if !(1..=QUEUE_SIZE_MAX).contains(&usize::from(entries)) {
            return Err(format!("an inflight region for queues of {entries} entries"));
        }
        Ok(layout)
    }

    fn hand_out(&self, message: &Message) -> Result<Message, Refusal> {
        let layout = self.layout(message)?;
        let (bytes, fd) = match Region::create(layout) {
            Ok((_, fd)) => (layout.bytes(), Some(fd)),
            Err(error) => {
                // Size 0 says so to the front-end.
                log::error!("no memory for an inflight region, requests are not tracked: {error}");
                (0, None)
            }
        };
        let mut body = Vec::with_capacity(PAYLOAD);
        body.extend((bytes as u64).to_le_bytes());
        body.extend(0u64.to_le_bytes());
        body.extend(layout.queues.to_le_bytes());
        body.extend(layout.entries.to_le_bytes());
        body.resize(PAYLOAD, 0);
        let mut reply = Message::reply(request::GET_INFLIGHT_FD, body);
        reply.fds.extend(fd);
        Ok(reply)
    }

    fn take_back(&mut self, message: &mut Message) -> Result<(), Refusal> {
        let layout = self.layout(message)?;
        let (Some(bytes), Some(offset)) = (message.u64_at(0), message.u64_at(8)) else {
            return Err("an inflight message that is too short".to_owned());
        };
        if bytes != layout.bytes() as u64 {
            return Err(format!(
                "an inflight region of {bytes} bytes for {} queues of {} entries: \
                 {} bytes are expected",
                layout.queues,
                layout.entries,
                layout.bytes()
            ));
        }
        let (Some(fd), true) = (message.fds.pop(), message.fds.is_empty()) else {
            return Err("SET_INFLIGHT_FD without its one descriptor".to_owned());
        };
        let region = Region::map(fd, offset, layout)
            .map_err(|error| format!("an inflight region that cannot be used: {error}"))?;
        let region = Arc::new(region);
        match (self.notifier.told(), region.told_capacity()) {
            (Some(told), _) => region.set_told_capacity(told),
            (None, Some(told)) => self.notifier.was_told(told),
            (None, None) => {}
        }
        self.inflight.set(Some(region.clone()));
        self.region = Some(region);
        Ok(())
    }
}

impl Part for TrackingPart {
    fn protocol_features(&self) -> u64 {
        VhostUserProtocolFeatures::INFLIGHT_SHMFD.bits()
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<(), Refusal> {
        self.agreed = features & self.protocol_features() != 0;
        Ok(())
    }

    fn request(&mut self, message: &mut Message) -> Result<Verdict, Refusal> {
        match message.request {
            request::GET_INFLIGHT_FD | request::SET_INFLIGHT_FD if !self.agreed => {
                Err("an inflight message without its protocol feature".to_owned())
            }
            request::GET_INFLIGHT_FD => Ok(Verdict::Answer(self.hand_out(message)?)),
            request::SET_INFLIGHT_FD => {
                self.take_back(message)?;
                Ok(Verdict::Done)
            }
            _ => Ok(Verdict::Forward),
        }
    }

    fn reply(&mut self, reply: &mut Message) -> Result<(), Refusal> {
        if let (request::GET_CONFIG, Some(region), Some(told)) =
            (reply.request, &self.region, self.notifier.told())
        {
            region.set_told_capacity(told);
        }
        Ok(())
    }
}

/// The relay's part that keeps the descriptors of SET_VRING_ERR, since the library does not give its own
/// away.
pub struct ErrorsPart(pub Arc<RingErrors>);

impl Part for ErrorsPart {
    fn request(&mut self, message: &mut Message) -> Result<Verdict, Refusal> {
        if let (request::SET_VRING_ERR, Some(value)) = (message.request, message.number()) {
            let fd = if value & NO_FD == 0 { message.fds.first() } else { None };
            let ring = (value & RING_MASK) as u16;
            fd.map(|fd| fd.try_clone())
                .transpose()
                .and_then(|fd| self.0.set(ring, fd))
                .map_err(|error| format!("the descriptor of SET_VRING_ERR: {error}"))?;
        }
        Ok(Verdict::Forward)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::OwnedFd;

    fn part() -> TrackingPart {
        let mut part = TrackingPart::new(Arc::default(), Notifier::default(), 4);
        part.set_protocol_features(part.protocol_features()).expect("set");
        part
    }

    fn message(request: u32, fields: (u64, u64, u16, u16), fd: Option<OwnedFd>) -> Message {
        let mut body = Vec::new();
        body.extend(fields.0.to_le_bytes());
        body.extend(fields.1.to_le_bytes());
        body.extend(fields.2.to_le_bytes());
        body.extend(fields.3.to_le_bytes());
        body.resize(PAYLOAD, 0);
        let mut message = Message::request(request, body);
        message.fds.extend(fd);
        message
    }

    fn get(part: &mut TrackingPart, queues: u16, entries: u16) -> Message {
        let mut message = message(request::GET_INFLIGHT_FD, (0, 0, queues, entries), None);
        match part.request(&mut message) {
            Ok(Verdict::Answer(answer)) => answer,
            other => panic!("{other:?}"),
        }
    }

    fn set(
        part: &mut TrackingPart,
        fields: (u64, u64, u16, u16),
        fd: Option<OwnedFd>,
    ) -> Result<Verdict, Refusal> {
        part.request(&mut message(request::SET_INFLIGHT_FD, fields, fd))
    }

    #[test]
    fn a_region_that_was_handed_out_is_taken_back() {
        let mut part = part();
        let mut answer = get(&mut part, 2, 128);
        assert_eq!(answer.body.len(), PAYLOAD);
        let bytes = Layout { queues: 2, entries: 128 }.bytes() as u64;
        assert_eq!((answer.u64_at(0), answer.u64_at(8)), (Some(bytes), Some(0)));
        assert_eq!((answer.u16_at(16), answer.u16_at(18)), (Some(2), Some(128)));
        let fd = answer.fds.pop();
        let again = fd.as_ref().map(|fd| fd.try_clone().expect("dup"));
        assert!(matches!(set(&mut part, (bytes, 0, 2, 128), fd), Ok(Verdict::Done)));
        assert!(matches!(set(&mut part, (bytes, 0, 2, 128), again), Ok(Verdict::Done)));
    }

    #[test]
    fn a_region_of_another_layout_is_refused() {
        let mut part = part();
        let bytes = Layout { queues: 2, entries: 128 }.bytes() as u64;
        let fd = || Some(get(&mut self::part(), 2, 128).fds.remove(0));
        for fields in [
            (bytes, 0, 2, 64),
            (bytes, 0, 1, 128),
            (bytes, 0, 0, 128),
            (bytes, 0, 5, 128),
            (bytes, 0, 2, 0),
            (bytes, 0, 2, 1025),
            (0, 0, 2, 128),
            (bytes - 1, 0, 2, 128),
            (u64::MAX, 0, 2, 128),
            (bytes, 4096, 2, 128),
            (bytes, 1, 2, 128),
            (bytes, u64::MAX, 2, 128),
            (bytes, u64::MAX - bytes + 1, 2, 128),
            (bytes, 1 << 63, 2, 128),
        ] {
            let refused = set(&mut part, fields, fd());
            assert!(refused.is_err(), "{fields:?}");
        }
        assert!(set(&mut part, (bytes, 0, 2, 128), None).is_err());
        let open = || Some(File::open("/dev/zero").expect("open").into());
        assert!(set(&mut part, (bytes, 0, 2, 128), open()).is_err());
        let unsealed = tempfile::tempfile().expect("temporary file");
        unsealed.set_len(1 << 20).expect("grow");
        assert!(set(&mut part, (bytes, 0, 2, 128), Some(unsealed.into())).is_err());
        assert!(part.region.is_none());
        let mut short = Message::request(request::GET_INFLIGHT_FD, vec![0; 19]);
        assert!(part.request(&mut short).is_err());
        part.set_protocol_features(0).expect("set");
        assert!(set(&mut part, (bytes, 0, 2, 128), fd()).is_err(), "not agreed");
    }

    /// What the front-end knows of the disk's size outlives the process.
    #[test]
    fn the_region_remembers_what_the_front_end_was_told() {
        let bytes = Layout { queues: 1, entries: 16 }.bytes() as u64;
        let mut first = part();
        let fd = get(&mut first, 1, 16).fds.remove(0);
        first.notifier.was_told(1 << 30);
        set(&mut first, (bytes, 0, 1, 16), Some(fd.try_clone().expect("dup"))).expect("taken");
        let mut second = part();
        set(&mut second, (bytes, 0, 1, 16), Some(fd)).expect("taken");
        assert_eq!(second.notifier.told(), Some(1 << 30));
    }
}
