//! Capabilities.

use caps::{CapSet, Capability, CapsHashSet};

/// What a daemon that runs as root keeps: access to images of other users, whose files it then still
/// cannot name (Landlock), and giving its socket to a group.
const KEPT: [Capability; 3] =
    [Capability::CAP_DAC_OVERRIDE, Capability::CAP_CHOWN, Capability::CAP_FOWNER];

/// Drops the capabilities of the calling thread, also for programs that it may start.
pub fn drop_capabilities() -> Result<(), String> {
    let failed = |error| format!("could not drop capabilities: {error}");
    let permitted = caps::read(None, CapSet::Permitted).map_err(failed)?;
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::read(None, CapSet::Bounding).map_err(failed)? {
            caps::drop(None, CapSet::Bounding, capability).map_err(failed)?;
        }
    }
    let kept: CapsHashSet = KEPT.into_iter().filter(|kept| permitted.contains(kept)).collect();
    caps::clear(None, CapSet::Inheritable).map_err(failed)?;
    caps::set(None, CapSet::Effective, &kept).map_err(failed)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(failed)
}
