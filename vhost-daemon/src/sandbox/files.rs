//! Files within reach, by Landlock.

use crate::sandbox::Reach;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError,
    RulesetStatus,
};
use std::path::Path;

/// The newest Landlock whose rights are used: ioctl on devices, TCP. An older kernel does what it can.
const NEWEST: ABI = ABI::V5;

/// Confines the calling thread and those it starts to what is listed.
pub fn confine(reach: &Reach) -> Result<(), String> {
    let status = restrict(reach).map_err(|error| format!("could not set up Landlock: {error}"))?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => {}
        RulesetStatus::PartiallyEnforced => {
            log::debug!(
                "the kernel's Landlock is older than {NEWEST:?}: some rights are not confined"
            );
        }
        RulesetStatus::NotEnforced => {
            log::warn!("the kernel has no Landlock: files are not confined");
        }
    }
    Ok(())
}

fn restrict(reach: &Reach) -> Result<RestrictionStatus, RulesetError> {
    let read: BitFlags<AccessFs> = AccessFs::ReadFile.into();
    let write = read | AccessFs::WriteFile | AccessFs::Truncate;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .create()?;
    for path in &reach.read {
        rules = allow(rules, path, read)?;
    }
    for path in &reach.write {
        rules = allow(rules, path, write | AccessFs::IoctlDev)?;
    }
    for path in &reach.files_in {
        rules = allow(rules, path, write | AccessFs::MakeReg | AccessFs::RemoveFile)?;
    }
    for path in &reach.sockets_in {
        let names = AccessFs::MakeSock | AccessFs::RemoveFile;
        rules = allow(rules, path, names | AccessFs::ReadDir)?;
    }
    rules.restrict_self()
}

/// What does not exist need not be reached.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(fd) => rules.add_rule(PathBeneath::new(fd, access)),
        Err(_) => Ok(rules),
    }
}
