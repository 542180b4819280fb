//! The holder record: who has the image open. True only while the image is locked.

use crate::error::{DecodeError, ensure};
use crate::fields::{Id16, Text, U32, U64, located, put_at};
use crate::header::{self, StructureType};

/// Byte offset of the holder record in the image file.
pub const HOLDER_OFFSET: u64 = 8192;
/// Bytes of the holder record.
pub const HOLDER_SIZE: usize = 4096;

const NAME: &str = "holder record";

type NameText = Text<64>;
type DetailText = Text<512>;

structure! {
    /// Who has the image open for writing.
    pub struct Holder, holder_layout, 4096; {
        (kind: U32) = 0,
        (crc: U32) = 4,
        /// Epoch of the session.
        epoch: u64 as U64 = 8,
        (address: U64) = 16,
        /// Identity of the image.
        uuid: [u8; 16] as Id16 = 24,
        /// Process id.
        pid: u64 as U64 = 40,
        /// When it opened the image, seconds since 1970.
        started: u64 as U64 = 48,
        /// Boot id of its host.
        boot_id: [u8; 16] as Id16 = 56,
        /// Host name, at most 62 bytes.
        host: String as NameText = 72,
        /// Program, at most 62 bytes.
        program: String as NameText = 136,
        /// Whatever helps to find it, such as its socket; at most 510 bytes.
        detail: String as DetailText = 200,
        [3384] = 712,
    }
}

impl Holder {
    /// The 4096 bytes of the record, sealed. Texts too long for their field are cut, not refused:
    /// the record only informs. A zero byte ends a text.
    pub fn encode(&self) -> Vec<u8> {
        let cut = Holder {
            host: fitting(&self.host, 62),
            program: fitting(&self.program, 62),
            detail: fitting(&self.detail, 510),
            ..self.clone()
        };
        let mut bytes = vec![0; HOLDER_SIZE];
        cut.put_fields(&mut bytes);
        put_at::<U64>(&HOLDER_OFFSET, &mut bytes, holder_layout::address);
        header::finish(StructureType::Holder, &mut bytes);
        bytes
    }

    /// Decodes the record of the image with this uuid.
    pub fn decode(bytes: &[u8], uuid: &[u8; 16]) -> Result<Holder, DecodeError> {
        ensure(bytes.len() == HOLDER_SIZE, NAME, 0, "not 4096 bytes")?;
        header::check(StructureType::Holder, bytes, HOLDER_OFFSET, Some(uuid))?;
        Holder::check_reserved(bytes).map_err(located(NAME))?;
        Holder::get_fields(bytes).map_err(located(NAME))
    }
}

/// The longest beginning of `text` that has at most `max` bytes and no zero byte.
fn fitting(text: &str, max: usize) -> String {
    let text = text.split('\0').next().unwrap_or_default();
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{UUID, corruption, each_bit_flip, each_sealed_flip, patched};

    fn holder() -> Holder {
        Holder {
            epoch: 3,
            uuid: UUID,
            pid: 4242,
            started: 1_700_000_000,
            boot_id: [9; 16],
            host: "host".to_owned(),
            program: "vhost-daemon".to_owned(),
            detail: "/run/disk.sock".to_owned(),
        }
    }

    #[test]
    fn round_trip() {
        let bytes = holder().encode();
        assert_eq!(bytes.len(), HOLDER_SIZE);
        assert_eq!(Holder::decode(&bytes, &UUID), Ok(holder()));
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let long = Holder {
            host: format!("a{}", "\u{e9}".repeat(40)),
            program: "x\0y".to_owned(),
            detail: "d".repeat(10_000),
            ..holder()
        };
        let found = Holder::decode(&long.encode(), &UUID).expect("decodes");
        assert_eq!(found.host.len(), 61);
        assert_eq!(found.program, "x");
        assert_eq!(found.detail.len(), 510);
    }

    #[test]
    fn every_bit_flip_is_seen_and_sealed_ones_are_harmless() {
        let bytes = holder().encode();
        each_bit_flip(&bytes, |bytes| Holder::decode(bytes, &UUID).is_ok());
        each_sealed_flip(&bytes, |bytes| {
            Holder::decode(bytes, &UUID).ok().map(|found| found.encode())
        });
    }

    #[test]
    fn rejects() {
        let bytes = holder().encode();
        corruption(Holder::decode(&bytes, &[0; 16]));
        corruption(Holder::decode(&bytes[..4095], &UUID));
        corruption(Holder::decode(&patched(&bytes, holder_layout::host, &[63]), &UUID));
        corruption(Holder::decode(&patched(&bytes, holder_layout::host + 2, &[0xFF]), &UUID));
        corruption(Holder::decode(&patched(&bytes, 4000, &[1]), &UUID));
        corruption(Holder::decode(&patched(&bytes, 17, &[0]), &UUID));
    }
}
