//! The bytes of a simulated host file: sparse, copy-on-write, cheap to clone and to hash.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// The simulated host's allocation unit in bytes.
pub const PAGE: u64 = 4096;
const PAGE_USIZE: usize = PAGE as usize;

#[derive(Clone)]
struct Page {
    bytes: [u8; PAGE_USIZE],
    hash: OnceLock<u64>,
}

impl Page {
    fn new(bytes: [u8; PAGE_USIZE]) -> Arc<Page> {
        Arc::new(Page { bytes, hash: OnceLock::new() })
    }

    fn hash(&self) -> u64 {
        *self.hash.get_or_init(|| {
            let mut hasher = DefaultHasher::new();
            hasher.write(&self.bytes);
            hasher.finish()
        })
    }
}

/// A sparse file. A page that is absent is a hole: it reads as zero, or as poison on a device.
#[derive(Clone, Default)]
pub struct HostFile {
    pages: Arc<BTreeMap<u64, Arc<Page>>>,
    len: u64,
    poisoned: bool,
}

impl HostFile {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// A device of fixed length whose never-written bytes are not zero.
    pub fn poisoned(len: u64) -> Self {
        HostFile { pages: Arc::default(), len, poisoned: true }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for a file of no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of pages that hold data.
    pub fn data_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// True when the page that contains `offset` holds data.
    pub fn has_data(&self, offset: u64) -> bool {
        self.pages.contains_key(&(offset / PAGE))
    }

    fn absent(&self, page: u64) -> [u8; PAGE_USIZE] {
        if !self.poisoned {
            return [0; PAGE_USIZE];
        }
        let mut bytes = [0xA5; PAGE_USIZE];
        for chunk in bytes.chunks_mut(64) {
            chunk[..8].copy_from_slice(&(page | 0xDEAD << 48).to_le_bytes());
        }
        bytes
    }

    /// Reads; what lies past the end is zero.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let n = (PAGE_USIZE - within).min(buf.len() - done);
            let out = &mut buf[done..done + n];
            match self.pages.get(&(at / PAGE)) {
                Some(page) => out.copy_from_slice(&page.bytes[within..within + n]),
                None if self.poisoned => {
                    out.copy_from_slice(&self.absent(at / PAGE)[within..within + n]);
                }
                None => out.fill(0),
            }
            done += n;
        }
        if offset + buf.len() as u64 > self.len {
            let keep = self.len.saturating_sub(offset) as usize;
            buf[keep..].fill(0);
        }
    }

    fn edit(&mut self, page: u64) -> &mut [u8; PAGE_USIZE] {
        let fresh = if self.pages.contains_key(&page) { None } else { Some(self.absent(page)) };
        let pages = Arc::make_mut(&mut self.pages);
        let entry = pages.entry(page).or_insert_with(|| Page::new(fresh.unwrap_or([0; 4096])));
        let page = Arc::make_mut(entry);
        page.hash = OnceLock::new();
        &mut page.bytes
    }

    /// Stores bytes without changing the length.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let n = (PAGE_USIZE - within).min(data.len() - done);
            self.edit(at / PAGE)[within..within + n].copy_from_slice(&data[done..done + n]);
            done += n;
        }
    }

    /// Gives a range back: whole pages become holes, parts of pages become zero.
    pub fn punch(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let page = at / PAGE;
            let page_end = (page + 1) * PAGE;
            let to = end.min(page_end);
            let whole = at.is_multiple_of(PAGE) && to == page_end;
            if whole && !self.poisoned {
                if self.pages.contains_key(&page) {
                    Arc::make_mut(&mut self.pages).remove(&page);
                }
            } else if self.poisoned || self.pages.contains_key(&page) {
                let range = (at % PAGE) as usize..(to - page * PAGE) as usize;
                self.edit(page)[range].fill(0);
            }
            at = to;
        }
    }

    /// Makes the file at least `len` bytes long.
    pub fn extend(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// Sets the length; what is cut off is gone.
    pub fn set_len(&mut self, len: u64) {
        self.len = len;
        self.cut();
    }

    /// Drops what lies past the end: data whose length change was lost.
    pub fn cut(&mut self) {
        let first_gone = self.len.div_ceil(PAGE);
        if self.pages.range(first_gone..).next().is_some() {
            let _ = Arc::make_mut(&mut self.pages).split_off(&first_gone);
        }
        let within = (self.len % PAGE) as usize;
        if within != 0 && self.pages.contains_key(&(self.len / PAGE)) {
            self.edit(self.len / PAGE)[within..].fill(0);
        }
    }

    /// The first run of data pages at or after `offset` (SEEK_DATA, SEEK_HOLE).
    pub fn next_data(&self, offset: u64) -> Option<Range<u64>> {
        if self.poisoned {
            return (offset < self.len).then_some(offset..self.len);
        }
        let mut pages = self.pages.range(offset / PAGE..).map(|(page, _)| *page);
        let first = pages.next()?;
        let mut end = first + 1;
        while pages.next() == Some(end) {
            end += 1;
        }
        let range = offset.max(first * PAGE)..(end * PAGE).min(self.len);
        (range.start < range.end).then_some(range)
    }

    /// A hash of content, holes and length.
    pub fn hash(&self) -> u64 {
        let mut sum = mix(self.len ^ 0x5151);
        for (number, page) in self.pages.iter() {
            sum = sum.wrapping_add(mix(page.hash() ^ mix(number + 1)));
        }
        sum
    }
}

/// Mixes the bits of a number (the finaliser of splitmix64).
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_was_written_and_zero_elsewhere() {
        let mut file = HostFile::new();
        file.write(1 << 50, &[7; 5000]);
        file.extend((1 << 50) + 5000);
        let mut buf = vec![1; 6000];
        file.read((1 << 50) - 500, &mut buf);
        assert!(buf[..500].iter().all(|b| *b == 0));
        assert!(buf[500..5500].iter().all(|b| *b == 7));
        assert!(buf[5500..].iter().all(|b| *b == 0));
    }

    #[test]
    fn hash_follows_content_not_history() {
        let mut a = HostFile::new();
        a.write(0, &[1; 4096]);
        a.write(8192, &[2; 4096]);
        a.extend(12288);
        let mut b = HostFile::new();
        b.extend(12288);
        b.write(8192, &[2; 4096]);
        b.write(0, &[3; 4096]);
        assert_ne!(a.hash(), b.hash());
        b.write(0, &[1; 4096]);
        assert_eq!(a.hash(), b.hash());
        b.punch(0, 4096);
        b.punch(8192, 512);
        assert_eq!(b.next_data(0), Some(8192..12288));
        assert_ne!(a.hash(), b.hash());
    }

    #[test]
    fn cutting_and_growing_reads_zero() {
        let mut file = HostFile::new();
        file.write(0, &[9; 8192]);
        file.extend(8192);
        file.set_len(1000);
        file.extend(8192);
        let mut buf = vec![1; 8192];
        file.read(0, &mut buf);
        assert!(buf[..1000].iter().all(|b| *b == 9));
        assert!(buf[1000..].iter().all(|b| *b == 0));
    }

    #[test]
    fn a_device_is_poisoned_until_written() {
        let mut file = HostFile::poisoned(1 << 20);
        let mut buf = vec![0; 512];
        file.read(4096, &mut buf);
        assert!(buf.iter().any(|b| *b != 0));
        file.punch(4096, 4096);
        file.read(4096, &mut buf);
        assert!(buf.iter().all(|b| *b == 0));
    }
}
