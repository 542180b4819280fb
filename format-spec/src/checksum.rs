//! The checksum of a structure: CRC32 over all of it, with its own field counted as zero.

use crate::header::header_layout;

const CRC: usize = header_layout::crc;

/// CRC32 (IEEE, as in zlib) of `bytes` with the checksum field counted as zero.
/// Bytes too short to hold a header are summed as they are.
pub(crate) fn compute(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    match (bytes.get(..CRC), bytes.get(CRC + 4..)) {
        (Some(before), Some(after)) => {
            hasher.update(before);
            hasher.update(&[0; 4]);
            hasher.update(after);
        }
        _ => hasher.update(bytes),
    }
    hasher.finalize()
}

/// The checksum field of a structure as it stands in `bytes`; 0 if they are too short to hold it.
pub fn crc_of(bytes: &[u8]) -> u32 {
    bytes
        .get(CRC..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |field| u32::from_le_bytes(*field))
}

/// Makes the checksum field of a structure right for its other bytes. For the encoders, and for
/// tests that want bytes to get past the checksum. Bytes too short to hold the field are left alone.
pub fn seal(bytes: &mut [u8]) {
    let crc = compute(bytes);
    if let Some(field) = bytes.get_mut(CRC..CRC + 4) {
        field.copy_from_slice(&crc.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_vector_of_the_specification() {
        assert_eq!(crc32fast::hash(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn the_field_does_not_count() {
        let mut bytes = *b"EXDNxxxxsome more bytes";
        let before = compute(&bytes);
        seal(&mut bytes);
        assert_eq!(compute(&bytes), before);
        assert_eq!(crc_of(&bytes), before);
        assert_eq!(before, crc32fast::hash(b"EXDN\0\0\0\0some more bytes"));
    }

    #[test]
    fn short_bytes_are_harmless() {
        for len in 0..8 {
            let mut bytes = vec![7; len];
            seal(&mut bytes);
            assert_eq!(bytes, vec![7; len]);
            assert_eq!(crc_of(&bytes), 0);
        }
    }
}
