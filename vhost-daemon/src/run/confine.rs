//! What the process must be able to reach once it is confined.

use crate::args::{Args, Format, ProcessArgs};
use crate::run::instance::{Plan, Source};
use crate::sandbox::Reach;
use exd_file::{FileStorage, HostFile, LogKeeper, OpenMode};
use exd_image::peek_log;
use std::os::linux::fs::MetadataExt;

/// For the process and its disks. Makes the directories of the completion logs ready.
pub fn reach(process: &ProcessArgs, disks: &[Plan]) -> Reach {
    let mut reach = Reach::new();
    if let Some(path) = &process.control_path {
        reach.socket(path);
    }
    for plan in disks {
        for source in [Some(&plan.main), plan.read_only.as_ref()].into_iter().flatten() {
            if let Source::Path(path) = source {
                reach.socket(path);
            }
        }
        let args = &plan.args;
        if args.read_only {
            reach.read(&args.blk_file);
        } else {
            reach.write(&args.blk_file);
        }
        for path in [&args.stats_file, &args.record_trace].into_iter().flatten() {
            reach.file(path);
        }
        if args.format == Format::Exd {
            completion_log(&mut reach, args);
        }
    }
    reach
}

/// Where the completion log will be made, and where an earlier daemon may have left one: its name is in the
/// image. An image that cannot be read now will be refused when it is opened, with the reason.
fn completion_log(reach: &mut Reach, args: &Args) {
    let Ok(file) = HostFile::open(&args.blk_file, OpenMode::default()) else { return };
    let Ok(owner) = file.metadata().map(|metadata| metadata.st_uid()) else { return };
    let log = LogKeeper::new(&args.blk_file, owner);
    if !args.read_only
        && let Some(directory) = log.prepare()
    {
        reach.files_in(directory);
    }
    let Ok(mut storage) = FileStorage::new(file) else { return };
    if let Ok((uuid, named)) = peek_log(&mut storage) {
        for path in log.candidates(uuid, &named) {
            reach.read(path);
        }
    }
}
