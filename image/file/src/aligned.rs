//! Memory at an address that direct I/O accepts.

use std::ops::{Deref, DerefMut};

/// A zeroed buffer whose first byte lies at a multiple of its alignment.
#[derive(Debug)]
pub struct AlignedBuf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// A buffer of `len` zero bytes at a multiple of `alignment`, a power of two.
    pub fn new(len: usize, alignment: usize) -> Self {
        assert!(alignment.is_power_of_two(), "alignment is a power of two");
        let memory = vec![0u8; len + alignment - 1];
        let start = memory.as_ptr().align_offset(alignment);
        assert!(start < alignment, "byte pointers can always be aligned");
        AlignedBuf { memory, start, len }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_and_of_the_length_asked_for() {
        for alignment in [1, 512, 4096, 65536] {
            let buffer = AlignedBuf::new(1000, alignment);
            assert_eq!(buffer.as_ptr() as usize % alignment, 0);
            assert_eq!(buffer.len(), 1000);
            assert!(buffer.iter().all(|byte| *byte == 0));
        }
    }
}
