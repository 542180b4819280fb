//! One storage operation at a time, for opening, creating and checking.

use crate::error::Error;
use crate::storage::{Done, Op, Segment, Storage, StorageError, Token};
use std::ops::Range;

/// Tokens of blocking operations, apart from those of an open image.
const TOKEN: Token = Token(u64::MAX);

fn run(st: &mut dyn Storage, op: Op) -> Result<Done, StorageError> {
    st.submit(TOKEN, op);
    let (token, result) = st.wait();
    assert!(token == TOKEN, "nothing else is under way");
    result
}

pub(crate) fn read(
    st: &mut dyn Storage,
    offset: u64,
    len: u64,
    what: &str,
) -> Result<Vec<u8>, Error> {
    match run(st, Op::ReadBytes { offset, len }) {
        Ok(Done::Bytes(bytes)) if bytes.len() as u64 == len => Ok(bytes),
        Ok(_) => Err(Error::storage(StorageError::Io(5), format!("cannot read {what}"), offset)),
        Err(error) => Err(Error::storage(error, format!("cannot read {what}"), offset)),
    }
}

pub(crate) fn write(
    st: &mut dyn Storage,
    offset: u64,
    bytes: &[u8],
    what: &str,
) -> Result<(), Error> {
    let segments = vec![Segment::Bytes(bytes.into())];
    run(st, Op::Write { offset, segments })
        .map(drop)
        .map_err(|error| Error::storage(error, format!("cannot write {what}"), offset))
}

pub(crate) fn write_zeroes(
    st: &mut dyn Storage,
    range: Range<u64>,
    what: &str,
) -> Result<(), Error> {
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(1 << 20);
        run(st, Op::Write { offset: at, segments: vec![Segment::Zero(len)] })
            .map_err(|error| Error::storage(error, format!("cannot write {what}"), at))?;
        at += len;
    }
    Ok(())
}

pub(crate) fn sync(st: &mut dyn Storage) -> Result<(), Error> {
    run(st, Op::Sync).map(drop).map_err(|error| Error {
        kind: crate::error::ErrorKind::Storage(error),
        context: "cannot sync the image file".into(),
        offset: None,
    })
}

pub(crate) fn set_len(st: &mut dyn Storage, len: u64) -> Result<(), Error> {
    run(st, Op::SetLen { len })
        .map(drop)
        .map_err(|error| Error::storage(error, "cannot set the length of the image file", len))
}

pub(crate) fn allocate(st: &mut dyn Storage, range: Range<u64>) -> Result<(), Error> {
    let op = Op::Allocate { offset: range.start, len: range.end - range.start };
    run(st, op)
        .map(drop)
        .map_err(|error| Error::storage(error, "cannot allocate space", range.start))
}

pub(crate) fn punch(st: &mut dyn Storage, range: Range<u64>) -> Result<(), StorageError> {
    run(st, Op::Punch { offset: range.start, len: range.end - range.start }).map(drop)
}

/// The first range of data at or after `offset`.
pub(crate) fn next_data(st: &mut dyn Storage, offset: u64) -> Result<Option<Range<u64>>, Error> {
    match run(st, Op::NextData { offset }) {
        Ok(Done::Data(range)) => Ok(range),
        Ok(_) => Ok(None),
        Err(error) => Err(Error::storage(error, "cannot tell data from holes", offset)),
    }
}
