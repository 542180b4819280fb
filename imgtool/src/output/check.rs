//! The output of `check`.

use serde::Serialize;

/// The result of a check. The fields are qemu-img's JSON keys.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckResult {
    /// As given.
    pub filename: String,
    /// Name of the format.
    pub format: String,
    /// Errors of the check itself.
    pub check_errors: u64,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_end_offset: Option<u64>,
    /// Damaged structures left.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// Clusters of the image file that hold data and belong to nothing.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// Repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    /// Repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
    /// Of the virtual disk.
    #[serde(skip_serializing_if = "is_zero")]
    pub total_clusters: u64,
    /// Of the virtual disk.
    #[serde(skip_serializing_if = "is_zero")]
    pub allocated_clusters: u64,
    /// Allocated clusters that do not follow their predecessor on the host.
    #[serde(skip_serializing_if = "is_zero")]
    pub fragmented_clusters: u64,
    /// Always 0 so far.
    #[serde(skip_serializing_if = "is_zero")]
    pub compressed_clusters: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl CheckResult {
    /// 0 consistent, 2 damaged, 3 only leaks.
    pub fn exit_code(&self) -> u8 {
        match self {
            CheckResult { check_errors: 1.., .. } => 1,
            CheckResult { corruptions: 1.., .. } => 2,
            CheckResult { leaks: 1.., .. } => 3,
            _ => 0,
        }
    }
}

/// What a repair did.
pub fn repair_text(result: &CheckResult) -> String {
    format!(
        "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
         {} corruptions\n\nDouble checking the fixed image now...\n",
        result.leaks_fixed, result.corruptions_fixed
    )
}

/// The text form of the result.
pub fn text(result: &CheckResult) -> String {
    let mut out = String::new();
    if result.corruptions == 0 && result.leaks == 0 && result.check_errors == 0 {
        out += "No errors were found on the image.\n";
    }
    if result.corruptions > 0 {
        out += &format!(
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n",
            result.corruptions
        );
    }
    if result.leaks > 0 {
        out += &format!(
            "\n{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n",
            result.leaks
        );
    }
    if result.check_errors > 0 {
        out +=
            &format!("\n{} internal errors have occurred during the check.\n", result.check_errors);
    }
    if result.total_clusters > 0 {
        let share = |part: u64, whole: u64| match whole {
            0 => 0.0,
            whole => part as f64 * 100.0 / whole as f64,
        };
        out += &format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            result.allocated_clusters,
            result.total_clusters,
            share(result.allocated_clusters, result.total_clusters),
            share(result.fragmented_clusters, result.allocated_clusters),
            share(result.compressed_clusters, result.allocated_clusters),
        );
    }
    if let Some(end) = result.image_end_offset {
        out += &format!("Image end offset: {end}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_qemu_img() {
        let with = |corruptions, leaks| CheckResult { corruptions, leaks, ..Default::default() };
        assert_eq!(with(0, 0).exit_code(), 0);
        assert_eq!(with(1, 5).exit_code(), 2);
        assert_eq!(with(0, 5).exit_code(), 3);
    }
}
