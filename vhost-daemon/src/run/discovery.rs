//! The file by which management software finds the program (vhost-user.json, type `VhostUserBackend`).

use serde_json::json;
use std::path::Path;

/// Content of `/usr/share/qemu/vhost-user/50-exd.json` for a program at this place.
pub fn describe(binary: &Path) -> String {
    let value = json!({
        "description": "EXD vhost-user-blk backend, for EXD and raw images",
        "type": "block",
        "binary": binary.to_string_lossy(),
        "tags": ["exd", "raw"],
    });
    format!("{value:#}")
}
