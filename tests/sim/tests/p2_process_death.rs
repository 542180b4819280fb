//! P2: a write that completed survives the death of the daemon without a flush, as long as the host
//! stays up.

use exd_sim::api::Request;
use exd_sim::engine::ImageConfig;
use exd_sim::explore::{Limits, budget, run_many};
use exd_sim::real::Disk;
use exd_sim::session::Session;
use exd_sim::storage::{Choice, Death, Point, PointKind};

#[test]
fn p2_every_boundary_of_workloads_without_flushes() {
    let (counters, failures) =
        run_many::<Disk>("exd", &["lazy"], 0..u64::MAX, Limits::STANDARD, budget(10));
    eprintln!("P2: {counters}");
    assert!(failures.is_empty(), "{}", failures[0]);
    assert!(counters.process > 0);
}

fn write(offset: u64, len: u64) -> Request {
    Request::Write { offset, len, durable: false }
}

fn killed(point: &Point, keep: bool) -> exd_sim::storage::SimStorage {
    point.crash(&Choice {
        death: Death::Process,
        keep: vec![keep; point.optional(Death::Process)],
        tear: 0,
        log: 1,
        reverse: false,
    })
}

fn compare(session: &mut Session<Disk>) -> Result<(), String> {
    let data = session.read_all()?;
    let size = session.model.size();
    session.model.expect().compare(size, &data).map(|_| ()).map_err(|(_, why)| why)
}

/// A predecessor's write that lands after the successor wrote the same place: with `landed_before`
/// as the lock guarantees it (P9), else as it would be without.
fn late_landing(landed_before: bool) -> Result<(), String> {
    let config = ImageConfig::new(1 << 20, 4096);
    let mut session = Session::<Disk>::create(config.storage(), &config)?;
    session.run(write(0, 4096))?.map_err(|e| e.to_string())?;
    session.run(Request::Flush)?.map_err(|e| e.to_string())?;
    session.submit(write(512, 512))?;
    session.kick()?;
    let death = session.st.point(PointKind::Step);
    assert!(death.optional(Death::Process) > 0, "the write is under way");
    let st = killed(&death, landed_before);
    let model = session.model.after(Death::Process);
    let opened = Session::<Disk>::open(st, model, &config);
    let mut successor = opened.map_err(|r| r.1.text)?;
    successor.run(write(512, 512))?.map_err(|e| e.to_string())?;
    if !landed_before {
        successor.st.land_late(&death);
    }
    compare(&mut successor)
}

#[test]
fn p9_late_writes_are_harmless_before_the_successor_opens() {
    late_landing(true).expect("the lock holds the successor back until they have landed");
}

#[test]
fn p9_late_writes_would_overwrite_the_successors_without_the_lock() {
    let why = late_landing(false).expect_err("the simulator sees what the lock prevents");
    assert!(why.contains("sector 1 holds generation"), "{why}");
}

/// Without its log the image is as after a power loss: consistent, every flushed write there.
#[test]
fn p2_a_lost_log_costs_only_what_was_not_flushed() {
    for seed in 0..50_u64 {
        let config = ImageConfig::new(1 << 20, 4096);
        let mut st = config.storage();
        st.seed(seed);
        let mut session = Session::<Disk>::create(st, &config).expect("creating");
        for index in 0..20 {
            let offset = (seed * 7 + index * 13) % 200 * 512;
            session.run(write(offset, 512 * (1 + index % 9))).expect("driving").expect("writing");
            if index % 7 == 3 {
                session.run(Request::Flush).expect("driving").expect("flushing");
            }
        }
        let mut st = killed(&session.st.point(PointKind::Step), true);
        st.delete_log();
        // The user's view is that of a power loss, the file's is not.
        let model = session.model.after(Death::Host);
        let opened = Session::<Disk>::open(st, model, &config);
        let mut successor = opened.map_err(|r| r.1.text).expect("opening without the log");
        compare(&mut successor).expect("every flushed write is there");
    }
}
