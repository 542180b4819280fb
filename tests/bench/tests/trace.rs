//! What vhost-daemon records is what the client did, and can be replayed.

#![forbid(unsafe_code)]

use exd_bench::Result;
use exd_bench::backend::{Backend, Shape, Target, create};
use exd_bench::client::{Connection, Op};
use exd_bench::stats::Latencies;
use exd_bench::trace::{Request, Trace, replay};
use exd_guest_tests::{Programs, programs};
use std::path::Path;

const SHAPE: Shape = Shape { size: 64 << 20, span: 64 << 20, keeps_space: false, block_size: None };
const SLOT: usize = 64 << 10;

/// Records what `work` does on a new image.
fn recorded(dir: &Path, work: impl FnOnce(&mut Connection) -> Result<()>) -> Result<Trace> {
    let built = Programs::build()?;
    let (image, file) = (dir.join("disk"), dir.join("trace"));
    create(&built, Target::Exd, &image, SHAPE)?;
    let args = [format!("--record-trace={}", file.display())];
    let backend = Backend::start(&built, Target::Exd, &image, 1, &args)?;
    let mut connection = Connection::open(backend.socket(), 1, 4, SLOT)?;
    work(&mut connection)?;
    drop(connection);
    backend.close()?;
    std::fs::remove_file(&image)?;
    Trace::read(&file)
}

fn scratch() -> Result<tempfile::TempDir> {
    std::fs::create_dir_all(programs::target())?;
    Ok(tempfile::Builder::new().prefix("exd-bench-").tempdir_in(programs::target())?)
}

/// Two requests in flight together, then others one after another.
fn work(connection: &mut Connection) -> Result<()> {
    let queue = &mut connection.queues[0];
    queue.start(0, Op::Write(63 * 512, 4096));
    queue.start(1, Op::Write(71 * 512, 8192));
    let mut ends = Vec::new();
    while queue.in_flight() > 0 {
        queue.wait(&mut ends)?;
    }
    queue.carry_out(2, Op::Flush)?;
    queue.carry_out(0, Op::Zero(1 << 20, 65536, true))?;
    queue.carry_out(0, Op::Discard(0, 4096))?;
    queue.carry_out(3, Op::Read(63 * 512, SLOT))
}

#[test]
fn a_recording_can_be_replayed_and_recorded_again() -> Result<()> {
    let dir = scratch()?;
    let first = recorded(dir.path(), work)?;
    let requests: Vec<Request> = first.steps.iter().map(|step| step.request).collect();
    let wanted = [
        Request::Write(63, 8),
        Request::Write(71, 16),
        Request::Flush,
        Request::Zero(2048, 128),
        Request::Discard(0, 8),
        Request::Read(63, 128),
    ];
    assert_eq!(requests, wanted);
    assert_eq!(first.missing, 0);
    assert!(first.steps[1].after.is_empty(), "the writes were in flight together");
    let mut before_flush = first.steps[2].after.clone();
    before_flush.sort_unstable();
    assert_eq!(before_flush, [0, 1]);
    assert!((3..6).all(|number| first.steps[number].after == [number - 1]), "one by one");

    let mut bytes = 0;
    let second = recorded(dir.path(), |connection| {
        let queue = &mut connection.queues[0];
        let expected = replay(queue, &first, &mut Latencies::default())?;
        bytes = expected.verify(queue)?;
        Ok(())
    })?;
    assert_eq!(bytes, 4096 + 8192 + 65536, "the sectors written and zeroed");
    // The verification has added reads.
    let again = &second.steps[..first.steps.len()];
    let requests_again: Vec<Request> = again.iter().map(|step| step.request).collect();
    assert_eq!(requests_again, requests);
    Ok(())
}
